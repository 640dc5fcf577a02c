"""Which samples make which optimizer step: `Plan -> Window -> Micro`. Pure arithmetic, decided before anything runs.

What a window and its micros hold depends on (seed, position, effective batch or its schedule, micro size) only. The
world size decides nothing but who computes which micro.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise

from distaccum.core.batch_schedule import FOREVER, BatchSchedule
from distaccum.core.batch_size import require_positive
from distaccum.core.rng import permuted, round_keys
from distaccum.errors import ConfigError


class LastWindow(Enum):
    """What becomes of the samples that are left over at the end of an epoch."""

    keep = "keep"  # a shorter window of their own
    drop = "drop"  # left out; the shuffle leaves out others in the next epoch
    fill = "fill"  # one window with the first samples of the next epoch


@dataclass(frozen=True)
class Micro:
    """What one rank sends through one forward and backward: consecutive samples of the shuffled stream."""

    step: int  # the window's number, from 0
    number: int  # global within the window, from 0: the same whatever the world size
    start: int  # position in the training's stream of samples (all epochs)
    size: int  # samples, at least 1


@dataclass(frozen=True)
class Window:
    """All micros, over all ranks, that make one optimizer step."""

    step: int  # its number, from 0: that of the step it makes, where no window before it was skipped
    epoch: int  # the epoch of its first sample, from 0
    start: int  # position of its first sample in the stream; with `step`, all that a resumed run has to know
    size: int  # samples
    effective_batch: int  # samples that the plan asks for here; `size` is smaller where an epoch ends
    micro_size: int  # samples in its largest micro
    next_start: int  # where the next window starts

    @property
    def micros(self) -> tuple[Micro, ...]:
        """All micros in the order of their global numbers; their sizes differ by one sample at most."""
        return self.deal(0, 1)

    def deal(self, rank: int, world_size: int) -> tuple[Micro, ...]:
        """The micros that one rank computes, no others are made. Counts differ by one at most; some may have none."""
        count = _ceil(self.size, self.micro_size)
        size, larger = divmod(self.size, count)  # the first `larger` ones have a sample more
        return tuple(
            Micro(self.step, number, self.start + number * size + min(number, larger), size + (number < larger))
            for number in range(rank, count, world_size)
        )


@dataclass(frozen=True)
class Plan:
    """The sequence of windows over any number of epochs.

    Raises:
        ConfigError: for sizes that are not positive, an epoch shorter than a window whose rest is dropped, or an
            effective batch that the schedule does not begin with.
    """

    num_samples: int  # samples in one epoch
    effective_batch: int  # samples in one full window; with a schedule, in the first one
    micro_size: int  # samples in one full micro
    seed: int = 0
    last_window: LastWindow = LastWindow.keep
    shuffle: bool = True
    schedule: BatchSchedule | None = None  # None: the same effective batch all along
    halvings: int = 0  # how often full micros are halved, for want of memory; windows stay what they are

    def __post_init__(self) -> None:
        for name in ("num_samples", "effective_batch", "micro_size"):
            require_positive(name, getattr(self, name))
        if (first := self._asked(0, 0)) != self.effective_batch:
            raise ConfigError(f"effective_batch is {self.effective_batch}, but the schedule begins with {first}.")
        if self.last_window is LastWindow.drop and self.num_samples < self.largest_batch:
            raise ConfigError(
                f"accum.last_window=drop leaves nothing: an epoch has {self.num_samples} samples and a window needs "
                f"{self.largest_batch}. Use accum.last_window=keep or fill, or a smaller accum.effective_batch."
            )

    @property
    def largest_batch(self) -> int:
        """The largest effective batch of the training, in samples."""
        return self.schedule.largest if self.schedule else self.effective_batch

    @property
    def largest_micro(self) -> int:
        """Samples in the largest micro; `micro_size`, unless micros are halved."""
        return _ceil(self.micro_size, 2**self.halvings)

    @property
    def windows_per_epoch(self) -> int:
        """Windows that start in one epoch (with `fill` or a schedule: in the first one)."""
        return self._last(before=self.num_samples).step + 1

    @property
    def last_window_size(self) -> int:
        """Samples in the last window of an epoch (with a schedule: of the first one)."""
        return self._last(before=self.num_samples).size

    def num_steps(self, epochs: int) -> int:
        """Windows in so many epochs. With `fill`, the samples after the last full window are not begun."""
        end = epochs * self.num_samples
        last = self._last(before=end)
        return last.step + (last.start + last.size <= end)

    def start_of(self, step: int) -> int:
        """Where the window with this number starts in the stream; with the number of steps, the training's length.

        Exact, and found without making the windows before it: the work grows with the epochs and with the sizes that a
        ramp takes on, about 50 us for each.
        """
        return self._last(step=step).start

    def consumed(self, step: int) -> int:
        """Samples in all windows before this one: `start_of`, without what `drop` left out."""
        visited = self._visited(step=step)
        return sum(next_.start - window.next_start + window.size for window, next_ in pairwise(visited))

    def window(self, step: int = 0, start: int = 0) -> Window:
        """The window that starts at a position of the stream.

        With `drop`, the rest of an epoch is left out where it is shorter than what a window that starts there would be
        asked for; the window after the gap is asked for what its own position says.

        Args:
            step: its number, from 0.
            start: 0, or `next_start` of the window before it. Any position is legal: what was consumed stays consumed.
        """
        start, asked = self._begin(step, start)
        size = asked if self.last_window is LastWindow.fill else min(asked, self._left(start))
        next_start, _ = self._begin(step + 1, start + size)  # past what is dropped, so that it tells the epoch truly
        return Window(step, start // self.num_samples, start, size, asked, self.largest_micro, next_start)

    def windows(self, step: int = 0, start: int = 0) -> Iterator[Window]:
        """All windows from a position on, without end: the caller knows how many steps the training has."""
        while True:
            window = self.window(step, start)
            yield window
            step, start = step + 1, window.next_start

    def samples(self, micro: Micro) -> list[int]:
        """The numbers, in [0, num_samples), of the samples in a micro."""
        numbers = []
        keys: dict[int, list[int]] = {}
        for position in range(micro.start, micro.start + micro.size):
            epoch, index = divmod(position, self.num_samples)
            if self.shuffle:
                if epoch not in keys:
                    keys[epoch] = round_keys(self.seed, epoch)
                index = permuted(index, self.num_samples, keys[epoch])
            numbers.append(index)
        return numbers

    def _asked(self, step: int, start: int) -> int:
        return self.schedule.at(step, start, self.micro_size) if self.schedule else self.effective_batch

    def _left(self, start: int) -> int:
        return self.num_samples - start % self.num_samples

    def _begin(self, step: int, start: int) -> tuple[int, int]:
        """Where a window really starts, and the effective batch it is asked for."""
        asked = self._asked(step, start)
        if self.last_window is LastWindow.drop and self._left(start) < asked:
            start += self._left(start)
            asked = self._asked(step, start)
        return start, asked

    def _last(self, step: int = FOREVER, before: int = FOREVER) -> Window:
        """The last window that has at most this number and starts before this position."""
        return deque(self._visited(step, before), maxlen=1)[0]

    def _visited(self, step: int = FOREVER, before: int = FOREVER) -> Iterator[Window]:
        """The windows on the way to `_last`, that one included. Those leapt over lie side by side, none is dropped."""
        window = self.window()
        yield window
        while window.step < step and window.next_start < before:
            start, batch = window.start, window.effective_batch
            alike = self.schedule.alike(window.step, start, self.micro_size) if self.schedule else FOREVER
            if self.last_window is not LastWindow.fill:
                alike = min(alike, self._left(start) // batch)
            # Windows that are alike lie side by side: leap to the last of them, or take one step.
            leap = min(alike - 1, step - window.step, (before - 1 - start) // batch)
            if leap > 1:
                window = self.window(window.step + leap, start + leap * batch)
            else:
                window = self.window(window.step + 1, window.next_start)
            yield window


def _ceil(number: int, unit: int) -> int:
    return -(-number // unit)
