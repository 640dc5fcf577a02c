"""Records that this rank should stop, because a signal came or its time limit has passed.

Signal handlers only set a flag, which is read at the end of each window.
"""

from __future__ import annotations

import os
import signal
import time
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
# SIGINTs within this time count as one Ctrl-C: a terminal signals all processes, a launcher signals
# its ranks once more, and a person may press twice by mistake.
_ONE_SIGNAL_S = 2.0


class Preemption:
    """Catches stop signals during a training; enter it in the main thread.

    Nothing is saved in a signal handler: the trainer reads `reason` at each boundary. A second
    Ctrl-C ends the process at once. Other signals come from a scheduler, which may repeat them and
    may announce its time limit with one signal and then another. Any number of them leaves the run
    the time to save that the scheduler grants.
    """

    def __init__(self, max_minutes: float | None, *, announce: bool = False) -> None:
        """Start the clock.

        Args:
            max_minutes: the time after which the run stops; None sets no limit.
            announce: whether to print a line at once on Ctrl-C, because a person is waiting and a
                window may take long.
        """
        self._max_minutes = max_minutes
        self._until = None if max_minutes is None else time.monotonic() + 60 * max_minutes
        self._announce = announce
        self._process = os.getpid()
        self._first: signal.Signals | None = None
        self._interrupted_at: float | None = None  # time of the first SIGINT, monotonic seconds
        self._before: dict[signal.Signals, Any] = {}

    @property
    def reason(self) -> str | None:
        """Return the reason to stop at the next boundary, or None to continue."""
        if self._first is not None:
            return self._first.name
        if self._until is not None and time.monotonic() >= self._until:
            return f"train.max_minutes={self._max_minutes:g}"
        return None

    def __enter__(self) -> Preemption:
        self._before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        if self._first is not None:
            return  # the process is about to end, and a late signal must not interrupt that
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if os.getpid() != self._process:  # a forked loader worker, which ends with this process
            return
        self._first = self._first or signal.Signals(number)
        if number != signal.SIGINT:
            return
        now = time.monotonic()
        if self._interrupted_at is None:
            self._interrupted_at = now
            if self._announce:
                # Not print(): the interrupted code may be inside print() itself.
                os.write(
                    2,
                    b"Interrupted: saving and stopping after this step. Press Ctrl-C again to stop"
                    b" at once.\n",
                )
        elif now - self._interrupted_at > _ONE_SIGNAL_S:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
