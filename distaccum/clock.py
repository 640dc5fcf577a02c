"""How long micros took, without a host sync: on a GPU by events that are read after the boundary."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise

import torch

Mark = float | torch.cuda.Event


def mark(device: torch.device) -> Mark:
    """The current moment in this device's work."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def exposed_s(marks: Sequence[Mark]) -> float | None:
    """Seconds that a window waited for communication: how much longer its last micro took than the mean of the others.

    The last micro is the one that sends gradients and waits for other ranks. What hides behind computation is not
    waited for and not counted, nor are FSDP2's gathers in the other micros.

    Args:
        marks: the beginning of each micro and the end of the last one; all passed on the device.

    Returns:
        None where a window has one micro, so that there is nothing to compare with.
    """
    seconds = [_between(a, b) for a, b in pairwise(marks)]
    if len(seconds) < 2:
        return None
    return max(0.0, seconds[-1] - sum(seconds[:-1]) / (len(seconds) - 1))


def _between(first: Mark, second: Mark) -> float:
    if isinstance(first, float) and isinstance(second, float):
        return second - first
    assert isinstance(first, torch.cuda.Event)
    assert isinstance(second, torch.cuda.Event)
    return float(first.elapsed_time(second)) / 1000.0
