"""The norm of complete gradients, and clipping by it."""

from __future__ import annotations

import torch
from torch import Tensor

from distaccum.core.loss import widened


@torch.no_grad()
def squared_norm(gradients: list[Tensor], device: torch.device) -> Tensor:
    """The squared L2 norm [] float64 of plain local gradients, summed within a gradient in float32 or wider."""
    if not gradients:
        return torch.zeros((), dtype=torch.float64, device=device)
    if device.type == "cpu":
        # Sums are added in a tree; norms are not on a CPU, and in float32 are off by 1e-5 for a large matrix.
        squares = [widened(g).square().sum() for g in gradients]
        return torch.stack(squares).double().sum()
    wide = torch.float64 if any(g.dtype is torch.float64 for g in gradients) else torch.float32
    return torch.stack(torch._foreach_norm(gradients, 2, dtype=wide)).double().square().sum()


@torch.no_grad()
def clip(gradients: list[Tensor], norm: float, clip_norm: float) -> None:
    """Scale gradients in place so that a larger norm becomes `clip_norm`; the formula of torch's clip_grad_norm_."""
    factor = clip_norm / (norm + 1e-6)
    if factor < 1.0:
        torch._foreach_mul_(gradients, factor)
