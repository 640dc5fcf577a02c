"""BatchNorm layers that know windows: what `convert_batchnorm` makes of torch's, by giving them another class."""

from __future__ import annotations

from enum import Enum
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from distaccum.nn.batch_stats import (
    NormaliseTogether,
    all_reduced,
    blended,
    buffers_of,
    moments_of,
    no_moments,
    normalise,
    running_of,
    statistics,
)


class BatchNormMode(Enum):
    """What BatchNorm layers normalise with while training, and what differs from one big batch.

    * `sync`: the statistics of the micro-batches that all ranks compute in the same round. One big batch exactly where
      a window is one round; otherwise each round is a batch of its own. Two all-reduces a layer and round.
    * `pooled`: the statistics of the micro-batch on this rank, as plain layers do; but the running statistics, with
      which a model is evaluated, are those of the whole window: all micros, all ranks, one update a step, exact for
      the inputs that the layers saw. These inputs were normalised micro by micro, and that is what differs from one
      big batch. One all-reduce a window for all layers together.
    * `frozen`: the running statistics, which never change; weight and bias still train. Exactly one big batch. For
      fine-tuning: they must be those of a trained model.
    * `micro`: layers are left as torch has them. Running statistics then are each rank's own, weigh short micros like
      long ones, and decay K times as fast as with one big batch.
    """

    sync = "sync"
    pooled = "pooled"
    frozen = "frozen"
    micro = "micro"


class Windowed(nn.Module):
    """What is put before a layer's class. Running statistics are written by `PooledStatistics.commit` only."""

    mode = BatchNormMode.pooled
    num_dims: tuple[int, ...]  # of inputs [B, C, ...]
    observing = False  # in a forward of a window; not in one that is repeated for the backward
    counts = True  # whether the samples of this round enter the statistics; a repeated forward finds it as it was
    moments: Tensor | None = None  # [1 + 2C] float64, pooled: of this window on this rank
    pending: tuple[Tensor, ...] | None = None  # sync: running statistics after the rounds so far, float64
    known: tuple[tuple[Tensor, Tensor, Tensor], ...] = ()  # sync: what each forward of this round normalised with
    group: dist.ProcessGroup | None = None  # sync: the ranks that train this model; None: all

    @property
    def plain(self) -> nn.BatchNorm1d:
        """The layer itself, as the type checker knows its fields."""
        return cast(nn.BatchNorm1d, self)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the process group, which cannot be copied: whoever trains a copy sets its own."""
        return {name: value for name, value in self.__dict__.items() if name != "group"}

    def forward(self, input: Tensor) -> Tensor:
        """Normalise [B, C, ...]; the same shape and dtype."""
        layer = self.plain
        if input.ndim not in self.num_dims:
            raise ValueError(f"{type(self).__name__}: an input of {input.ndim} dimensions, expected {self.num_dims}")
        if layer.running_mean is not None and (not self.training or self.mode is BatchNormMode.frozen):
            # Copies: the backward needs them, and buffers may be written in place before it (broadcast, restored).
            mean, var = (buffer.clone() for buffer in buffers_of(layer)[:2])
            return normalise(input, mean, var, layer.weight, layer.bias, layer.eps)
        return self._synced(input) if self.training and self.mode is BatchNormMode.sync else self._pooled(input)

    def _pooled(self, x: Tensor) -> Tensor:
        layer = self.plain
        if self.observing and self.counts and layer.running_mean is not None:
            moments = moments_of(x, layer.running_mean)
            self.moments = moments if self.moments is None else self.moments + moments
        return F.batch_norm(x, None, None, layer.weight, layer.bias, True, 0.0, layer.eps)

    def _synced(self, x: Tensor) -> Tensor:
        # A forward that is repeated for the backward normalises as the first one did, without sending anything. Which
        # one it repeats is certain for layers that ran once; others ask all ranks again.
        repeated = not self.observing and len(self.known) == 1
        mean, var, share = self.known[0] if repeated else self._of_all_ranks(x)
        layer = self.plain
        out: Tensor = NormaliseTogether.apply(x, layer.weight, layer.bias, mean, var, share, layer.eps, self.group)  # type: ignore[no-untyped-call]
        return out

    def _of_all_ranks(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and biased variance [C], and 1 / n, or 0 where the samples of this rank are not among the n."""
        layer = self.plain
        shift = layer.running_mean if layer.running_mean is not None else x.new_zeros(x.shape[1])
        totals = all_reduced(moments_of(x, shift) if self.counts else no_moments(layer, x.device), self.group)
        if self.observing and layer.running_mean is not None:
            self.pending = blended(self.pending or running_of(layer), totals, shift, layer.momentum)
        count, mean, squares = statistics(totals, shift)
        share = 1 / count.clamp(min=1)
        dtype = torch.promote_types(x.dtype, torch.float32)
        known = (mean.to(dtype), (squares * share).to(dtype), share if self.counts else torch.zeros_like(share))
        if self.observing:
            self.known = (*self.known, known)
        return known


class WindowBatchNorm1d(Windowed, nn.BatchNorm1d):
    """A converted nn.BatchNorm1d."""

    num_dims = (2, 3)


class WindowBatchNorm2d(Windowed, nn.BatchNorm2d):
    """A converted nn.BatchNorm2d."""

    num_dims = (4,)


class WindowBatchNorm3d(Windowed, nn.BatchNorm3d):
    """A converted nn.BatchNorm3d."""

    num_dims = (5,)


CONVERTED: dict[type[nn.Module], type[Windowed]] = {
    nn.BatchNorm1d: WindowBatchNorm1d,
    nn.BatchNorm2d: WindowBatchNorm2d,
    nn.BatchNorm3d: WindowBatchNorm3d,
}
LAZY = (nn.LazyBatchNorm1d, nn.LazyBatchNorm2d, nn.LazyBatchNorm3d)
