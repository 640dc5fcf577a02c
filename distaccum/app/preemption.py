"""Whether this rank wants the run to stop: a signal came, or its time is over. A handler only sets a flag."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
# A terminal signals all processes at once, a launcher its ranks once more, and a finger slips: within this time it is
# one Ctrl-C.
_ONE_SIGNAL_S = 2.0


class Preemption:
    """Enter it around a training, in the main thread. The boundary asks `reason`; nothing is saved in a handler.

    A second Ctrl-C ends the process at once. Other signals are a scheduler's, which repeats them and announces its
    limit by one and then by another: however many come, the run has the time to save that the scheduler gives it.
    """

    def __init__(self, max_minutes: float | None, *, tell: bool = False) -> None:
        """Start the clock.

        Args:
            max_minutes: after how long the run stops; None: it does not.
            tell: whether to answer Ctrl-C with a line at once: a person waits, and a window may take long.
        """
        self._max_minutes = max_minutes
        self._until = None if max_minutes is None else time.monotonic() + 60 * max_minutes
        self._tell = tell
        self._process = os.getpid()
        self._first: signal.Signals | None = None
        self._interrupted_at: float | None = None  # by the first SIGINT
        self._before: dict[signal.Signals, Any] = {}

    @property
    def reason(self) -> str | None:
        """Why to stop at the next boundary; None: go on."""
        if self._first is not None:
            return self._first.name
        if self._until is not None and time.monotonic() >= self._until:
            return f"train.max_minutes={self._max_minutes:g}"
        return None

    def __enter__(self) -> Preemption:
        self._before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._first is not None:
            return  # the process is about to end, and what may still come is no reason to end it half-way
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if os.getpid() != self._process:  # a forked worker of the loader, which ends with this process
            return
        self._first = self._first or signal.Signals(number)
        if number != signal.SIGINT:
            return
        now = time.monotonic()
        if self._interrupted_at is None:
            self._interrupted_at = now
            if self._tell:
                # print() may be at work in the very code that was interrupted.
                os.write(2, b"interrupted: saving and stopping after this step; again to stop at once\n")
        elif now - self._interrupted_at > _ONE_SIGNAL_S:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
