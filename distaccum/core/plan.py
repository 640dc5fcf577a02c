"""Decides which samples make which optimizer step: `Plan -> Window -> MicroBatch`.

All of it is pure arithmetic, decided before anything runs. The contents of a window and of its
micro-batches depend only on the seed, the position, the effective batch size or its schedule, and
the micro-batch size. The world size decides only which rank computes which micro-batch.
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
    """Names what happens to the samples that are left over at the end of an epoch."""

    keep = "keep"  # they make a shorter window
    drop = "drop"  # they are left out; in the next epoch the shuffle leaves out others
    fill = "fill"  # they share a window with the first samples of the next epoch


@dataclass(frozen=True)
class MicroBatch:
    """Describes the samples that one rank sends through one forward and backward.

    They are consecutive in the shuffled stream of samples.
    """

    step: int  # number of its window, from 0
    number: int  # its number in the window over all ranks, from 0; independent of the world size
    start: int  # position of its first sample in the training's stream (all epochs)
    size: int  # samples, at least 1


@dataclass(frozen=True)
class Window:
    """Describes all micro-batches, over all ranks, of one optimizer step."""

    step: int  # its number, from 0; equals the updates before it unless a window was skipped
    epoch: int  # epoch of its first sample, from 0
    start: int  # position of its first sample in the stream; a resumed run needs `step` and `start`
    size: int  # samples
    # samples that the plan wants here; more than `size` if the epoch ends
    effective_batch_size: int
    micro_batch_size: int  # samples in its largest micro-batch
    next_start: int  # position at which the next window starts

    @property
    def micro_batches(self) -> tuple[MicroBatch, ...]:
        """Return all micro-batches in the order of their global numbers.

        Their sizes differ by at most one sample.
        """
        return self.of_rank(0, 1)

    def of_rank(self, rank: int, world_size: int) -> tuple[MicroBatch, ...]:
        """Return the micro-batches that one rank computes, without making those of other ranks.

        The counts of different ranks differ by at most one. A rank may have none.
        """
        count = _ceil(self.size, self.micro_batch_size)
        size, larger = divmod(self.size, count)  # the first `larger` ones have one sample more
        return tuple(
            MicroBatch(
                self.step,
                number,
                self.start + number * size + min(number, larger),
                size + (number < larger),
            )
            for number in range(rank, count, world_size)
        )


@dataclass(frozen=True)
class Plan:
    """Divides the samples of any number of epochs into windows.

    Raises:
        ConfigError: for a size below 1, for an epoch shorter than a window if the rest of an epoch
            is dropped, or for a schedule that does not begin with `effective_batch_size`.
    """

    num_samples: int  # samples in one epoch
    effective_batch_size: int  # samples in one full window; with a schedule, in the first window
    micro_batch_size: int  # samples in one full micro-batch
    seed: int = 0
    last_window: LastWindow = LastWindow.keep
    shuffle: bool = True
    schedule: BatchSchedule | None = None  # None: a constant effective batch size
    # how often full micro-batches are halved to save memory; windows do not change
    halvings: int = 0

    def __post_init__(self) -> None:
        for name in ("num_samples", "effective_batch_size", "micro_batch_size"):
            require_positive(name, getattr(self, name))
        if (first := self._asked(0, 0)) != self.effective_batch_size:
            raise ConfigError(
                f"effective_batch_size is {self.effective_batch_size}, but the schedule begins "
                f"with {first}. Use the same number for both."
            )
        if self.last_window is LastWindow.drop and self.num_samples < self.largest_batch:
            raise ConfigError(
                f"accum.last_window=drop leaves nothing: an epoch has {self.num_samples} samples "
                f"and a window needs {self.largest_batch}. Use accum.last_window=keep or fill, or "
                "a smaller accum.effective_batch_size."
            )

    @property
    def largest_batch(self) -> int:
        """Return the largest effective batch size of the training, in samples."""
        return self.schedule.largest if self.schedule else self.effective_batch_size

    @property
    def largest_micro_batch(self) -> int:
        """Return the number of samples in the largest micro-batch.

        It is `micro_batch_size` unless micro-batches are halved.
        """
        return _ceil(self.micro_batch_size, 2**self.halvings)

    @property
    def windows_per_epoch(self) -> int:
        """Return the number of windows that start in one epoch.

        With `fill` or a schedule, it is the number of those that start in the first epoch.
        """
        return self._last(before=self.num_samples).step + 1

    @property
    def last_window_size(self) -> int:
        """Return the number of samples in the last window of an epoch.

        With a schedule, it is the last window of the first epoch.
        """
        return self._last(before=self.num_samples).size

    def num_steps(self, epochs: int) -> int:
        """Return the number of windows in this many epochs.

        With `fill`, the samples after the last full window are not used.
        """
        end = epochs * self.num_samples
        last = self._last(before=end)
        return last.step + (last.start + last.size <= end)

    def start_of(self, step: int) -> int:
        """Return the position in the stream of samples at which a window starts.

        If `step` is the number of steps of a training, this is the training's length in samples.
        The result is exact, although not every window before it is made: the work grows with the
        number of epochs and with the number of sizes that a ramp takes, about 50 us for each.

        Args:
            step: the window's number, from 0.
        """
        return self._last(step=step).start

    def consumed(self, step: int) -> int:
        """Return the number of samples in all windows before this one.

        It is `start_of(step)` without the samples that `drop` left out.

        Args:
            step: the window's number, from 0.
        """
        visited = self._visited(step=step)
        return sum(
            next_.start - window.next_start + window.size for window, next_ in pairwise(visited)
        )

    def window(self, step: int = 0, start: int = 0) -> Window:
        """Return the window that starts at a position of the stream of samples.

        With `drop`, the rest of an epoch is left out if it is shorter than the effective batch size
        at its position. The window then starts in the next epoch, with the effective batch size
        there.

        Args:
            step: the window's number, from 0.
            start: 0, or `next_start` of the window before it. Any other position is valid too:
                samples before it count as consumed.
        """
        start, asked = self._begin(step, start)
        size = asked if self.last_window is LastWindow.fill else min(asked, self._left(start))
        # past dropped samples, so in the right epoch
        next_start, _ = self._begin(step + 1, start + size)
        return Window(
            step,
            start // self.num_samples,
            start,
            size,
            asked,
            self.largest_micro_batch,
            next_start,
        )

    def windows(self, step: int = 0, start: int = 0) -> Iterator[Window]:
        """Yield all windows from a position on, without end.

        The caller knows how many steps the training has.
        """
        while True:
            window = self.window(step, start)
            yield window
            step, start = step + 1, window.next_start

    def samples(self, micro_batch: MicroBatch) -> list[int]:
        """Return the indices, in [0, num_samples), of the samples in a micro-batch."""
        numbers = []
        keys: dict[int, list[int]] = {}
        for position in range(micro_batch.start, micro_batch.start + micro_batch.size):
            epoch, index = divmod(position, self.num_samples)
            if self.shuffle:
                if epoch not in keys:
                    keys[epoch] = round_keys(self.seed, epoch)
                index = permuted(index, self.num_samples, keys[epoch])
            numbers.append(index)
        return numbers

    def _asked(self, step: int, start: int) -> int:
        """Return the effective batch size of the window at this position."""
        return (
            self.schedule.at(step, start, self.micro_batch_size)
            if self.schedule
            else self.effective_batch_size
        )

    def _left(self, start: int) -> int:
        """Return the number of samples from a position to the end of its epoch."""
        return self.num_samples - start % self.num_samples

    def _begin(self, step: int, start: int) -> tuple[int, int]:
        """Return the start of a window, past dropped samples, and its effective batch size."""
        asked = self._asked(step, start)
        if self.last_window is LastWindow.drop and self._left(start) < asked:
            start += self._left(start)
            asked = self._asked(step, start)
        return start, asked

    def _last(self, step: int = FOREVER, before: int = FOREVER) -> Window:
        """Return the last window with at most this number that starts before this position."""
        return deque(self._visited(step, before), maxlen=1)[0]

    def _visited(self, step: int = FOREVER, before: int = FOREVER) -> Iterator[Window]:
        """Yield some of the windows from the first one to the one that `_last` returns.

        Windows are passed over only where they are adjacent, so no sample between them is dropped.
        """
        window = self.window()
        yield window
        while window.step < step and window.next_start < before:
            start, batch = window.start, window.effective_batch_size
            alike = (
                self.schedule.alike(window.step, start, self.micro_batch_size)
                if self.schedule
                else FOREVER
            )
            if self.last_window is not LastWindow.fill:
                alike = min(alike, self._left(start) // batch)
            # Windows of one size are adjacent: jump to the last of them, or advance by one window.
            leap = min(alike - 1, step - window.step, (before - 1 - start) // batch)
            if leap > 1:
                window = self.window(window.step + leap, start + leap * batch)
            else:
                window = self.window(window.step + 1, window.next_start)
            yield window


def _ceil(number: int, unit: int) -> int:
    return -(-number // unit)
