"""Forwards signals from a process to the processes that it has started.

The started processes know how to react to them.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
_AGAIN_S = 0.1


@contextlib.contextmanager
def signals_forwarded() -> Iterator[list[int]]:
    """Forward signals to all processes that `multiprocessing` has started from here.

    Inside the context, the processes may take the time they need: a training saves and exits with
    code 0, and a process without a handler is ended by the signal. A signal that comes before such
    a process exists is held back until one does, because an exception while a process is being
    started would leave it half made. After an earlier signal has ended all processes, a later one
    has no effect.

    Yields:
        The signals received so far, in their order.
    """
    came: list[int] = []

    def forward(number: int, _: FrameType | None) -> None:
        children = multiprocessing.active_children()
        if not children and came:
            return
        if not children:
            again = threading.Timer(_AGAIN_S, os.kill, (os.getpid(), number))
            again.daemon = True
            again.start()
            return
        came.append(number)
        for child in children:
            assert child.pid is not None
            with contextlib.suppress(ProcessLookupError):
                os.kill(child.pid, number)

    before = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        yield came
    finally:
        for number, handler in before.items():
            ends = handler in (signal.SIG_DFL, signal.default_int_handler)
            # After a signal came, the process is already ending cleanly.
            signal.signal(number, signal.SIG_IGN if came and ends else handler)
