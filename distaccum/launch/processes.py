"""How a process that we start depends on the one that started it."""

import ctypes
import os
import signal
import sys


def tie_to_parent(parent: int | None = None) -> None:
    """Let the kernel end this process when its parent dies, so that a killed one leaves no orphan. Linux only.

    Args:
        parent: the parent's process id where it is known; if the parent has died already, this process leaves at
            once. Where it is not known, what it has to do with the parent soon shows the same.
    """
    if sys.platform != "linux":
        return
    pr_set_pdeathsig = 1
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL, 0, 0, 0)
    if parent is not None and os.getppid() != parent:
        os._exit(1)
