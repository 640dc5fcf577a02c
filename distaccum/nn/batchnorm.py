"""BatchNorm under accumulation: which samples its statistics are taken over, and when running statistics are written.

Gradients of K micro-batches on R ranks add up to those of one big batch; the statistics of BatchNorm do not, as each
forward sees one micro-batch of one rank. A mode says what is done about it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from enum import Enum
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from distaccum.errors import ConfigError
from distaccum.nn.moments import (
    NormaliseTogether,
    all_reduced,
    blended,
    buffers_of,
    is_served,
    moments_of,
    no_moments,
    normalise,
    running_of,
    several_ranks,
    statistics,
    width,
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


class _Windowed(nn.Module):
    """What is put before a layer's class. Running statistics are written by `PooledStatistics.commit` only."""

    mode = BatchNormMode.pooled
    num_dims: tuple[int, ...]  # of inputs [B, C, ...]
    observing = False  # in a forward of a window; not in one that is repeated for the backward
    counts = True  # whether the samples of this round enter the statistics; a repeated forward finds it as it was
    moments: Tensor | None = None  # [1 + 2C] float64, pooled: of this window on this rank
    pending: tuple[Tensor, ...] | None = None  # sync: running statistics after the rounds so far, float64
    known: tuple[tuple[Tensor, Tensor, Tensor], ...] = ()  # sync: what each forward of this round normalised with

    @property
    def plain(self) -> nn.BatchNorm1d:
        return cast(nn.BatchNorm1d, self)  # the same layer, as the type checker knows its fields

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
        out: Tensor = NormaliseTogether.apply(x, layer.weight, layer.bias, mean, var, share, layer.eps)  # type: ignore[no-untyped-call]
        return out

    def _of_all_ranks(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and biased variance [C], and 1 / n, or 0 where the samples of this rank are not among the n."""
        layer = self.plain
        shift = layer.running_mean if layer.running_mean is not None else x.new_zeros(x.shape[1])
        totals = all_reduced(moments_of(x, shift) if self.counts else no_moments(layer, x.device))
        if self.observing and layer.running_mean is not None:
            self.pending = blended(self.pending or running_of(layer), totals, shift, layer.momentum)
        count, mean, squares = statistics(totals, shift)
        share = 1 / count.clamp(min=1)
        dtype = torch.promote_types(x.dtype, torch.float32)
        known = (mean.to(dtype), (squares * share).to(dtype), share if self.counts else torch.zeros_like(share))
        if self.observing:
            self.known = (*self.known, known)
        return known


class WindowBatchNorm1d(_Windowed, nn.BatchNorm1d):
    """A converted nn.BatchNorm1d."""

    num_dims = (2, 3)


class WindowBatchNorm2d(_Windowed, nn.BatchNorm2d):
    """A converted nn.BatchNorm2d."""

    num_dims = (4,)


class WindowBatchNorm3d(_Windowed, nn.BatchNorm3d):
    """A converted nn.BatchNorm3d."""

    num_dims = (5,)


_CONVERTED: dict[type[nn.Module], type[_Windowed]] = {
    nn.BatchNorm1d: WindowBatchNorm1d,
    nn.BatchNorm2d: WindowBatchNorm2d,
    nn.BatchNorm3d: WindowBatchNorm3d,
}
_LAZY = (nn.LazyBatchNorm1d, nn.LazyBatchNorm2d, nn.LazyBatchNorm3d)


def has_batchnorm(model: nn.Module) -> bool:
    """Whether a mode matters to this model: it has nn.BatchNorm1d, 2d or 3d layers (converted or lazy ones too)."""
    return any(isinstance(module, (*_CONVERTED, *_LAZY)) for module in model.modules())


def convert_batchnorm(model: nn.Module, mode: BatchNormMode) -> nn.Module:
    """Give every nn.BatchNorm1d, 2d and 3d of the model a mode, before the model is wrapped. Nothing is communicated.

    Layers change their class in place, as `fully_shard` does it: parameters, buffers, hooks, the names in `state_dict`
    and all settings stay. `micro` changes nothing; torch's SyncBatchNorm is left alone. Running statistics change only
    inside windows, where `pooled_statistics` is at work. Returns the model itself.

    Raises:
        ConfigError: for lazy layers, for subclasses with code of their own, and for `frozen` layers without running
            statistics. Nothing was changed then.
    """
    if mode is BatchNormMode.micro:
        for layer in model.modules():
            if isinstance(layer, tuple(_CONVERTED)):
                layer.left_alone = True  # type: ignore[assignment]  # chosen, so that nobody warns of it
        return model
    layers = [(name or "the model", module) for name, module in model.named_modules()]
    layers = [(name, module) for name, module in layers if isinstance(module, (*_CONVERTED, *_LAZY))]
    for name, layer in layers:
        if isinstance(layer, _LAZY):
            raise ConfigError(
                f"{name} is a {type(layer).__name__} and does not know its channels yet. Run a forward on one "
                "micro-batch before it is converted, or write the channels."
            )
        if type(layer) not in _CONVERTED and not isinstance(layer, _Windowed):
            raise ConfigError(
                f"{name} is a {type(layer).__name__}, a BatchNorm with code of its own, which would be lost. Convert "
                "before fully_shard, use torch's nn.BatchNorm, or leave layers as they are with 'micro'."
            )
        if mode is BatchNormMode.frozen and layer.running_mean is None:
            raise ConfigError(
                f"{name} has no running statistics to be frozen (track_running_stats=False). Use 'pooled' or 'sync'."
            )
    for _, layer in layers:
        layer.__class__ = _CONVERTED.get(type(layer), type(layer))
        layer.mode = mode
    return model


def mode_of(model: nn.Module) -> BatchNormMode | None:
    """How the layers of a model that is being trained behave; None where it has none, or all are in eval mode."""
    layers = [(name, m) for name, m in model.named_modules() if m.training and isinstance(m, (*_CONVERTED,))]
    modes = {layer.mode if isinstance(layer, _Windowed) else BatchNormMode.micro: name for name, layer in layers}
    if len(modes) > 1:
        found = ", ".join(f"{name} is {mode.value}" for mode, name in modes.items())
        raise ConfigError(f"One BatchNorm mode can be judged, and {found}: use convert_batchnorm(model, mode) for all.")
    return next(iter(modes), None)


def unconverted(model: nn.Module) -> nn.Module:
    """Give converted layers their own class again, in place: the model itself, as torch has it."""
    own: dict[type[nn.Module], type[nn.Module]] = {converted: plain for plain, converted in _CONVERTED.items()}
    for module in model.modules():
        module.__class__ = own.get(type(module), type(module))
    return model


def pooled_statistics(model: nn.Module) -> PooledStatistics | None:
    """What keeps the running statistics of the model's pooled and sync layers; None where it has none of them."""
    layers = _layers(model, BatchNormMode.pooled, BatchNormMode.sync)
    return PooledStatistics(layers) if layers else None


def collectives(model: nn.Module) -> list[int]:
    """The bytes of each all-reduce that the sync layers send in one round of forward and backward, in order.

    For a model in which each layer runs once a round and gradients reach it; activation checkpointing adds nothing.
    Empty without sync layers and on one rank.
    """
    if not several_ranks():
        return []
    channels = [layer.plain.num_features for layer in _layers(model, BatchNormMode.sync)]
    return [8 * (1 + 2 * c) for c in channels] + [8 * 2 * c for c in reversed(channels)]


class PooledStatistics:
    """The running statistics of one model's layers over a window. One object serves one model; all ranks call alike.

    A window: `observing()` or `padding()` around each forward, `send` before the last backward, `commit` at the
    boundary; `forget` for a window that makes no update. Until `commit` no buffer is written.
    """

    def __init__(self, layers: list[_Windowed]) -> None:
        """Serve these layers: pooled and sync ones."""
        self._layers = layers
        self._pooled = [
            layer for layer in layers if layer.mode is BatchNormMode.pooled and layer.plain.running_mean is not None
        ]
        self._table: Tensor | None = None  # flat float64, the moments of all pooled layers
        self._work: dist.Work | None = None

    @property
    def num_bytes(self) -> int:
        """Of the one all-reduce of a window: float64, a count and two sums a channel for each pooled layer."""
        return 8 * sum(width(layer.plain) for layer in self._pooled)

    def observing(self) -> AbstractContextManager[None]:
        """Enter around the forward of a micro-batch that counts, and leave before its backward.

        A forward that is repeated in the backward (activation checkpointing) is then not observed twice.
        """
        return self._round(counts=True)

    def padding(self) -> AbstractContextManager[None]:
        """The same for a round that this rank has no micro for: its samples are counted in nothing."""
        return self._round(counts=False)

    def send(self, group: dist.ProcessGroup | None, device: torch.device) -> None:
        """Start the one all-reduce of a window, after its last forward, on the model's device; nothing waits here.

        `group` are the ranks that share the window; None: one process, and nothing is sent.
        """
        if not self._pooled:
            return
        rows = [no_moments(layer.plain, device) if layer.moments is None else layer.moments for layer in self._pooled]
        self._table = torch.cat([row.to(device) for row in rows])
        if group is not None:
            self._table = self._table if is_served(group, device) else self._table.cpu()
            self._work = dist.all_reduce(self._table, group=group, async_op=True)

    def commit(self) -> None:
        """Write the running statistics of the window: one update for pooled layers, one a round for sync layers.

        Waits for what was sent. What no sample of any rank was observed for stays as it is.
        """
        if self._work is not None:
            self._work.wait()
        if self._table is not None:
            rows = self._table.split([width(layer.plain) for layer in self._pooled])
            for layer, row in zip(self._pooled, rows, strict=True):
                plain, shift = layer.plain, cast(Tensor, layer.plain.running_mean)
                layer.pending = blended(running_of(plain), row.to(shift.device), shift, plain.momentum)
        with torch.no_grad():
            for layer in self._layers:
                for buffer, value in zip(buffers_of(layer.plain), layer.pending or (), strict=False):
                    buffer.copy_(value)
        self.forget()

    def forget(self) -> None:
        """Drop what was observed since the last `commit`: for a window that was skipped or did not end."""
        self._table = self._work = None
        for layer in self._layers:
            layer.moments = layer.pending = None
            layer.observing, layer.counts, layer.known = False, True, ()

    @contextmanager
    def _round(self, counts: bool) -> Iterator[None]:
        for layer in self._layers:
            layer.observing, layer.counts, layer.known = True, counts, ()
        try:
            yield
        finally:
            for layer in self._layers:
                layer.observing = False


def _layers(model: nn.Module, *modes: BatchNormMode) -> list[_Windowed]:
    return [module for module in model.modules() if isinstance(module, _Windowed) and module.mode in modes]
