"""Computes on one process, with plain autograd, what a window must equal.

It shares nothing with the step but the objective.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from distaccum.core.loss import SupportsObjective, denominators_of, sums_of
from distaccum.data.containers import Parts, mapped, parts, rebuilt, tensors_in
from distaccum.data.device import moves_itself, to_device
from distaccum.errors import ConfigError

# Values that pad sequences of different lengths, by the names that common collators use.
PADDING = {"input_ids": 0, "attention_mask": 0, "token_type_ids": 0, "labels": -100}


@dataclass(frozen=True)
class Computed:
    """Holds the results of a window that was computed on one process."""

    loss: float  # the loss sum divided by its denominator, added up over terms
    gradients: Mapping[str, Tensor]  # of trained parameters, by name; zeros where unused
    running: Mapping[str, Tensor]  # BatchNorm's running mean and variance afterwards, by buffer


def compute(
    model: nn.Module,
    objective: SupportsObjective,
    groups: Sequence[Any],
    denominators: Mapping[str, float],
    scale: float,
) -> Computed:
    """Compute the loss and gradients of all groups, with one denominator per term.

    Each group gets one forward and one backward, in order.

    Args:
        model: a plain module in the dtype of the computation. BatchNorm normalizes within a group.
        objective: the objective whose loss sums are computed.
        groups: micro-batches on the model's device: one big batch, or the several batches that the
            window must equal, over each of which BatchNorm takes its own statistics.
        denominators: the denominators of all groups together, by term.
        scale: the factor by which losses are multiplied before the backward, and gradients divided
            afterwards.
    """
    loss = 0.0
    before = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    with _Inputs(model) as inputs:
        for group in groups:
            sums = sums_of(objective, model, group, list(denominators))
            shares = [s / w if w > 0 else s * 0.0 for s, w in zip(sums, denominators.values(), strict=True)]
            share = torch.stack(shares).sum()
            loss += float(share.detach())
            (share * scale).backward()
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad / scale
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    model.zero_grad()
    return Computed(loss, gradients, inputs.running(before))


class _Inputs:
    """Records the inputs of each BatchNorm layer of a model while it trains."""

    def __init__(self, model: nn.Module) -> None:
        self._layers = {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm) and m.training}
        self._read: dict[str, list[Tensor]] = {name: [] for name in self._layers}
        self._handles: list[Any] = []

    def __enter__(self) -> _Inputs:
        for name, layer in self._layers.items():
            read = self._read[name]
            self._handles.append(layer.register_forward_pre_hook(lambda _, args, read=read: read.append(args[0])))
        return self

    def __exit__(self, *unused: object) -> None:
        for handle in self._handles:
            handle.remove()

    def running(self, before: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the running statistics after one update with all recorded inputs, in float64."""
        result = {}
        for name, layer in self._layers.items():
            if layer.running_mean is None or not self._read[name]:
                continue
            # [C, N]: all numbers of a channel over the whole window
            values = torch.cat([x.detach().double().transpose(0, 1).flatten(1) for x in self._read[name]], dim=1)
            var, mean = torch.var_mean(values, dim=1, correction=min(1, values.shape[1] - 1))
            momentum = layer.momentum
            if momentum is None:  # the mean over all updates so far
                momentum = 1.0 / (float(before[_join(name, "num_batches_tracked")]) + 1)
            for buffer, value in (("running_mean", mean), ("running_var", var)):
                old = before[_join(name, buffer)].double()
                result[_join(name, buffer)] = old + momentum * (value - old)
        return result


def combined(micro_batches: Sequence[Any]) -> Any:
    """Join micro-batches into one, with tensors joined along their first dimension.

    Containers keep their class. Sequences of different lengths are padded at their end, under the
    names in `PADDING`.

    Raises:
        ConfigError: for micro-batches of different structure, and for other tensors that differ in
            shape.
    """
    return _joined("the micro-batch", micro_batches)


def combined_denominators(objective: SupportsObjective, micro_batches: Sequence[Any]) -> dict[str, float]:
    """Return the sum of the denominators of all micro-batches, by term."""
    totals: dict[str, float] = {}
    for micro_batch in micro_batches:
        for name, denominator in denominators_of(objective, micro_batch).items():
            totals[name] = totals.get(name, 0.0) + denominator
    return totals


def cast(micro_batch: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Move a micro-batch to a device, and cast its floating-point tensors to a dtype.

    This includes tensors in the attributes of objects that have a method `to` of their own.
    """

    def change(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.to(dtype) if leaf.is_floating_point() else leaf
        made = copy.copy(leaf)
        vars(made).update({name: mapped(value, change, is_leaf) for name, value in vars(leaf).items()})
        return made

    def is_leaf(value: Any) -> bool:
        own = parts(value) is None and moves_itself(value) and hasattr(value, "__dict__")
        return isinstance(value, Tensor) or own

    return mapped(to_device(micro_batch, device), change, is_leaf)


def _joined(name: str, values: Sequence[Any]) -> Any:
    if name != "the micro-batch" and isinstance(values[0], list):
        opened = None  # its items may be samples
    else:
        opened = [None if isinstance(v, tuple | list) and moves_itself(v) else parts(v) for v in values]
    kinds = {type(value) for value in values}
    if opened is not None and None not in opened and len(kinds) == 1:
        return _together(name, values[0], [part for part in opened if part is not None])
    if not all(isinstance(value, Tensor) and value.ndim for value in values):
        if next(tensors_in(list(values)), None) is None and all(value == values[0] for value in values):
            return values[0]
        raise ConfigError(_advice(f"'{name}' is of type {type(values[0]).__name__} and differs between micro-batches"))
    shapes = {tuple(value.shape[1:]) for value in values}
    if len(shapes) == 1:
        return torch.cat(list(values))
    if name not in PADDING or any(value.ndim != 2 for value in values):
        raise ConfigError(_advice(f"'{name}' has samples of different shapes {sorted(shapes)}"))
    width = max(value.shape[1] for value in values)
    return torch.cat([nn.functional.pad(v, (0, width - v.shape[1]), value=PADDING[name]) for v in values])


def _together(name: str, first: Any, opened: Sequence[Parts]) -> Any:
    """Join containers of one class, part by part."""
    if any(one.keys() != other.keys() for those in opened for one, other in zip(those, opened[0], strict=True)):
        raise ConfigError(_advice(f"'{name}' does not hold the same names in all micro-batches"))
    items = {key: _joined(str(key), [those.items[key] for those in opened]) for key in opened[0].items}
    attributes = {}
    for key, value in opened[0].attributes.items():
        # Private attributes of a class belong to no sample, unless they hold tensors.
        own = key.startswith("_") and next(tensors_in(value), None) is None
        attributes[key] = value if own else _joined(key, [those.attributes[key] for those in opened])
    return rebuilt(first, Parts(items, attributes))


def _advice(reason: str) -> str:
    return (
        f"The micro-batches of this window cannot be joined into one big batch: {reason}. Pass "
        "verify(..., combine=function) with a function that makes one micro-batch of a list of micro-batches."
    )


def _join(module: str, buffer: str) -> str:
    return f"{module}.{buffer}" if module else buffer
