"""Decides how BatchNorm takes statistics and when it writes running statistics in a window.

Gradients of K micro-batches on R ranks add up to those of one big batch. The statistics of
BatchNorm do not, because each forward sees one micro-batch of one rank. A `BatchNormMode` chooses
what to do about it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distaccum.errors import choice, require
from distaccum.nn.batch_stats import (
    buffers_of,
    is_served,
    running_of,
    several_ranks,
    update_running_stats,
    width,
    zero_sums,
)
from distaccum.nn.batchnorm_layers import CONVERTED, LAZY, BatchNormMode, Windowed


def has_batchnorm(model: nn.Module) -> bool:
    """Return whether a model has BatchNorm layers, so that a mode matters to it.

    These are nn.BatchNorm1d, 2d and 3d layers, including converted and lazy ones.
    """
    return any(isinstance(module, (*CONVERTED, *LAZY)) for module in model.modules())


def convert_batchnorm(model: nn.Module, mode: BatchNormMode | str) -> nn.Module:
    """Set the mode of every nn.BatchNorm1d, 2d and 3d layer of a model, before it is wrapped.

    Layers change their class in place, as under `fully_shard`: parameters, buffers, hooks, the
    names in `state_dict` and all settings stay. With `micro_batch` they keep torch's own classes
    and remember that this mode was chosen. torch's SyncBatchNorm is left alone. Running statistics
    of converted layers change only in windows of an accumulator. Nothing is communicated here.

    Args:
        model: the model whose layers get the mode.
        mode: a `BatchNormMode`, or its name.

    Returns:
        The model itself.

    Raises:
        ConfigError: for an unknown mode, for lazy layers, for subclasses that add their own code,
            and for `frozen` layers without running statistics. The model is then unchanged.
    """
    mode = choice(BatchNormMode, mode, "mode")
    modules = {name or "the model": module for name, module in model.named_modules()}
    layers: dict[str, Any] = {
        name: m for name, m in modules.items() if isinstance(m, (*CONVERTED, *LAZY))
    }
    if mode is BatchNormMode.micro_batch:
        for layer in layers.values():
            layer.left_alone = True  # it was chosen, so no warning is given
        return unconverted(model)
    for name, layer in layers.items():
        require(
            not isinstance(layer, LAZY),
            f"{name} is a {type(layer).__name__} and does not know its channels yet. Run a forward "
            "on one micro-batch before you convert it, or give its number of channels.",
        )
        require(
            type(layer) in CONVERTED or isinstance(layer, Windowed),
            f"{name} is a {type(layer).__name__}, a BatchNorm with code of its own, which would be "
            "lost. Convert before fully_shard, use torch's nn.BatchNorm, or keep the layers "
            "unchanged with mode 'micro_batch'.",
        )
        require(
            mode is not BatchNormMode.frozen or layer.running_mean is not None,
            f"{name} has no running statistics to be frozen (track_running_stats=False). Use mode "
            "'pooled' or 'sync'.",
        )
    for layer in layers.values():
        layer.__class__ = CONVERTED.get(type(layer), type(layer))
        layer.mode = mode
    return model


def mode_of(model: nn.Module) -> BatchNormMode | None:
    """Return the one mode of a model's BatchNorm layers in training, or None.

    None means that the model has no such layers, or that all of them are in evaluation mode.

    Raises:
        ConfigError: if the layers have different modes.
    """
    layers = [
        (name, m)
        for name, m in model.named_modules()
        if m.training and isinstance(m, tuple(CONVERTED))
    ]
    modes = {
        layer.mode if isinstance(layer, Windowed) else BatchNormMode.micro_batch: name
        for name, layer in layers
    }
    found = ", ".join(f"{name} is {mode.value}" for mode, name in modes.items())
    require(
        len(modes) <= 1,
        f"verify() needs one BatchNorm mode for all layers, but {found}. Call "
        "convert_batchnorm(model, mode) on the whole model.",
    )
    return next(iter(modes), None)


def with_mode(model: nn.Module) -> list[str]:
    """List the names of the layers for which a mode was chosen, including `micro_batch`."""
    layers = model.named_modules()
    return [
        name
        for name, layer in layers
        if isinstance(layer, Windowed) or getattr(layer, "left_alone", False)
    ]


def unconverted(model: nn.Module) -> nn.Module:
    """Return the model after giving its converted layers torch's own classes again, in place."""
    own: dict[type[nn.Module], type[nn.Module]] = {
        converted: plain for plain, converted in CONVERTED.items()
    }
    for module in model.modules():
        module.__class__ = own.get(type(module), type(module))
    return model


def pooled_statistics(model: nn.Module, group: dist.ProcessGroup | None = None) -> PooledStatistics:
    """Return the object that keeps the running statistics of pooled and sync layers.

    Without such layers it does nothing. From this call on, sync layers communicate in `group`.

    Args:
        model: the model, with converted layers.
        group: the ranks that train it; None: all ranks.
    """
    layers = _layers(model, BatchNormMode.pooled, BatchNormMode.sync)
    for layer in layers:
        layer.group = group
    return PooledStatistics(layers)


def collectives(model: nn.Module) -> list[int]:
    """Return the bytes of each all-reduce that sync layers send in one round, in order.

    A round is one forward and backward. The result holds for a model in which each layer runs once
    per round and gets gradients; activation checkpointing adds nothing. It is empty without sync
    layers and on one rank.
    """
    layers = _layers(model, BatchNormMode.sync)
    channels = [layer.plain.num_features for layer in layers if several_ranks(layer.group)]
    return [8 * (1 + 2 * c) for c in channels] + [8 * 2 * c for c in reversed(channels)]


class PooledStatistics:
    """Keeps the running statistics of one model's pooled and sync layers over a window.

    One object serves one model, and all ranks make the same calls. In a window, enter `observing()`
    or `padding()` around each forward, call `send` before the last backward, and call `commit` at
    the boundary, or `forget` for a window that makes no update. No buffer is written before
    `commit`.
    """

    def __init__(self, layers: list[Windowed]) -> None:
        """Store the layers to serve, whose mode is pooled or sync."""
        self.layers = layers
        self._pooled = [
            layer
            for layer in layers
            if layer.mode is BatchNormMode.pooled and layer.plain.running_mean is not None
        ]
        self._table: Tensor | None = None  # flat float64, the sums of all pooled layers
        self._work: dist.Work | None = None

    @property
    def num_bytes(self) -> int:
        """Return the bytes of a window's one all-reduce for pooled layers.

        It holds a count and two sums per channel for each pooled layer, in float64.
        """
        return 8 * sum(width(layer.plain) for layer in self._pooled)

    def observing(self) -> AbstractContextManager[None]:
        """Return a context for the forward of a counted micro-batch; leave it before the backward.

        A forward that the backward repeats (activation checkpointing) is then not observed twice.
        """
        return self._round(counts=True)

    def padding(self) -> AbstractContextManager[None]:
        """Return a context for the forward of a padding round, whose samples are not counted.

        A rank computes padding in a round for which it has no micro-batch.
        """
        return self._round(counts=False)

    def send(self, group: dist.ProcessGroup | None, device: torch.device) -> None:
        """Start the one all-reduce of a window without waiting; call it after the last forward.

        Args:
            group: the ranks that share the window; None: a single process, which sends nothing.
            device: the device of the model.
        """
        if not self._pooled:
            return
        rows = [
            zero_sums(layer.plain, device) if layer.moments is None else layer.moments
            for layer in self._pooled
        ]
        self._table = torch.cat([row.to(device) for row in rows])
        if group is not None:
            self._table = self._table if is_served(group, device) else self._table.cpu()
            self._work = dist.all_reduce(self._table, group=group, async_op=True)

    def commit(self) -> None:
        """Write the running statistics of the window into the layers' buffers.

        Pooled layers get one update per window, sync layers one per round. This waits for what
        `send` started. Layers for which no rank has observed a sample keep their statistics.
        """
        if self._work is not None:
            self._work.wait()
        if self._table is not None:
            rows = self._table.split([width(layer.plain) for layer in self._pooled])
            for layer, row in zip(self._pooled, rows, strict=True):
                plain, shift = layer.plain, cast(Tensor, layer.plain.running_mean)
                layer.pending = update_running_stats(
                    running_of(plain), row.to(shift.device), shift, plain.momentum
                )
        with torch.no_grad():
            for layer in self.layers:
                for buffer, value in zip(
                    buffers_of(layer.plain), layer.pending or (), strict=False
                ):
                    buffer.copy_(value)
        self.forget()

    def forget(self) -> None:
        """Discard what was observed since the last `commit`, for a skipped or unfinished window."""
        self._table = self._work = None
        for layer in self.layers:
            layer.moments = layer.pending = None
            layer.observing, layer.counts, layer.known = False, True, ()

    def _round(self, counts: bool) -> AbstractContextManager[None]:
        return self._recording(counts) if self.layers else nullcontext()

    @contextmanager
    def _recording(self, counts: bool) -> Iterator[None]:
        for layer in self.layers:
            layer.observing, layer.counts, layer.known = True, counts, ()
        try:
            yield
        finally:
            for layer in self.layers:
                layer.observing = False


def _layers(model: nn.Module, *modes: BatchNormMode) -> list[Windowed]:
    return [
        module
        for module in model.modules()
        if isinstance(module, Windowed) and module.mode in modes
    ]
