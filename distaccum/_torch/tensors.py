"""Uses private names of torch's tensors and autograd."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn


def has_hooks(parameters: Iterable[nn.Parameter]) -> bool:
    """Return whether a trained parameter has hooks, which tensors keep in private attributes."""
    return any(
        p.requires_grad and (p._backward_hooks or p._post_accumulate_grad_hooks) for p in parameters
    )


def fake_tensors() -> AbstractContextManager[Any]:
    """Return a context in which new tensors have no memory but behave like their device's tensors.

    Public meta tensors do not: they ignore autocast and fused attention.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode()


@contextmanager
def storage_resizes(seen: Callable[[torch.UntypedStorage], None]) -> Iterator[None]:
    """Report each storage that is resized from Python while the context is entered.

    FSDP2 resizes storages, and no operator shows it.

    Args:
        seen: called with each storage after it was resized.
    """
    resize = torch.UntypedStorage.resize_

    def resize_and_report(storage: torch.UntypedStorage, *size: Any) -> Any:
        result = resize(storage, *size)
        seen(storage)
        return result

    torch.UntypedStorage.resize_ = resize_and_report  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]
