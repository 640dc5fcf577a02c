"""Errors that say that memory was short: torch has a class of its own for some of them, and texts for others."""

from __future__ import annotations

import torch

# What torch, CUDA and NCCL say when memory is short and the error is not torch's own class. Texts, for want of types.
_SHORT = ("out of memory", "can't allocate memory", "not enough memory", "cublas_status_alloc_failed")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory was short, on a device or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _SHORT)
