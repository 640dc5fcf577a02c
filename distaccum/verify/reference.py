"""Computes on one process, with plain autograd, what a window must equal.

It shares nothing with the step but the objective.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
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
        model: a plain module in the dtype of the computation, which is used up: it keeps hooks,
            gradients and moved buffers. BatchNorm normalizes within a group.
        objective: the objective whose loss sums are computed.
        groups: micro-batches on the model's device: one big batch, or the several batches that the
            window must equal, over each of which BatchNorm takes its own statistics.
        denominators: the denominators of all groups together, by term.
        scale: the factor by which losses are multiplied before the backward, and gradients divided
            afterwards.
    """
    layers: dict[str, nn.Module] = {}  # float64 copies of the layers that update running statistics
    inputs: dict[str, list[Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.training and module.running_mean is not None:
            layers[name], inputs[name] = copy.deepcopy(module).double(), []
            module.register_forward_pre_hook(partial(_record, inputs[name]))
    loss = 0.0
    for group in groups:
        sums = sums_of(objective, model, group, list(denominators))
        shares = [
            s / w if w > 0 else s * 0.0 for s, w in zip(sums, denominators.values(), strict=True)
        ]
        share = torch.stack(shares).sum()
        loss += float(share.detach())
        (share * scale).backward()
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad / scale
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    running: dict[str, Tensor] = {}
    for name, layer in layers.items():
        if inputs[name]:
            running |= _after_one_batch(layer, inputs[name], name)
    return Computed(loss, gradients, running)


def _record(inputs: list[Tensor], layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
    inputs.append(arguments[0].detach())


def _after_one_batch(layer: nn.Module, inputs: Sequence[Tensor], name: str) -> dict[str, Tensor]:
    """Return the running statistics of a float64 layer after one batch that joins all inputs.

    The inputs [B, C, ...] may differ in size, and statistics do not depend on positions, so all
    numbers of a channel are joined: [N, C, 1, ...].
    """
    channels = torch.cat([x.double().transpose(0, 1).flatten(1) for x in inputs], dim=1)
    layer(channels.T.reshape(-1, len(channels), *[1] * (inputs[0].ndim - 2)))
    buffers = layer.named_buffers(prefix=name)
    return {key: buffer for key, buffer in buffers if buffer.is_floating_point()}


def combined(micro_batches: Sequence[Any], name: str = "the micro-batch") -> Any:
    """Join micro-batches into one, with tensors joined along their first dimension.

    Containers keep their class. Sequences of different lengths are padded at their end, under the
    names in `PADDING`.

    Args:
        micro_batches: the micro-batches, or the parts of one name in all of them.
        name: this name, for errors.

    Raises:
        ConfigError: for micro-batches of different structure, and for other tensors that differ in
            shape.
    """
    values = list(micro_batches)
    if name != "the micro-batch" and isinstance(values[0], list):
        opened = None  # its items may be samples
    else:
        opened = [
            None if isinstance(v, tuple | list) and moves_itself(v) else parts(v) for v in values
        ]
    if opened is not None and None not in opened and len({type(value) for value in values}) == 1:
        return _together(name, values[0], [part for part in opened if part is not None])
    if not all(isinstance(value, Tensor) and value.ndim for value in values):
        if next(tensors_in(values), None) is None and all(value == values[0] for value in values):
            return values[0]
        raise ConfigError(
            _advice(
                f"'{name}' is of type {type(values[0]).__name__} and differs between micro-batches"
            )
        )
    shapes = {tuple(value.shape[1:]) for value in values}
    if len(shapes) == 1:
        return torch.cat(values)
    if name not in PADDING or any(value.ndim != 2 for value in values):
        raise ConfigError(_advice(f"'{name}' has samples of different shapes {sorted(shapes)}"))
    width = max(value.shape[1] for value in values)
    return torch.cat(
        [nn.functional.pad(v, (0, width - v.shape[1]), value=PADDING[name]) for v in values]
    )


def combined_denominators(
    objective: SupportsObjective, micro_batches: Sequence[Any]
) -> dict[str, float]:
    """Return the sum of the denominators of all micro-batches, by term."""
    each = [denominators_of(objective, micro_batch) for micro_batch in micro_batches]
    return {name: sum(one.get(name, 0.0) for one in each) for name in each[0]}


def cast(micro_batch: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Move a micro-batch to a device, and cast its floating-point tensors to a dtype.

    This includes tensors in the attributes of objects that have a method `to` of their own.
    """

    def change(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.to(dtype) if leaf.is_floating_point() else leaf
        made = copy.copy(leaf)
        vars(made).update(
            {name: mapped(value, change, is_leaf) for name, value in vars(leaf).items()}
        )
        return made

    def is_leaf(value: Any) -> bool:
        own = parts(value) is None and moves_itself(value) and hasattr(value, "__dict__")
        return isinstance(value, Tensor) or own

    return mapped(to_device(micro_batch, device), change, is_leaf)


def _together(name: str, first: Any, opened: Sequence[Parts]) -> Any:
    """Join containers of one class, part by part."""
    if any(
        one.keys() != other.keys()
        for those in opened
        for one, other in zip(those, opened[0], strict=True)
    ):
        raise ConfigError(_advice(f"'{name}' does not hold the same names in all micro-batches"))
    items = {
        key: combined([those.items[key] for those in opened], str(key)) for key in opened[0].items
    }
    attributes = {}
    for key, value in opened[0].attributes.items():
        # Private attributes of a class belong to no sample, unless they hold tensors.
        own = key.startswith("_") and next(tensors_in(value), None) is None
        attributes[key] = (
            value if own else combined([those.attributes[key] for those in opened], key)
        )
    return rebuilt(first, Parts(items, attributes))


def _advice(reason: str) -> str:
    return (
        f"The micro-batches of this window cannot be joined into one big batch: {reason}. Pass "
        "verify(..., combine=function) with a function that makes one micro-batch of a list of "
        "micro-batches."
    )
