"""Buffers of a model, such as BatchNorm's running statistics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Enter around a forward that must leave no trace in any buffer."""
    # Copies stand in: written back in place, buffers that the backward needs would be refused by autograd.
    own = [(m, name, buffer) for m in model.modules() for name, buffer in m.named_buffers(recurse=False)]
    for module, name, buffer in own:
        setattr(module, name, buffer.clone())
    try:
        yield
    finally:
        for module, name, buffer in own:
            setattr(module, name, buffer)


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same numbers; nan is nan."""
    return one.shape == other.shape and bool(((one == other) | (one.isnan() & other.isnan())).all())
