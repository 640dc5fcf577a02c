"""How many samples each optimizer step takes, as a function of position: constant, in jumps, or on a linear ramp."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from operator import itemgetter

from distaccum.errors import ConfigError

FOREVER = 1 << 62  # more windows, and samples, than any training has


class ScheduleUnit(Enum):
    """What positions and lengths of a schedule count: optimizer steps, samples or tokens, over all ranks."""

    steps = "steps"
    samples = "samples"
    tokens = "tokens"


class Ramp(Enum):
    """How the effective batch gets from one entry to the next."""

    jump = "jump"  # all at once, at the entry
    linear = "linear"  # evenly along the way


@dataclass(frozen=True)
class BatchSchedule:
    """The effective batch along the training. It counts nothing, so a resumed run continues the same curve.

    A window is asked for the batch of the position where it starts: its step, or, in samples, its start in the plan's
    stream, where samples that `accum.last_window=drop` leaves out count as passed.

    Raises:
        ConfigError: for no entries, a first one that is not at 0, positions that do not rise, sizes below 1.
    """

    entries: tuple[tuple[int, int], ...]  # (from this position on, in `unit`; effective batch in samples), rising
    unit: ScheduleUnit = ScheduleUnit.steps
    ramp: Ramp = Ramp.jump

    def __post_init__(self) -> None:
        if not self.entries:
            raise ConfigError(
                "accum.schedule has no entries. Write at least {from: 0, effective_batch: 64}, or null for one "
                "effective batch all along."
            )
        for index, (begin, size) in enumerate(self.entries):
            before = self.entries[index - 1][0] if index else -1
            if index == 0 and begin != 0:
                raise ConfigError(
                    f"accum.schedule[0].from is {begin}; the first window needs a size too. Begin with "
                    f"{{from: 0, effective_batch: {size}}}."
                )
            if begin <= before:
                raise ConfigError(
                    f"accum.schedule[{index}].from ({begin}) does not come after the one before it ({before}). Write "
                    f"the entries in rising order, each position ({self.unit.value}) once."
                )
            if size < 1:
                raise ConfigError(
                    f"accum.schedule[{index}].effective_batch is {size}; it counts things and must be at least 1."
                )

    @property
    def largest(self) -> int:
        """The largest effective batch, in samples: a ramp never leaves the range between its two entries."""
        return max(size for _, size in self.entries)

    def at(self, step: int, start: int, micro_size: int) -> int:
        """The effective batch, in samples, that a window is asked for.

        On a ramp it is the nearest multiple of the micro size (halves upwards) between the two entries, exact at the
        entries themselves; integers only, so that all ranks and all resumed runs find the same.

        Args:
            step: the window's number, from 0.
            start: its position in the plan's stream of samples.
            micro_size: samples in one full micro.
        """
        return self._size(self._position(step, start), micro_size)

    def alike(self, step: int, start: int, micro_size: int) -> int:
        """How many full windows in a row, from this one on, are sure to be asked for the same batch."""
        position = self._position(step, start)
        index = bisect_right(self.entries, position, key=itemgetter(0))
        if index == len(self.entries):
            return FOREVER
        batch = self._size(position, micro_size)
        ahead = range(position, self.entries[index][0])  # sizes rise or fall along it, so the first other one is found
        same = bisect_right(ahead, False, key=lambda other: self._size(other, micro_size) != batch)
        return same if self.unit is ScheduleUnit.steps else -(-same // batch)

    def in_samples(self, tokens_per_sample: int | None) -> BatchSchedule:
        """This schedule as a plan reads it: from a number of tokens on is from the first sample at or after it on.

        Args:
            tokens_per_sample: None where samples differ in length; asked for only where the unit is tokens.

        Raises:
            ConfigError: for a schedule in tokens over samples that differ in length.
        """
        if self.unit is not ScheduleUnit.tokens:
            return self
        if tokens_per_sample is None:
            raise ConfigError(
                "accum.schedule_unit=tokens needs samples of one length, and here they differ. Use "
                "accum.schedule_unit=samples or steps, or pack the sequences (data.layout=packed)."
            )
        entries = tuple((-(-begin // tokens_per_sample), size) for begin, size in self.entries)
        return replace(self, entries=entries, unit=ScheduleUnit.samples)

    def _position(self, step: int, start: int) -> int:
        if self.unit is ScheduleUnit.tokens:
            raise ValueError("a plan knows no tokens: pass it BatchSchedule(...).in_samples(tokens_per_sample)")
        return step if self.unit is ScheduleUnit.steps else start

    def _size(self, position: int, micro_size: int) -> int:
        index = bisect_right(self.entries, position, key=itemgetter(0))
        begin, size = self.entries[index - 1]
        if self.ramp is Ramp.jump or index == len(self.entries) or position == begin:
            return size
        end, goal = self.entries[index]
        length = end - begin
        exact = size * length + (goal - size) * (position - begin)  # times length
        nearest = (2 * exact + micro_size * length) // (2 * micro_size * length) * micro_size
        return max(min(size, goal), min(nearest, max(size, goal)))


def entries_of(written: Sequence[Mapping[str, int]]) -> tuple[tuple[int, int], ...]:
    """The entries of a schedule as users write them: `[{from: 0, effective_batch: 16}, ...]`.

    Raises:
        ConfigError: for an entry with other keys than these two.
    """
    for index, entry in enumerate(written):
        if set(entry) != {"from", "effective_batch"}:
            raise ConfigError(
                f"accum.schedule[{index}] has the keys {', '.join(map(str, entry)) or 'none'}; an entry is "
                "{from: 0, effective_batch: 64}."
            )
    return tuple((entry["from"], entry["effective_batch"]) for entry in written)
