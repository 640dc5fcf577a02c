"""Uses of names that torch keeps private about tensors and autograd."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def has_hooks(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether a trained parameter has hooks of its user; tensors keep them in private attributes."""
    return any(p.requires_grad and (p._backward_hooks or p._post_accumulate_grad_hooks) for p in parameters)


def backward(root: Tensor, gradient: Tensor) -> None:
    """What `torch.autograd.backward(root, gradient)` does, for a gradient of the root's shape.

    The public function checks in Python what is right by construction here; on a small micro-batch that takes as long
    as a fifth of all its work.
    """
    torch.autograd.Variable._execution_engine.run_backward(
        (root,), (gradient,), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


def weightless() -> AbstractContextManager[Any]:
    """Tensors made inside have no memory and behave like their device's.

    Public meta tensors do not: they ignore autocast and fused attention.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode()


@contextmanager
def storage_resizes(seen: Callable[[torch.UntypedStorage], None]) -> Iterator[None]:
    """Tell of each storage that is resized from Python while it is entered: no operator does, and FSDP2 does it."""
    resize = torch.UntypedStorage.resize_

    def told(storage: torch.UntypedStorage, *size: Any) -> Any:
        result = resize(storage, *size)
        seen(storage)
        return result

    torch.UntypedStorage.resize_ = told  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]
