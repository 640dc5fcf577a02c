"""Defines the BatchNorm layers with a mode that `convert_batchnorm` makes of torch's layers."""

from __future__ import annotations

from enum import Enum
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from distaccum.nn.batch_stats import (
    SyncBatchNormFunction,
    all_reduced,
    batch_sums,
    buffers_of,
    normalise,
    running_of,
    statistics,
    update_running_stats,
    zero_sums,
)


class BatchNormMode(Enum):
    """Selects what BatchNorm layers normalize with while training.

    * `sync`: the statistics of the micro-batches that all ranks compute in the same round. This
      equals one big batch if a window is one round; otherwise each round is a batch of its own. It
      takes two all-reduces per layer and round.
    * `pooled`: the statistics of the micro-batch on this rank, as in plain layers. The running
      statistics, which evaluation uses, are those of the whole window: all micro-batches, all
      ranks, one update per step, exact for the inputs that the layers saw. These inputs were
      normalized micro-batch by micro-batch, which is the difference from one big batch. It takes
      one all-reduce per window for all layers together.
    * `frozen`: the running statistics, which never change; weight and bias still train. This equals
      one big batch. It is for fine-tuning: the statistics must be those of a trained model.
    * `micro_batch`: plain layers of torch. Their running statistics are each rank's own, give short
      micro-batches the same weight as long ones, and decay K times as fast as with one big batch.
    """

    sync = "sync"
    pooled = "pooled"
    frozen = "frozen"
    micro_batch = "micro_batch"


class Windowed(nn.Module):
    """Adds a mode to torch's BatchNorm classes; converted classes inherit from it first.

    Only `PooledStatistics.commit` writes running statistics.
    """

    mode = BatchNormMode.pooled
    num_dims: tuple[int, ...]  # the allowed numbers of dimensions of inputs [B, C, ...]
    observing = False  # True in a forward of a window, but not in one that the backward repeats
    # Whether this round's samples enter the statistics. A repeated forward finds the same value.
    counts = True
    moments: Tensor | None = None  # pooled: [1 + 2C] float64 sums of this window on this rank
    # sync: running statistics after the rounds so far, float64
    pending: tuple[Tensor, ...] | None = None
    # sync: mean, variance and share that each forward of this round used
    known: tuple[tuple[Tensor, Tensor, Tensor], ...] = ()
    group: dist.ProcessGroup | None = None  # sync: the ranks that train this model; None: all

    @property
    def plain(self) -> nn.BatchNorm1d:
        """Return the layer itself, typed as the BatchNorm layer that it is."""
        return cast(nn.BatchNorm1d, self)

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes to copy, without the process group, which cannot be copied.

        The accumulator that trains a copy sets the copy's group.
        """
        return {name: value for name, value in self.__dict__.items() if name != "group"}

    def forward(self, input: Tensor) -> Tensor:
        """Normalize an input [B, C, ...]; the output has its shape and dtype.

        Raises:
            ValueError: for an input with a wrong number of dimensions.
        """
        layer = self.plain
        if input.ndim not in self.num_dims:
            raise ValueError(
                f"{type(self).__name__} got an input of {input.ndim} dimensions. Give it an input "
                f"[B, C, ...] of {' or '.join(map(str, self.num_dims))} dimensions."
            )
        if layer.running_mean is not None and (
            not self.training or self.mode is BatchNormMode.frozen
        ):
            # Copies, because the backward needs them, and buffers may be written in place before it
            # (broadcast or restored).
            mean, var = (buffer.clone() for buffer in buffers_of(layer)[:2])
            return normalise(input, mean, var, layer.weight, layer.bias, layer.eps)
        return (
            self._synced(input)
            if self.training and self.mode is BatchNormMode.sync
            else self._pooled(input)
        )

    def _pooled(self, x: Tensor) -> Tensor:
        layer = self.plain
        if self.observing and self.counts and layer.running_mean is not None:
            moments = batch_sums(x, layer.running_mean)
            self.moments = moments if self.moments is None else self.moments + moments
        return F.batch_norm(x, None, None, layer.weight, layer.bias, True, 0.0, layer.eps)

    def _synced(self, x: Tensor) -> Tensor:
        # A forward that the backward repeats normalizes like the first one and sends nothing. Which
        # forward it repeats is only certain for layers that ran once; others communicate again.
        repeated = not self.observing and len(self.known) == 1
        mean, var, share = self.known[0] if repeated else self._of_all_ranks(x)
        layer = self.plain
        out: Tensor = SyncBatchNormFunction.apply(
            x, layer.weight, layer.bias, mean, var, share, layer.eps, self.group
        )  # type: ignore[no-untyped-call]
        return out

    def _of_all_ranks(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return mean [C], biased variance [C] and share [] over the samples of all ranks.

        The share is 1 / n for n samples per channel, or 0 if this rank's samples are not among
        them.
        """
        layer = self.plain
        shift = layer.running_mean if layer.running_mean is not None else x.new_zeros(x.shape[1])
        totals = all_reduced(
            batch_sums(x, shift) if self.counts else zero_sums(layer, x.device), self.group
        )
        if self.observing and layer.running_mean is not None:
            self.pending = update_running_stats(
                self.pending or running_of(layer), totals, shift, layer.momentum
            )
        count, mean, squares = statistics(totals, shift)
        share = 1 / count.clamp(min=1)
        dtype = torch.promote_types(x.dtype, torch.float32)
        known = (
            mean.to(dtype),
            (squares * share).to(dtype),
            share if self.counts else torch.zeros_like(share),
        )
        if self.observing:
            self.known = (*self.known, known)
        return known


class WindowBatchNorm1d(Windowed, nn.BatchNorm1d):
    """Replaces the class of a converted nn.BatchNorm1d."""

    num_dims = (2, 3)


class WindowBatchNorm2d(Windowed, nn.BatchNorm2d):
    """Replaces the class of a converted nn.BatchNorm2d."""

    num_dims = (4,)


class WindowBatchNorm3d(Windowed, nn.BatchNorm3d):
    """Replaces the class of a converted nn.BatchNorm3d."""

    num_dims = (5,)


CONVERTED: dict[type[nn.Module], type[Windowed]] = {
    nn.BatchNorm1d: WindowBatchNorm1d,
    nn.BatchNorm2d: WindowBatchNorm2d,
    nn.BatchNorm3d: WindowBatchNorm3d,
}
LAZY = (nn.LazyBatchNorm1d, nn.LazyBatchNorm2d, nn.LazyBatchNorm3d)
