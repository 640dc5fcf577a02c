"""Ties a process that we start to the process that started it."""

import ctypes
import os
import signal
import sys


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
