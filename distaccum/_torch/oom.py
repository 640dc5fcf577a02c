"""Out-of-memory errors: torch has a class for some of them, the others are known by their text."""

from __future__ import annotations

import torch

# What torch, CUDA and NCCL say when memory is short and the error is none of torch's own class.
_SHORT = ("out of memory", "can't allocate memory", "not enough memory", "cublas_status_alloc_failed")


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error means out of memory, on a device or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _SHORT)
