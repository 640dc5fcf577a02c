"""Holds the micro-batches of one window on one rank."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

from distaccum.errors import ConfigError


class Announcer(Protocol):
    """Communicates to all ranks how many micro-batches each of them has for a window."""

    def totals_of(self, window: MicroBatches, /) -> object:
        """Write into `window.rounds` how many micro-batches the rank with the most has.

        Every rank calls it for the same window.
        """
        ...


@dataclass
class Source:
    """Connects consecutive windows of one loader with the accumulator that steps them."""

    whole: bool = False  # whether a window counts only if every rank has micro-batches for it
    # from the accumulator of the latest step; None before the first step
    announcer: Announcer | None = None


class MicroBatches:
    """Holds the micro-batches that one rank computes in one window.

    Their number is known in advance. They are read in order, and only once unless they are in a
    list.
    """

    def __init__(
        self,
        micro_batches: Iterable[Any],
        num_micro_batches: int,
        *,
        step: int | None = None,
        denominators: Sequence[Any] | None = None,
    ) -> None:
        """Describe a window on this rank.

        Args:
            micro_batches: the micro-batches, in a list or as a stream. The i-th one of this rank
                has the number i x ranks + rank in the window.
            num_micro_batches: how many there are; 0 on a rank that has none while others have some.
            step: the window's number in the plan; None if there is no plan.
            denominators: the objective's denominator of each micro-batch, if it is known without
                reading the micro-batch. None: the objective computes it from the micro-batches,
                which must then be in a list.

        Raises:
            ConfigError: for a stream without denominators.
        """
        if denominators is None and not isinstance(micro_batches, Sequence):
            raise ConfigError(
                "The micro-batches are not in a list, so they can be read only once, but their "
                "denominators must be known before that. Give a list of micro-batches, or "
                "denominators=[...]."
            )
        self._micro_batches = micro_batches
        self._num_micro_batches = num_micro_batches
        self.step = step
        self.denominators = denominators
        # the window after this one, if it is known already
        self.upcoming: MicroBatches | None = None
        # micro-batches on the rank with the most, once ranks have exchanged it
        self.rounds: int | None = None
        self.source: Source | None = None  # shared by the windows of one loader
        self.stepped = False  # whether an accumulator has finished it, by a step or by skipping it

    def __len__(self) -> int:
        return self._num_micro_batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self._micro_batches)

    def peek(self) -> Any:
        """Return the first micro-batch without consuming it, or None if there is none."""
        if isinstance(self._micro_batches, Sequence):
            return self._micro_batches[0] if self._micro_batches else None
        stream = iter(self._micro_batches)
        first = next(stream, None)
        self._micro_batches = chain([first], stream)
        return first
