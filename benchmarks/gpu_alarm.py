"""Detects host syncs: raises for each, except in the read of a window, where it counts them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from distaccum.parallel.world import PendingRows

SYNC = "synchronizing CUDA operation"


@contextmanager
def alarm() -> Iterator[tuple[Callable[[], None], list[int]]]:
    """Raise for each host sync that torch detects, and count those in `PendingRows.read` instead.

    torch's sync debug mode does not detect waits for an event, nor what NCCL does by itself.

    Yields:
        A function that starts the detection, and a list of the host syncs in each read since then.
    """
    reads: list[int] = []
    original, armed = PendingRows.read, False

    def arm() -> None:
        nonlocal armed
        armed = True
        torch.cuda.set_sync_debug_mode("error")
        try:
            torch.ones(1, device="cuda").item()
        except RuntimeError as error:
            if "synchronizing" not in str(error):
                raise
        else:
            raise AssertionError(
                "torch.cuda.set_sync_debug_mode('error') did not detect .item(), so it cannot "
                "prove anything here"
            )

    def read(self: PendingRows, *others: Tensor) -> Any:
        if not armed:
            return original(self, *others)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                return original(self, *others)
            finally:
                torch.cuda.set_sync_debug_mode("error")
                reads.append(sum(SYNC in str(warning.message) for warning in caught))

    PendingRows.read = read  # type: ignore[method-assign]
    try:
        yield arm, reads
    finally:
        PendingRows.read = original  # type: ignore[method-assign]
        torch.cuda.set_sync_debug_mode("default")


@contextmanager
def counting() -> Iterator[list[warnings.WarningMessage]]:
    """Collect all warnings, including those of host syncs, without raising for any."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield caught
        finally:
            torch.cuda.set_sync_debug_mode("default")
