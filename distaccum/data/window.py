"""The micro-batches of one window on one rank, and windows over anybody's loader."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import torch.distributed as dist

from distaccum.errors import ConfigError


class MicroBatches:
    """What one rank computes in one window: known in number, read in order, once unless they are held in a list."""

    def __init__(
        self,
        micros: Iterable[Any],
        num_micros: int,
        *,
        step: int | None = None,
        weights: Sequence[Any] | None = None,
    ) -> None:
        """Describe a window.

        Args:
            micros: the micro-batches, in a list or as a stream. The i-th has the global number i x ranks + rank.
            num_micros: how many; 0 on a rank that has none while others have.
            step: the plan's number of this window; None where there is no plan.
            weights: the objective's weight of each micro where that is known without reading it, so that the micros can
                be streamed; None: they are held in a list and the objective is asked.
        """
        if weights is None and not isinstance(micros, Sequence):
            raise ConfigError("A window that is streamed must say its weights; give a list, or weights=[...].")
        self._micros = micros
        self._num_micros = num_micros
        self.step = step
        self.weights = weights
        self.upcoming: MicroBatches | None = None  # the window after this one, where it is known already
        self.rounds: int | None = None  # micros on the rank that has most; an accumulator that knows writes it here

    def __len__(self) -> int:
        return self._num_micros

    def __iter__(self) -> Iterator[Any]:
        return iter(self._micros)

    def peek(self) -> Any:
        """The first micro-batch, which stays where it is; None where there is none."""
        if isinstance(self._micros, Sequence):
            return self._micros[0] if self._micros else None
        stream = iter(self._micros)
        first = next(stream, None)
        self._micros = chain([first], stream)
        return first


class Windows:
    """An iterable of windows over a loader of micro-batches; see `windows`."""

    def __init__(self, loader: Iterable[Any], num_micros: int) -> None:
        """Keep the loader; nothing is read yet."""
        self._loader = loader
        self.num_micros = num_micros

    @property
    def num_micros(self) -> int:
        """Micros per rank in a full window. May be set while iterating: the next window has the new size."""
        return self._num_micros

    @num_micros.setter
    def num_micros(self, value: int) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"num_micros is {value!r}; a window has a whole number of micro-batches, at least 1.")
        self._num_micros = value

    def __iter__(self) -> Iterator[MicroBatches]:
        """One epoch. A rank whose loader is exhausted gets empty windows until all ranks' are."""
        source = iter(self._loader)
        read_ahead: deque[Any] = deque()
        shared = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        window = self._cut(read_ahead, source)
        more = bool(window) or shared
        while more:
            upcoming = window.upcoming = self._cut(read_ahead, source)
            cut_for = self._num_micros
            yield window
            if self._num_micros != cut_for:  # cut anew; whatever was agreed on the old one is asked again
                read_ahead.extendleft(reversed(list(upcoming)))
                upcoming = self._cut(read_ahead, source)
            # Whether other ranks have micros left was agreed when the window before was computed.
            more = bool(upcoming) or bool(upcoming.rounds)
            window = upcoming

    def _cut(self, read_ahead: deque[Any], source: Iterator[Any]) -> MicroBatches:
        while len(read_ahead) < self._num_micros:
            try:
                read_ahead.append(next(source))
            except StopIteration:
                break
        micros = [read_ahead.popleft() for _ in range(min(self._num_micros, len(read_ahead)))]
        return MicroBatches(micros, len(micros))


def windows(loader: Iterable[Any], num_micros: int) -> Windows:
    """Group a loader's micro-batches into windows; the last one of an epoch may be shorter.

    One window is read ahead, on the host, so that ranks can agree on its weights while the one before is computed.
    Ranks may hold different numbers of micro-batches: they end the epoch together, provided that every rank passes each
    window to `Accumulator.step`. `break` whenever you like; a new loop starts with a new window.

    Args:
        loader: any iterable of micro-batches, with or without a length; the micro size is the loader's.
        num_micros: K, the micros per rank in a full window; attribute `num_micros` of what is returned may be changed.

    Raises:
        ConfigError: for a `num_micros` that is not a positive integer.
    """
    return Windows(loader, num_micros)
