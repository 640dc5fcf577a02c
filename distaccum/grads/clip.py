"""Computes the norm of complete gradients and clips gradients by it."""

from __future__ import annotations

import torch
from torch import Tensor

from distaccum.core.loss import widened


@torch.no_grad()
def squared_norm(gradients: list[Tensor], device: torch.device) -> Tensor:
    """Return the squared L2 norm of gradients.

    The squares within each gradient are summed in float32 or wider.

    Args:
        gradients: this rank's gradients or shards of them, as plain tensors.
        device: where the gradients are.

    Returns:
        A scalar [] float64 on the device; 0 if there are no gradients.
    """
    if not gradients:
        return torch.zeros((), dtype=torch.float64, device=device)
    if device.type == "cpu":
        # On a CPU sum() adds in a tree, but a norm does not: in float32 it is off by 1e-5 for a
        # large matrix.
        squares = [widened(g).square().sum() for g in gradients]
        return torch.stack(squares).double().sum()
    wide = torch.float64 if any(g.dtype is torch.float64 for g in gradients) else torch.float32
    return torch.stack(torch._foreach_norm(gradients, 2, dtype=wide)).double().square().sum()


@torch.no_grad()
def clip(gradients: list[Tensor], norm: float, clip_norm: float) -> None:
    """Scale gradients in place so that their norm is at most `clip_norm`.

    The factor is clip_norm / (norm + 1e-6), as in torch.nn.utils.clip_grad_norm_.

    Args:
        gradients: this rank's gradients or shards of them, as plain tensors.
        norm: the L2 norm of the complete gradient, over all ranks.
        clip_norm: the largest norm allowed.
    """
    factor = clip_norm / (norm + 1e-6)
    if factor < 1.0:
        torch._foreach_mul_(gradients, factor)
