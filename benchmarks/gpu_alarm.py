"""Host syncs: any that torch knows of raises, but in the one read of a window, where they are counted."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from distaccum.parallel.world import Shared

SYNC = "synchronizing CUDA operation"


@contextmanager
def alarm() -> Iterator[tuple[Callable[[], None], list[int]]]:
    """Any host sync that torch knows of raises, but in `Shared.read`, where they are counted.

    Torch's mode does not see waits for an event, nor what NCCL does by itself.

    Yields:
        What arms it, and the syncs of each read since then.
    """
    reads: list[int] = []
    original, armed = Shared.read, False

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
                "torch.cuda.set_sync_debug_mode('error') did not notice .item(): it would prove nothing"
            )

    def read(self: Shared, *others: Tensor) -> Any:
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

    Shared.read = read  # type: ignore[method-assign]
    try:
        yield arm, reads
    finally:
        Shared.read = original  # type: ignore[method-assign]
        torch.cuda.set_sync_debug_mode("default")


@contextmanager
def counting() -> Iterator[list[warnings.WarningMessage]]:
    """All warnings, those of host syncs among them; nothing raises."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield caught
        finally:
            torch.cuda.set_sync_debug_mode("default")
