"""Computes BatchNorm statistics from sums that add up over micro-batches and ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def batch_sums(x: Tensor, shift: Tensor) -> Tensor:
    """Compute the sums from which the mean and variance of a BatchNorm input follow.

    The sums of several micro-batches and ranks can be added. A shift near the mean keeps the
    difference of squares in `statistics` from cancelling. What float64 loses with a bad shift is
    still far below the precision of float32.

    Args:
        x: the input [B, C, ...].
        shift: [C], equal on all ranks.

    Returns:
        [1 + 2C] float64: the number of values in a channel, sum(x - shift) and sum((x - shift)^2).
    """
    centred = x.detach().double() - shift.double().view(_along_channels(x))
    count = centred.new_full((1,), x.numel() // x.shape[1])
    return torch.cat([count, centred.sum(_other_dims(x)), centred.square().sum(_other_dims(x))])


def width(layer: nn.BatchNorm1d) -> int:
    """Return how many numbers `batch_sums` computes for a layer: 1 + 2C."""
    return 1 + 2 * layer.num_features


def zero_sums(layer: nn.BatchNorm1d, device: torch.device) -> Tensor:
    """Return the sums of an empty batch: zeros [1 + 2C] float64."""
    return torch.zeros(width(layer), dtype=torch.float64, device=device)


def statistics(moments: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return count [], mean [C] and sum of squares around the mean [C] in float64.

    For an empty batch these are 0, the shift and 0.

    Args:
        moments: [1 + 2C], from `batch_sums`.
        shift: [C] that the sums are relative to.
    """
    count, (first, second) = moments[0], moments[1:].view(2, -1)
    offset = first / count.clamp(min=1)
    return count, shift.double() + offset, (second - first * offset).clamp(min=0)


def buffers_of(layer: nn.BatchNorm1d) -> tuple[Tensor, ...]:
    """Return a layer's running mean, running variance and number of batches.

    The result is empty if the layer does not keep running statistics.
    """
    return tuple(
        b
        for b in (layer.running_mean, layer.running_var, layer.num_batches_tracked)
        if b is not None
    )


def running_of(layer: nn.BatchNorm1d) -> tuple[Tensor, ...]:
    """Return a layer's running mean, running variance and number of batches in float64.

    The result is empty if the layer does not keep running statistics.
    """
    return tuple(buffer.double() for buffer in buffers_of(layer))


def update_running_stats(
    running: tuple[Tensor, ...], moments: Tensor, shift: Tensor, momentum: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the running statistics after one more batch; an empty batch changes nothing.

    Args:
        running: running mean [C], running variance [C] and number of batches [] so far, float64.
        moments: [1 + 2C] of the new batch, from `batch_sums`.
        shift: [C] that they are relative to.
        momentum: the weight of the new batch; None: all batches so far have equal weight, as in
            torch.

    Returns:
        The new running mean [C], unbiased running variance [C] and number of batches [], float64.
    """
    mean, var, batches = running
    count, new_mean, squares = statistics(moments, shift)
    some = (count > 0).double()
    batches = batches + some
    factor = some / batches.clamp(min=1) if momentum is None else some * momentum
    new_var = squares / (count - 1).clamp(min=1)
    return (1 - factor) * mean + factor * new_mean, (1 - factor) * var + factor * new_var, batches


def normalise(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Return (x - mean) / sqrt(var + eps) * weight + bias.

    `weight` and `bias` are cast to the dtype of `mean`; `x` keeps its own.
    """
    weight, bias = (None if p is None else p.to(mean.dtype) for p in (weight, bias))
    return F.batch_norm(x, mean, var, weight, bias, training=False, eps=eps)


class SyncBatchNormFunction(torch.autograd.Function):
    """Normalizes with statistics of all ranks, and differentiates through them.

    The forward is `normalise`. The backward takes into account that the statistics depend on the
    inputs of all ranks. Ioffe and Szegedy, "Batch Normalization" (2015), section 3, with sums and n
    over all ranks:

        z = (x - mean) / std
        dx = weight / std * (g - sum(g) / n - z * sum(g * z) / n)

    Here g is the gradient of weight * z + bias, and dx is that of x.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,  # [C] float32 or wider, over all ranks
        var: Tensor,  # [C] float32 or wider, over all ranks, biased
        share: Tensor,  # [] float64: 1 / n, or 0 if mean and var do not include this rank's samples
        eps: float,
        group: dist.ProcessGroup | None,  # the ranks over which mean and var were taken
    ) -> Tensor:
        """Normalize x [B, C, ...] without communication."""
        ctx.group = group
        ctx.save_for_backward(x, weight, mean, (var + eps).rsqrt(), share)
        return normalise(x, mean, var, weight, bias, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients of x, weight and bias with one all-reduce.

        Every rank of the group takes part in it, whichever gradients it needs.
        """
        x, weight, mean, inverse_std, share = ctx.saved_tensors
        dims, channels = _other_dims(x), _along_channels(x)
        g = gradient.to(mean.dtype)
        z = (x - mean.view(channels)) * inverse_std.view(channels)
        own = torch.stack(
            [g.sum(dims, dtype=torch.float64), (g * z).sum(dims, dtype=torch.float64)]
        )
        mean_g, mean_gz = (all_reduced(own.clone(), ctx.group) * share).to(mean.dtype)
        scale = inverse_std if weight is None else inverse_std * weight.to(mean.dtype)
        dx = (g - mean_g.view(channels) - z * mean_gz.view(channels)) * scale.view(channels)
        dbias, dweight = (None, None) if weight is None else own.to(weight.dtype)
        return dx.to(x.dtype), dweight, dbias, None, None, None, None, None


def several_ranks(group: dist.ProcessGroup | None) -> bool:
    """Return whether a process group (None: all ranks) has more than one rank."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1


def all_reduced(table: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Return the sum of a table over a process group (None: all ranks).

    The sum is taken in place if the group has a backend for the table's device, and in a copy on
    the CPU otherwise. On a single rank the table itself is returned.
    """
    if not several_ranks(group):
        return table
    group = group or dist.group.WORLD
    assert group is not None
    travelling = table if is_served(group, table.device) else table.cpu()
    dist.all_reduce(travelling, group=group)
    return travelling.to(table.device)


def is_served(group: dist.ProcessGroup, device: torch.device) -> bool:
    """Return whether a process group has a backend for this device.

    Otherwise its backend for the CPU is used.
    """
    return f"{device.type}:" in dist.get_backend_config(group)


def _other_dims(x: Tensor) -> list[int]:
    return [dim for dim in range(x.ndim) if dim != 1]


def _along_channels(x: Tensor) -> list[int]:
    return [1, -1] + [1] * (x.ndim - 2)
