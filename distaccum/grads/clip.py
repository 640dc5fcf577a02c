"""The norm of complete gradients, and clipping by it, on plain tensors and DTensors."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


@torch.no_grad()
def squared_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """This rank's share [] float64 of the squared L2 norm of all gradients; the shares of all ranks add up to it.

    A plain gradient is whole on its rank and counts whole. Of a DTensor the local shard counts, divided by the number
    of its replicas (HSDP), each of which holds it.
    """
    local: dict[int, list[Tensor]] = {}  # gradients by number of replicas
    device = torch.device("cpu")
    for parameter in parameters:
        device = parameter.device
        grad = parameter.grad
        if grad is None:
            continue
        replicas = 1
        if isinstance(grad, DTensor):
            for dimension, placement in enumerate(grad.placements):
                if placement.is_replicate():
                    replicas *= grad.device_mesh.size(dimension)
            grad = grad.to_local()
        local.setdefault(replicas, []).append(grad)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for replicas, grads in local.items():
        norms = torch.stack(torch._foreach_norm(grads, 2, dtype=_norm_dtype(grads)))
        total = total + norms.double().square().sum() / replicas
    return total


@torch.no_grad()
def clip(parameters: Iterable[nn.Parameter], norm: float, clip_norm: float) -> None:
    """Scale all gradients in place so that their norm is at most `clip_norm`, by the formula of clip_grad_norm_."""
    factor = clip_norm / (norm + 1e-6)
    if factor >= 1.0:
        return
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    torch._foreach_mul_([g.to_local() if isinstance(g, DTensor) else g for g in grads], factor)


def _norm_dtype(grads: list[Tensor]) -> torch.dtype:
    """Float64 stays; anything else is summed in float32."""
    return torch.float64 if any(grad.dtype is torch.float64 for grad in grads) else torch.float32
