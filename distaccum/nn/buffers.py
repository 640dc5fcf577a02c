"""Protects and compares buffers of a model, such as BatchNorm's running statistics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Return a context for a forward that must not change any buffer of the model."""
    # Copies replace the buffers inside. If the buffers were restored in place instead, autograd
    # would refuse the backward of operations that saved them.
    own = [
        (m, name, buffer)
        for m in model.modules()
        for name, buffer in m.named_buffers(recurse=False)
    ]
    for module, name, buffer in own:
        setattr(module, name, buffer.clone())
    try:
        yield
    finally:
        for module, name, buffer in own:
            setattr(module, name, buffer)


def same(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors hold the same numbers, where nan equals nan."""
    return one.shape == other.shape and bool(((one == other) | (one.isnan() & other.isnan())).all())
