"""Signals to a process that has started others: they are for those, which know what to do with them."""

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
    """Meanwhile signals go to all processes that `multiprocessing` has started from here, which may take their time.

    A training saves and ends with exit code 0; what has no handler is ended by the signal. Before there is such a
    process a signal waits for it, as an exception in the middle of its start would leave it half made. After an earlier
    signal has ended them all, a further one has nothing to do.

    Yields:
        The signals that came, in their order.
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
            signal.signal(number, signal.SIG_IGN if came and ends else handler)  # the process ends well already
