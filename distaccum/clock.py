"""How long micros took, without a host sync: on a GPU by events that are read after the boundary."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

Mark = float | torch.cuda.Event


def mark(device: torch.device) -> Mark:
    """The current moment in this device's work."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def exposed_s(began: Sequence[Mark], end: Mark, overlap_micros: int = 1) -> float | None:
    """Seconds that a window waited for communication: how much longer its last micros took than as many of the others.

    The last ones are those that send gradients and wait for other ranks. What hides behind computation is not waited
    for and not counted, nor are FSDP2's gathers in the other micros.

    Args:
        began: the beginning of each micro; passed on the device.
        end: the end of the last one, likewise.
        overlap_micros: how many micros end together.

    Returns:
        None where there is no other micro to compare with.
    """
    others = len(began) - overlap_micros
    if others < 1:
        return None
    mean = seconds_between(began[0], began[others]) / others
    return max(0.0, seconds_between(began[others], end) - overlap_micros * mean)


def seconds_between(first: Mark, second: Mark) -> float:
    """Between two moments that have passed."""
    if isinstance(first, float) and isinstance(second, float):
        return second - first
    assert isinstance(first, torch.cuda.Event)
    assert isinstance(second, torch.cuda.Event)
    return float(first.elapsed_time(second)) / 1000.0
