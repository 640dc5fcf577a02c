"""Uses private names of torch's tensors and autograd."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def has_hooks(parameters: Iterable[nn.Parameter]) -> bool:
    """Return whether a trained parameter has hooks, which tensors keep in private attributes."""
    return any(
        p.requires_grad and (p._backward_hooks or p._post_accumulate_grad_hooks) for p in parameters
    )


def backward(roots: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    """Run the backward from several tensors; what it sends holds no Python object.

    torch.autograd.backward stores a Python object (its context) for backward threads, and every
    collective that starts inside keeps it. Gloo's own thread drops it afterwards. If the
    interpreter ends at that moment, the process aborts ("terminate called without an active
    exception"). On a CPU the backward runs on this thread, so that the engine is called without.

    Args:
        roots: the tensors to differentiate.
        gradients: their gradients, of the same shapes; None only for what needs none.
    """
    if any(root.device.type != "cpu" for root in roots):
        torch.autograd.backward(roots, gradients)
        return
    torch.autograd.Variable._execution_engine.run_backward(
        tuple(roots),
        tuple(gradients),
        False,
        False,
        (),
        allow_unreachable=True,
        accumulate_grad=True,
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
