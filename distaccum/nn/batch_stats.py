"""Sums of a BatchNorm's inputs that add up over micro-batches and ranks, what they say, and normalising with it."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def moments_of(x: Tensor, shift: Tensor) -> Tensor:
    """[1 + 2C] float64 of an input [B, C, ...]: the count n in a channel, sum(x - shift), sum((x - shift)^2).

    They add up over micros and ranks. A shift [C] near the mean, equal on all ranks, keeps the difference of squares in
    `statistics` from cancelling; what float64 loses with a bad one is still far below a float32.
    """
    centred = x.detach().double() - shift.double().view(_along_channels(x))
    count = centred.new_full((1,), x.numel() // x.shape[1])
    return torch.cat([count, centred.sum(_other_dims(x)), centred.square().sum(_other_dims(x))])


def width(layer: nn.BatchNorm1d) -> int:
    """How many numbers the moments of a layer are: 1 + 2C."""
    return 1 + 2 * layer.num_features


def no_moments(layer: nn.BatchNorm1d, device: torch.device) -> Tensor:
    """The moments of no samples."""
    return torch.zeros(width(layer), dtype=torch.float64, device=device)


def statistics(moments: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The count [], the mean [C] and the sum of squares around it [C], float64. Of nothing: 0, the shift, 0."""
    count, (first, second) = moments[0], moments[1:].view(2, -1)
    offset = first / count.clamp(min=1)
    return count, shift.double() + offset, (second - first * offset).clamp(min=0)


def buffers_of(layer: nn.BatchNorm1d) -> tuple[Tensor, ...]:
    """Running mean, running variance and number of batches; none of them where the layer does not keep them."""
    return tuple(b for b in (layer.running_mean, layer.running_var, layer.num_batches_tracked) if b is not None)


def running_of(layer: nn.BatchNorm1d) -> tuple[Tensor, ...]:
    """The same in float64."""
    return tuple(buffer.double() for buffer in buffers_of(layer))


def blended(
    running: tuple[Tensor, ...], moments: Tensor, shift: Tensor, momentum: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The running mean, unbiased variance and number of batches after one batch more, float64; nothing adds nothing.

    Args:
        running: the same before it, float64.
        moments: [1 + 2C] of the batch.
        shift: [C] that they are relative to.
        momentum: the weight of the new batch; None: the mean of all batches so far, as torch has it.
    """
    mean, var, batches = running
    count, new_mean, squares = statistics(moments, shift)
    some = (count > 0).double()
    batches = batches + some
    factor = some / batches.clamp(min=1) if momentum is None else some * momentum
    new_var = squares / (count - 1).clamp(min=1)
    return (1 - factor) * mean + factor * new_mean, (1 - factor) * var + factor * new_var, batches


def normalise(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias, with everything but x in the dtype of the mean."""
    weight, bias = (None if p is None else p.to(mean.dtype) for p in (weight, bias))
    return F.batch_norm(x, mean, var, weight, bias, training=False, eps=eps)


class NormaliseTogether(torch.autograd.Function):
    """`normalise` whose backward knows that the statistics came from the inputs of all ranks.

    Ioffe and Szegedy, "Batch Normalization" (2015), section 3: with z = (x - mean) / std and g the gradient of
    weight z + bias, that of x is weight / std (g - sum(g) / n - z sum(g z) / n); sums and n are over all ranks.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,  # [C] float32 or wider, over all ranks
        var: Tensor,  # [C] likewise, biased
        share: Tensor,  # [] float64: 1 / n, or 0 where the samples of this rank did not enter mean and var
        eps: float,
        group: dist.ProcessGroup | None,  # in which mean and var were taken
    ) -> Tensor:
        """Normalise without communication."""
        ctx.group = group
        ctx.save_for_backward(x, weight, mean, (var + eps).rsqrt(), share)
        return normalise(x, mean, var, weight, bias, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """One all-reduce on every rank of the group, whichever gradients are asked for here."""
        x, weight, mean, inverse_std, share = ctx.saved_tensors
        dims, channels = _other_dims(x), _along_channels(x)
        g = gradient.to(mean.dtype)
        z = (x - mean.view(channels)) * inverse_std.view(channels)
        own = torch.stack([g.sum(dims, dtype=torch.float64), (g * z).sum(dims, dtype=torch.float64)])
        mean_g, mean_gz = (all_reduced(own.clone(), ctx.group) * share).to(mean.dtype)
        scale = inverse_std if weight is None else inverse_std * weight.to(mean.dtype)
        dx = (g - mean_g.view(channels) - z * mean_gz.view(channels)) * scale.view(channels)
        dbias, dweight = (None, None) if weight is None else own.to(weight.dtype)
        return dx.to(x.dtype), dweight, dbias, None, None, None, None, None


def several_ranks(group: dist.ProcessGroup | None) -> bool:
    """Whether there is anybody in a group to share statistics with; None: among all ranks."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1


def all_reduced(table: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum over a group (None: all ranks), in place where it serves the table's device. Alone: the table."""
    if not several_ranks(group):
        return table
    group = group or dist.group.WORLD
    assert group is not None
    travelling = table if is_served(group, table.device) else table.cpu()
    dist.all_reduce(travelling, group=group)
    return travelling.to(table.device)


def is_served(group: dist.ProcessGroup, device: torch.device) -> bool:
    """Whether this group has a backend of its own for the device; otherwise the CPU's serves."""
    return f"{device.type}:" in dist.get_backend_config(group)


def _other_dims(x: Tensor) -> list[int]:
    return [dim for dim in range(x.ndim) if dim != 1]


def _along_channels(x: Tensor) -> list[int]:
    return [1, -1] + [1] * (x.ndim - 2)
