"""The micro-batches of one window on one rank."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

from distaccum.errors import ConfigError


class Announcer(Protocol):
    """Makes a window known to all ranks."""

    def on(self, window: MicroBatches, /) -> object:
        """Write into `window.rounds` how many micro-batches the rank with most has. Called on every rank."""
        ...


@dataclass
class Source:
    """Connects windows that follow each other with the accumulator that steps them."""

    whole: bool = False  # a window counts only where every rank has micro-batches for it
    announcer: Announcer | None = None  # of the accumulator that stepped a window last; None before the first step


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
        self.source: Source | None = None  # where windows after this one are asked for
        self.stepped = False  # whether an accumulator has made its step, or passed it over

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
