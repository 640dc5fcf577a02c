"""The norm of complete gradients, and clipping by it."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def squared_norm(gradients: list[Tensor], device: torch.device) -> Tensor:
    """The squared L2 norm [] float64 of plain local gradients; on a GPU summed in float32 within a gradient.

    A GPU adds in a tree; a CPU one after the other, and in float32 would be off by 1e-5 for a large matrix.
    """
    if not gradients:
        return torch.zeros((), dtype=torch.float64, device=device)
    exact = device.type == "cpu" or any(gradient.dtype is torch.float64 for gradient in gradients)
    wide = torch.float64 if exact else torch.float32
    return torch.stack(torch._foreach_norm(gradients, 2, dtype=wide)).double().square().sum()


@torch.no_grad()
def clip(gradients: list[Tensor], norm: float, clip_norm: float) -> None:
    """Scale gradients in place so that a larger norm becomes `clip_norm`; the formula of torch's clip_grad_norm_."""
    factor = clip_norm / (norm + 1e-6)
    if factor < 1.0:
        torch._foreach_mul_(gradients, factor)
