"""BatchNorm under accumulation: which samples its statistics are taken over, and when running statistics are written.

Gradients of K micro-batches on R ranks add up to those of one big batch; the statistics of BatchNorm do not, as each
forward sees one micro-batch of one rank. A mode says what is done about it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distaccum.errors import ConfigError, choice
from distaccum.nn.batch_stats import blended, buffers_of, is_served, no_moments, running_of, several_ranks, width
from distaccum.nn.batchnorm_layers import CONVERTED, LAZY, BatchNormMode, Windowed


def has_batchnorm(model: nn.Module) -> bool:
    """Whether a mode matters to this model: it has nn.BatchNorm1d, 2d or 3d layers (converted or lazy ones too)."""
    return any(isinstance(module, (*CONVERTED, *LAZY)) for module in model.modules())


def convert_batchnorm(model: nn.Module, mode: BatchNormMode | str) -> nn.Module:
    """Give every nn.BatchNorm1d, 2d and 3d of the model a mode, before the model is wrapped. Nothing is communicated.

    Layers change their class in place, as `fully_shard` does it: parameters, buffers, hooks, the names in `state_dict`
    and all settings stay. `micro` keeps torch's own classes, and the layers remember that it was chosen; torch's
    SyncBatchNorm is left alone. Running statistics change only inside windows, where `pooled_statistics` is at work.
    Returns the model itself.

    Args:
        model: whose layers get a mode.
        mode: see `BatchNormMode`; its name will do.

    Raises:
        ConfigError: for a mode that is none, for lazy layers, for subclasses with code of their own, and for `frozen`
            layers without running statistics. Nothing was changed then.
    """
    mode = choice(BatchNormMode, mode, "mode")
    if mode is BatchNormMode.micro:
        for layer in unconverted(model).modules():
            if isinstance(layer, (*CONVERTED, *LAZY)):
                layer.left_alone = True  # type: ignore[assignment]  # chosen, so that nobody warns of it
        return model
    layers = [(name or "the model", module) for name, module in model.named_modules()]
    layers = [(name, module) for name, module in layers if isinstance(module, (*CONVERTED, *LAZY))]
    for name, layer in layers:
        if isinstance(layer, LAZY):
            raise ConfigError(
                f"{name} is a {type(layer).__name__} and does not know its channels yet. Run a forward on one "
                "micro-batch before it is converted, or write the channels."
            )
        if type(layer) not in CONVERTED and not isinstance(layer, Windowed):
            raise ConfigError(
                f"{name} is a {type(layer).__name__}, a BatchNorm with code of its own, which would be lost. Convert "
                "before fully_shard, use torch's nn.BatchNorm, or leave layers as they are with 'micro'."
            )
        if mode is BatchNormMode.frozen and layer.running_mean is None:
            raise ConfigError(
                f"{name} has no running statistics to be frozen (track_running_stats=False). Use 'pooled' or 'sync'."
            )
    for _, layer in layers:
        layer.__class__ = CONVERTED.get(type(layer), type(layer))
        layer.mode = mode
    return model


def mode_of(model: nn.Module) -> BatchNormMode | None:
    """How the layers of a model that is being trained behave; None where it has none, or all are in eval mode."""
    layers = [(name, m) for name, m in model.named_modules() if m.training and isinstance(m, tuple(CONVERTED))]
    modes = {layer.mode if isinstance(layer, Windowed) else BatchNormMode.micro: name for name, layer in layers}
    if len(modes) > 1:
        found = ", ".join(f"{name} is {mode.value}" for mode, name in modes.items())
        raise ConfigError(
            f"verify() needs one BatchNorm mode for all layers, but {found}. Call convert_batchnorm(model, mode) on "
            "the whole model."
        )
    return next(iter(modes), None)


def with_mode(model: nn.Module) -> list[str]:
    """The names of the layers for which a mode was chosen, `micro` too."""
    layers = model.named_modules()
    return [name for name, layer in layers if isinstance(layer, Windowed) or getattr(layer, "left_alone", False)]


def unconverted(model: nn.Module) -> nn.Module:
    """Give converted layers their own class again, in place: the model itself, as torch has it."""
    own: dict[type[nn.Module], type[nn.Module]] = {converted: plain for plain, converted in CONVERTED.items()}
    for module in model.modules():
        module.__class__ = own.get(type(module), type(module))
    return model


def pooled_statistics(model: nn.Module, group: dist.ProcessGroup | None = None) -> PooledStatistics | None:
    """Make the object that keeps the running statistics of a model's pooled and sync layers; None without such layers.

    Sync layers meet in `group` from here on: the ranks that train this model; None: all ranks.
    """
    layers = _layers(model, BatchNormMode.pooled, BatchNormMode.sync)
    for layer in layers:
        layer.group = group
    return PooledStatistics(layers) if layers else None


def collectives(model: nn.Module) -> list[int]:
    """The bytes of each all-reduce that the sync layers send in one round of forward and backward, in order.

    For a model in which each layer runs once a round and gradients reach it; activation checkpointing adds nothing.
    Empty without sync layers and on one rank.
    """
    layers = _layers(model, BatchNormMode.sync)
    channels = [layer.plain.num_features for layer in layers if several_ranks(layer.group)]
    return [8 * (1 + 2 * c) for c in channels] + [8 * 2 * c for c in reversed(channels)]


class PooledStatistics:
    """The running statistics of one model's layers over a window. One object serves one model; all ranks call alike.

    A window: `observing()` or `padding()` around each forward, `send` before the last backward, `commit` at the
    boundary; `forget` for a window that makes no update. Until `commit` no buffer is written.
    """

    def __init__(self, layers: list[Windowed]) -> None:
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


def _layers(model: nn.Module, *modes: BatchNormMode) -> list[Windowed]:
    return [module for module in model.modules() if isinstance(module, Windowed) and module.mode in modes]
