"""How many micros at the end of a window are computed block by block: as asked for, or chosen by measured times."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

from torch import nn

from distaccum.errors import ConfigError
from distaccum.parallel.base import Strategy
from distaccum.step import plain_order
from distaccum.step.micro_batches import Forwards
from distaccum.step.overlap import tail
from distaccum.step.timing import Mark, seconds_between

AUTO = "auto"
WARM_WINDOWS = 2  # DDP arranges its buckets, and compilers compile
TIMED_WINDOWS = 3  # with T = 1, and as many with what they suggest, after one that is not counted
BACKWARD = 2 / 3  # of a micro: two products of matrices for each of the forward
WORTH = 0.02  # of a window: what is waited for less than that is not worth any memory


class Overlap:
    """Runs windows with the last T micros block by block. Results do not depend on T; times and memory do."""

    def __init__(self, strategy: Strategy, asked: int | str, blocks: Sequence[nn.Module], limit: int | None) -> None:
        """T is as asked; with "auto" 1, until enough windows were timed to choose it.

        Args:
            strategy: how the model is spread.
            asked: T, or "auto".
            blocks: the model's, in their order.
            limit: the largest T that "auto" may choose; None: the micros of a window.

        Raises:
            ConfigError: for numbers below 1, and where a T above 1 is asked for that cannot be kept.
        """
        for name, value in (("overlap_micros", asked), ("overlap_limit", limit)):
            right = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            if not right and value != (AUTO if name == "overlap_micros" else None):
                raise ConfigError(f"{name} is {value!r}; give a number of micro-batches from 1 on, or leave it out.")
        obstacle = strategy.tail_obstacle(blocks)
        if isinstance(asked, int) and asked > 1 and strategy.world.group is not None:
            self._refuse(obstacle)
        self._strategy = strategy
        self._blocks = blocks
        self._timing = _Timing(limit) if asked == AUTO and obstacle is None else None
        self.micros = asked if isinstance(asked, int) and obstacle is None else 1  # T
        self.reason = obstacle  # why it is this T, where "auto" or an obstacle decided

    def __str__(self) -> str:
        if self._timing is not None and self.reason is None:
            return f"chosen after {WARM_WINDOWS + TIMED_WINDOWS} windows by measured times"
        return f"the last {self.micros} micro(s) together{f' ({self.reason})' if self.reason else ''}"

    def run(self, forwards: Forwards) -> Callable[[], None]:
        """Compute a window but its last backwards, see `microbatch.run`."""
        if self.micros == 1 and self._timing is None:
            return plain_order.run(self._strategy, forwards)
        self._refuse(self._strategy.tail_obstacle(self._blocks))
        # With T = 1 while windows are timed, so that a model that cannot be cut is refused in the first window.
        return tail.run(self._strategy, forwards, self._blocks, min(self.micros, forwards.rounds))

    def _refuse(self, obstacle: str | None) -> None:
        if obstacle is not None:
            raise ConfigError(
                f"overlap_micros above 1 cannot be kept here: {obstacle}. Use overlap_micros=1 (accum.overlap_micros "
                "on the command line)."
            )

    def observe(self, forwards: Forwards, end: Mark) -> float | None:
        """Call after each window, on all ranks: the seconds it waited for communication, see `exposed_s`."""
        waited_s = forwards.exposed_s(end)
        if self._timing is not None:
            self._timing.add(forwards, end, waited_s)
        return waited_s

    def choose(self) -> str | None:
        """Call before each window, on all ranks. With "auto", once enough is known they agree on T here.

        Returns:
            What was chosen and why, in the two windows in which something is; else None.
        """
        timing = self._timing
        if timing is None or not timing.complete:
            return None
        rows, _ = self._strategy.world.share(timing.medians()).read()
        self.micros, self.reason, done = timing.choice(rows)
        if done:
            self._timing = None
        return f"overlap_micros={self.micros}: {self.reason}"


class _Timing:
    """Times windows with T = 1, suggests a T, times windows with it, and chooses the faster one.

    A window waits `exposed` for what its last backward did not hide. Each further micro in the tail puts one more
    backward beside it, so that the smallest T that hides it all is 1 + exposed / backward, rounded up.
    """

    def __init__(self, limit: int | None) -> None:
        self._limit = limit
        self._rounds = 0  # of the windows that are compared
        self._left_out = WARM_WINDOWS
        self._windows: list[tuple[float, float]] = []  # seconds: whole, exposed
        self._plain_s: float | None = None  # a window with T = 1, once a T was suggested
        self._suggested = 1

    @property
    def complete(self) -> bool:
        """The same on all ranks."""
        return len(self._windows) == TIMED_WINDOWS

    def add(self, forwards: Forwards, end: Mark, exposed: float | None) -> None:
        """One window; shorter ones are passed over, and with a longer one all begins anew."""
        if forwards.rounds < max(2, self._rounds):
            return
        if forwards.rounds > self._rounds:
            self._rounds, self._windows = forwards.rounds, []
            self._left_out, self._plain_s = WARM_WINDOWS, None
        if self._left_out:
            self._left_out -= 1
            return
        self._windows.append((seconds_between(forwards.began, end), exposed or 0.0))

    def medians(self) -> list[float]:
        """This rank's seconds: a window, and what it waited."""
        return [statistics.median(column) for column in zip(*self._windows, strict=True)]

    def choice(self, rows: list[list[float]]) -> tuple[int, str, bool]:
        """From the medians of all ranks: T, why, and whether that is final."""
        whole = max(row[0] for row in rows)
        if self._plain_s is not None:
            gain = 1 - whole / self._plain_s
            if gain > 0:
                return self._suggested, f"a window takes {gain:.0%} less than with 1", True
            return 1, f"{self._suggested} was tried and a window took {-gain:.0%} more", True
        exposed = min(row[1] for row in rows)  # a rank that waits longer waits for a slower rank, not for the network
        backward = BACKWARD * (whole - exposed) / self._rounds
        waits = f"a window of {whole:.3g} s waits {exposed:.2g} s for communication"
        if exposed < WORTH * whole:
            return 1, f"{waits}, which is not worth more memory", True
        wanted = 1 + math.ceil(exposed / max(backward, 1e-9))
        self._suggested = min(wanted, self._rounds, self._limit or self._rounds)
        if self._suggested == 1:
            return 1, f"{waits}, and the memory limit leaves room for one micro-batch", True
        self._plain_s, self._windows, self._left_out = whole, [], 1
        least = "" if self._suggested == wanted else f" (of {wanted} that would hide it)"
        why = (
            f"{waits}, and the backward of a micro-batch takes about {backward:.2g} s{least}; tried in the next windows"
        )
        return self._suggested, why, False
