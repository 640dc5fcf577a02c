"""Decides how many micro-batches at the end of a window are computed block by block.

The number is an option, or it is chosen by measured times.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

from torch import nn

from distaccum.errors import ConfigError
from distaccum.parallel.base import Strategy
from distaccum.step import plain_order
from distaccum.step.micro_batches import MicroBatchRunner
from distaccum.step.overlap import tail
from distaccum.step.timing import Mark, seconds_between

AUTO = "auto"
WARM_WINDOWS = 2  # not timed: DDP rebuilds its buckets, and compilers compile
# with T = 1, and the same number with the suggested T, after one that is not timed
TIMED_WINDOWS = 3
BACKWARD = 2 / 3  # of a micro-batch's time: two matrix products for each one of the forward
WORTH = 0.02  # of a window's time: saving less waiting than that is not worth any memory


class Overlap:
    """Runs windows whose last T micro-batches are computed block by block.

    T changes time and memory, but not results.
    """

    def __init__(
        self, strategy: Strategy, asked: int | str, blocks: Sequence[nn.Module], limit: int | None
    ) -> None:
        """Check the options; with "auto", T is 1 until enough windows have been timed to choose it.

        Args:
            strategy: how the model is distributed.
            asked: T, or "auto".
            blocks: the model's blocks, in order.
            limit: the largest T that "auto" may choose; None: the micro-batches of a window.

        Raises:
            ConfigError: for numbers below 1, and for a T above 1 that this model or strategy does
                not support.
        """
        for name, value in (("overlap_micro_batches", asked), ("overlap_limit", limit)):
            right = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            if not right and value != (AUTO if name == "overlap_micro_batches" else None):
                raise ConfigError(
                    f"{name} is {value!r}. Give a number of micro-batches, at least 1, or leave it "
                    "out."
                )
        obstacle = strategy.tail_obstacle(blocks)
        if isinstance(asked, int) and asked > 1 and strategy.world.group is not None:
            self._refuse(obstacle)
        self._strategy = strategy
        self._blocks = blocks
        self._timing = _Timing(limit) if asked == AUTO and obstacle is None else None
        self.micro_batches = asked if isinstance(asked, int) and obstacle is None else 1  # T
        self.reason = obstacle  # why it is this T, if "auto" or an obstacle decided

    def __str__(self) -> str:
        if self._timing is not None and self.reason is None:
            return f"to be chosen by measured times after {WARM_WINDOWS + TIMED_WINDOWS} windows"
        return (
            f"the last {self.micro_batches} micro-batch(es) "
            f"together{f' ({self.reason})' if self.reason else ''}"
        )

    def run(self, runner: MicroBatchRunner) -> Callable[[], None]:
        """Compute a window except for its last backwards, and return a function that runs those."""
        if self.micro_batches == 1 and self._timing is None:
            return plain_order.run(self._strategy, runner)
        self._refuse(self._strategy.tail_obstacle(self._blocks))
        # Also with T = 1 while windows are timed: a model that cannot be cut is then refused in the
        # first window.
        return tail.run(
            self._strategy, runner, self._blocks, min(self.micro_batches, runner.rounds)
        )

    def _refuse(self, obstacle: str | None) -> None:
        """Raise ConfigError if there is an obstacle to a T above 1."""
        if obstacle is not None:
            raise ConfigError(
                f"overlap_micro_batches above 1 is not possible here: {obstacle}. Use "
                "overlap_micro_batches=1 (accum.overlap_micro_batches on the command line)."
            )

    def observe(self, runner: MicroBatchRunner, end: Mark) -> float | None:
        """Return how many seconds a window waited for communication, and keep its times for "auto".

        Call it after each window, on all ranks.

        Args:
            runner: that of the window.
            end: the end of the last micro-batch, which the device has already passed.

        Returns:
            Seconds, or None if the window has no other micro-batches to compare with.
        """
        waited_s = runner.exposed_s(end)
        if self._timing is not None:
            self._timing.add(runner, end, waited_s)
        return waited_s

    def choose(self) -> str | None:
        """Choose T with "auto", once enough windows have been timed; all ranks choose the same.

        Call it before each window, on all ranks.

        Returns:
            Which T was chosen and why, or None if nothing was chosen before this window. The first
            choice may be one to try; then another, final choice follows.
        """
        timing = self._timing
        if timing is None or not timing.complete:
            return None
        rows, _ = self._strategy.world.gather_rows(timing.medians()).read()
        self.micro_batches, self.reason, done = timing.choice(rows)
        if done:
            self._timing = None
        return f"overlap_micro_batches={self.micro_batches}: {self.reason}"


class _Timing:
    """Times windows with T = 1, suggests a T, times windows with it, and chooses the faster one.

    A window waits `exposed` seconds for the communication that its last backward did not hide. Each
    further micro-batch that is computed block by block adds one backward that can hide it. So the
    smallest T that hides all of it is 1 + exposed / backward, rounded up.
    """

    def __init__(self, limit: int | None) -> None:
        self._limit = limit
        self._rounds = 0  # rounds of the windows that are compared
        self._left_out = WARM_WINDOWS
        self._windows: list[tuple[float, float]] = []  # seconds: in total, waited
        self._plain_s: float | None = None  # median of a window with T = 1, once a T was suggested
        self._suggested = 1

    @property
    def complete(self) -> bool:
        """Return whether enough windows have been timed to choose; equal on all ranks."""
        return len(self._windows) == TIMED_WINDOWS

    def add(self, runner: MicroBatchRunner, end: Mark, exposed: float | None) -> None:
        """Add the times of one window.

        A window of one micro-batch, or one shorter than the longest so far, is ignored. A window
        longer than all before it restarts the timing.
        """
        if runner.rounds < max(2, self._rounds):
            return
        if runner.rounds > self._rounds:
            self._rounds, self._windows = runner.rounds, []
            self._left_out, self._plain_s = WARM_WINDOWS, None
        if self._left_out:
            self._left_out -= 1
            return
        self._windows.append((seconds_between(runner.began, end), exposed or 0.0))

    def medians(self) -> list[float]:
        """Return this rank's median seconds of a window in total, and of its waiting."""
        return [statistics.median(column) for column in zip(*self._windows, strict=True)]

    def choice(self, rows: list[list[float]]) -> tuple[int, str, bool]:
        """Choose T from the medians of all ranks.

        Args:
            rows: for each rank, what `medians` returned.

        Returns:
            T, the reason as a text, and whether the choice is final.
        """
        whole = max(row[0] for row in rows)
        if self._plain_s is not None:
            gain = 1 - whole / self._plain_s
            if gain > 0:
                return self._suggested, f"a window takes {gain:.0%} less time than with 1", True
            return 1, f"with {self._suggested}, a window took {-gain:.0%} more time", True
        exposed = min(row[1] for row in rows)  # ranks that wait longer wait for slower ranks
        backward = BACKWARD * (whole - exposed) / self._rounds
        waits = f"a window of {whole:.3g} s waits {exposed:.2g} s for communication"
        if exposed < WORTH * whole:
            return 1, f"{waits}, which is not worth more memory", True
        wanted = 1 + math.ceil(exposed / max(backward, 1e-9))
        self._suggested = min(wanted, self._rounds, self._limit or self._rounds)
        if self._suggested == 1:
            return 1, f"{waits}, but memory has room for one micro-batch only", True
        self._plain_s, self._windows, self._left_out = whole, [], 1
        least = "" if self._suggested == wanted else f" (T={wanted} would hide all of it)"
        why = (
            f"{waits}, and the backward of a micro-batch takes about {backward:.2g} s{least}; "
            "tried in the next windows"
        )
        return self._suggested, why, False
