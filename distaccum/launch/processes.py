"""Ties processes to the one that started them: their end, and the signals that it gets."""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
_AGAIN_S = 0.1


def tie_to_parent(parent: int | None = None) -> None:
    """Let the kernel end this process when its parent dies, so that none is orphaned. Linux only.

    Args:
        parent: The parent's process id. If the parent has already died, this process exits at once.
            None, for an unknown id, skips that check; the next exchange with the parent fails then.
    """
    if sys.platform != "linux":
        return
    pr_set_pdeathsig = 1
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL, 0, 0, 0)
    if parent is not None and os.getppid() != parent:
        os._exit(1)


@contextlib.contextmanager
def signals_forwarded() -> Iterator[list[int]]:
    """Forward signals to all processes that `multiprocessing` has started from here.

    Inside the context, the processes may take the time they need: a training saves and exits with
    code 0, and a process without a handler is ended by the signal. A signal that comes before there
    is such a process waits for one, because an exception in the middle of its start would leave it
    half made. After an earlier signal has ended all processes, a later one has no effect.

    Yields:
        The signals received so far, in their order.
    """
    came: list[int] = []

    def forward(number: int, _: FrameType | None) -> None:
        children = multiprocessing.active_children()
        if children:
            came.append(number)
        elif not came:
            again = threading.Timer(_AGAIN_S, os.kill, (os.getpid(), number))
            again.daemon = True
            again.start()
        for child in children:
            assert child.pid is not None
            with contextlib.suppress(ProcessLookupError):
                os.kill(child.pid, number)

    before = {number: signal.signal(number, forward) for number in SIGNALS}
    try:
        yield came
    finally:
        for number, handler in before.items():
            ends = handler in (signal.SIG_DFL, signal.default_int_handler)
            # After a signal came, the process is already ending cleanly.
            signal.signal(number, signal.SIG_IGN if came and ends else handler)
