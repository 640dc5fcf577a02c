"""What of a model and its optimizer is saved: named tensors and plain values, the same names under any strategy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from distaccum.errors import CheckpointError

# What torch.compile and torch's checkpoint_wrapper put into the names of a model's parts.
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """`model.NAME` -> parameter or persistent buffer, sharded ones as DTensors. They share the model's memory.

    Args:
        model: without DistributedDataParallel around it; FSDP2 modules as they are.
    """
    tensors = {}
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise CheckpointError(
                f"The model's state holds {name!r} of type {type(value).__name__} (its module's get_extra_state). "
                "Only tensors are saved, so that loading runs nobody's code: register it as a buffer."
            )
        tensors[f"model.{_canonical(name)}"] = value
    return tensors


def optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """`optim.PARAMETER.KEY` -> the optimizer's state of that parameter.

    Raises:
        CheckpointError: for a state that could not be put together again on another number of ranks.
    """
    tensors = {}
    for name, parameter, key, value in _states(model, optimizer):
        if not isinstance(value, Tensor):
            continue
        sharded = isinstance(parameter, DTensor)
        if sharded and value.numel() > 1 and not (isinstance(value, DTensor) and value.shape == parameter.shape):
            raise CheckpointError(
                f"{type(optimizer).__name__} keeps {key!r} of {name} in the shape {tuple(value.shape)}, and the "
                f"parameter is sharded with {tuple(parameter.shape)}: it is not known which part of it this rank "
                "holds. Use parallel=ddp, or an optimizer whose states have the shape of their parameters."
            )
        tensors[f"optim.{name}.{key}"] = value
    return tensors


def optimizer_values(model: nn.Module, optimizer: Optimizer) -> dict[str, dict[str, Any]]:
    """The same for states that are plain values: {parameter: {key: value}}."""
    values: dict[str, dict[str, Any]] = {}
    for name, _, key, value in _states(model, optimizer):
        if isinstance(value, Tensor):
            continue
        if value is not None and not isinstance(value, bool | int | float | str):
            raise CheckpointError(
                f"{type(optimizer).__name__} keeps {key!r} of {name} as a {type(value).__name__}. Only tensors and "
                "plain values are saved, so that loading runs nobody's code."
            )
        values.setdefault(name, {})[key] = value
    return values


def make_optimizer_state(
    model: nn.Module,
    optimizer: Optimizer,
    saved: Mapping[str, tuple[torch.Size, torch.dtype]],
    values: Mapping[str, Mapping[str, Any]],
) -> None:
    """Give a fresh optimizer the states that a checkpoint has, as zeros to be loaded into.

    Args:
        model: as for `optimizer_tensors`.
        optimizer: over this model's parameters; what it has is forgotten.
        saved: shape and dtype of each tensor in the checkpoint; names that do not begin with `optim.` are passed over.
        values: from `optimizer_values`.
    """
    optimizer.state.clear()
    tensors: dict[str, dict[str, tuple[torch.Size, torch.dtype]]] = {}
    for full_name, info in saved.items():
        if full_name.startswith("optim."):
            name, _, key = full_name.removeprefix("optim.").rpartition(".")
            tensors.setdefault(name, {})[key] = info
    for name, parameter, group in _parameters(model, optimizer):
        state: dict[str, Any] = dict(values.get(name, {}))
        for key, (shape, dtype) in tensors.get(name, {}).items():
            if shape == parameter.shape and key != "step":
                state[key] = torch.zeros_like(parameter, dtype=dtype)
            else:
                # torch counts steps on the host, unless the update runs as one kernel on the device.
                on_device = len(shape) > 0 or group.get("capturable") or group.get("fused")
                state[key] = torch.zeros(shape, dtype=dtype, device=parameter.device if on_device else "cpu")
        if state:
            optimizer.state[parameter] = state


def _states(model: nn.Module, optimizer: Optimizer) -> Iterator[tuple[str, nn.Parameter, str, Any]]:
    for name, parameter, _ in _parameters(model, optimizer):
        for key, value in optimizer.state.get(parameter, {}).items():
            yield name, parameter, key, value


def _parameters(model: nn.Module, optimizer: Optimizer) -> Iterator[tuple[str, nn.Parameter, dict[str, Any]]]:
    names = {parameter: _canonical(name) for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter not in names:
                raise CheckpointError(
                    f"The optimizer has a parameter of shape {tuple(parameter.shape)} that is not the model's, so that "
                    "it has no name to be saved under. Make the optimizer over model.parameters()."
                )
            yield names[parameter], parameter, group


def _canonical(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name
