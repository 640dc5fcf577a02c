"""Describes how many samples each optimizer step takes, as a function of its position.

The effective batch size is constant, changes in jumps, or follows linear ramps.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from operator import itemgetter

from distaccum.errors import ConfigError

FOREVER = 1 << 62  # more windows, and more samples, than any training has


class ScheduleUnit(Enum):
    """Names the unit of positions and lengths in a schedule, counted over all ranks."""

    steps = "steps"
    samples = "samples"
    tokens = "tokens"


class Ramp(Enum):
    """Names how the effective batch size changes from one entry to the next."""

    jump = "jump"  # at once, at the next entry
    linear = "linear"  # evenly between the two entries


@dataclass(frozen=True)
class BatchSchedule:
    """Gives the effective batch size at each position of the training.

    It has no state, so a resumed run continues on the same curve. The effective batch size of a
    window depends on the position at which the window starts. With the unit `steps` this is the
    window's step. With `samples` it is the window's start in the plan's stream of samples, in which
    samples that `accum.last_window=drop` leaves out are counted too.

    Raises:
        ConfigError: if there are no entries, the first one is not at position 0, positions do not
            increase, or a size is below 1.
    """

    # Pairs (position in `unit`, effective batch size in samples from there on), positions rising.
    entries: tuple[tuple[int, int], ...]
    unit: ScheduleUnit = ScheduleUnit.steps
    ramp: Ramp = Ramp.jump

    def __post_init__(self) -> None:
        if not self.entries:
            raise ConfigError(
                "accum.schedule has no entries. Write at least {from: 0, effective_batch_size: "
                "64}, or null for a constant effective batch size."
            )
        for index, (begin, size) in enumerate(self.entries):
            before = self.entries[index - 1][0] if index else -1
            if index == 0 and begin != 0:
                raise ConfigError(
                    f"accum.schedule[0].from is {begin}, but the first window needs a size too. "
                    f"Begin with {{from: 0, effective_batch_size: {size}}}."
                )
            if begin <= before:
                raise ConfigError(
                    f"accum.schedule[{index}].from ({begin}) does not come after the entry before "
                    f"it ({before}). Write the entries in rising order, each position "
                    f"({self.unit.value}) once."
                )
            if size < 1:
                raise ConfigError(
                    f"accum.schedule[{index}].effective_batch_size is {size}; it must be at least "
                    "1 (samples)."
                )

    @property
    def largest(self) -> int:
        """Return the largest effective batch size, in samples.

        It is the largest one of the entries: a ramp stays between the sizes of its two entries.
        """
        return max(size for _, size in self.entries)

    def at(self, step: int, start: int, micro_batch_size: int) -> int:
        """Return the effective batch size, in samples, of the window at this position.

        On a ramp, the linear interpolation is rounded to the nearest multiple of the micro-batch
        size (halves upwards) and kept between the sizes of the two entries. At an entry it is
        exact. Only integers are used, so all ranks and all resumed runs get the same result.

        Args:
            step: the window's number, from 0.
            start: the window's position in the plan's stream of samples.
            micro_batch_size: samples in one full micro-batch.
        """
        return self._size(self._position(step, start), micro_batch_size)

    def alike(self, step: int, start: int, micro_batch_size: int) -> int:
        """Return how many full windows from this one on are certain to have the same size.

        Args:
            step: the window's number, from 0.
            start: the window's position in the plan's stream of samples.
            micro_batch_size: samples in one full micro-batch.
        """
        position = self._position(step, start)
        index = bisect_right(self.entries, position, key=itemgetter(0))
        if index == len(self.entries):
            return FOREVER
        batch = self._size(position, micro_batch_size)
        ahead = range(position, self.entries[index][0])
        # Sizes only rise or only fall along this range, so bisection finds the first different one.
        same = bisect_right(
            ahead, False, key=lambda other: self._size(other, micro_batch_size) != batch
        )
        return same if self.unit is ScheduleUnit.steps else -(-same // batch)

    def in_samples(self, tokens_per_sample: int | None) -> BatchSchedule:
        """Convert a schedule in tokens to samples, the unit that a plan can use.

        A position in tokens becomes the first sample that starts at or after it. A schedule in
        steps or samples is returned unchanged.

        Args:
            tokens_per_sample: None if samples differ in length; used only if the unit is tokens.

        Raises:
            ConfigError: for a schedule in tokens if samples differ in length.
        """
        if self.unit is not ScheduleUnit.tokens:
            return self
        if tokens_per_sample is None:
            raise ConfigError(
                "accum.schedule_unit=tokens needs samples of one length, but the samples here "
                "differ in length. Use accum.schedule_unit=samples or steps, or pack the sequences "
                "(data.layout=packed)."
            )
        entries = tuple((-(-begin // tokens_per_sample), size) for begin, size in self.entries)
        return replace(self, entries=entries, unit=ScheduleUnit.samples)

    def _position(self, step: int, start: int) -> int:
        """Return the position of a window in this schedule's unit."""
        if self.unit is ScheduleUnit.tokens:
            raise ValueError(
                "A plan does not count tokens. Pass it "
                "BatchSchedule(...).in_samples(tokens_per_sample)."
            )
        return step if self.unit is ScheduleUnit.steps else start

    def _size(self, position: int, micro_batch_size: int) -> int:
        """Return the effective batch size, in samples, at a position in this schedule's unit."""
        index = bisect_right(self.entries, position, key=itemgetter(0))
        begin, size = self.entries[index - 1]
        if self.ramp is Ramp.jump or index == len(self.entries) or position == begin:
            return size
        end, goal = self.entries[index]
        length = end - begin
        # the interpolated size times `length`
        exact = size * length + (goal - size) * (position - begin)
        nearest = (
            (2 * exact + micro_batch_size * length)
            // (2 * micro_batch_size * length)
            * micro_batch_size
        )
        return max(min(size, goal), min(nearest, max(size, goal)))


def entries_of(written: Sequence[Mapping[str, int]]) -> tuple[tuple[int, int], ...]:
    """Convert the entries of a schedule from the form in which users write them.

    Args:
        written: `[{from: 0, effective_batch_size: 16}, ...]`.

    Raises:
        ConfigError: for an entry with other keys than these two.
    """
    for index, entry in enumerate(written):
        if set(entry) != {"from", "effective_batch_size"}:
            raise ConfigError(
                f"accum.schedule[{index}] has the keys {', '.join(map(str, entry)) or 'none'}. "
                "Write an entry as {from: 0, effective_batch_size: 64}."
            )
    return tuple((entry["from"], entry["effective_batch_size"]) for entry in written)
