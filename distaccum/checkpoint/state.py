"""Collects the state of model and optimizer under names that do not depend on the strategy."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from distaccum.errors import CheckpointError

# Name parts that torch.compile and torch's checkpoint_wrapper insert into parameter names.
_WRAPPERS = re.compile(r"_orig_mod\.|_checkpoint_wrapped_module\.")


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and persistent buffers of a model under the names `model.NAME`.

    The tensors share the model's memory. Sharded ones are DTensors.

    Args:
        model: the model without its DistributedDataParallel wrapper; FSDP2 modules need no
            unwrapping.

    Raises:
        CheckpointError: if the model's state holds something other than tensors.
    """
    tensors = {}
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise CheckpointError(
                f"The model's state holds {name!r} of type {type(value).__name__} (its module's "
                "get_extra_state). Only tensors are saved, so that loading cannot run code. "
                "Register it as a buffer."
            )
        tensors[f"model.{_canonical(name)}"] = value
    return tensors


def optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Return the tensors of an optimizer's state under the names `optim.PARAMETER.KEY`.

    Raises:
        CheckpointError: for a state that could not be reassembled on another number of ranks.
    """
    tensors = {}
    for name, parameter, key, value in _states(model, optimizer):
        if not isinstance(value, Tensor):
            continue
        sharded = isinstance(parameter, DTensor)
        if (
            sharded
            and value.numel() > 1
            and not (isinstance(value, DTensor) and value.shape == parameter.shape)
        ):
            raise CheckpointError(
                f"{type(optimizer).__name__} keeps {key!r} of {name} in the shape "
                f"{tuple(value.shape)}, but the parameter is sharded and has the shape "
                f"{tuple(parameter.shape)}, so it is unknown which part of the state this rank "
                "holds. Use parallel=ddp, or an optimizer whose states have their parameters' "
                "shapes."
            )
        tensors[f"optim.{name}.{key}"] = value
    return tensors


def optimizer_values(model: nn.Module, optimizer: Optimizer) -> dict[str, dict[str, Any]]:
    """Return the plain values of an optimizer's state, as {parameter: {key: value}}.

    Raises:
        CheckpointError: for a value that is neither a tensor nor a bool, int, float, str or None.
    """
    values: dict[str, dict[str, Any]] = {}
    for name, _, key, value in _states(model, optimizer):
        if isinstance(value, Tensor):
            continue
        if value is not None and not isinstance(value, bool | int | float | str):
            raise CheckpointError(
                f"{type(optimizer).__name__} keeps {key!r} of {name} as a {type(value).__name__}. "
                "Only tensors and plain values are saved, so that loading cannot run code. Use an "
                "optimizer without such state."
            )
        values.setdefault(name, {})[key] = value
    return values


def make_optimizer_state(
    model: nn.Module,
    optimizer: Optimizer,
    saved: Mapping[str, tuple[torch.Size, torch.dtype]],
    values: Mapping[str, Mapping[str, Any]],
) -> None:
    """Create the optimizer states that a checkpoint holds, as zeros to be loaded into.

    Args:
        model: the model without its DistributedDataParallel wrapper.
        optimizer: the optimizer over this model's parameters; its current state is discarded.
        saved: the shape and dtype of each tensor in the checkpoint; names that do not begin with
            `optim.` are ignored.
        values: the plain values of the saved state, from `optimizer_values`.
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
                # torch keeps its step counters on the host, unless the update runs as one kernel on
                # the device.
                on_device = len(shape) > 0 or group.get("capturable") or group.get("fused")
                state[key] = torch.zeros(
                    shape, dtype=dtype, device=parameter.device if on_device else "cpu"
                )
        if state:
            optimizer.state[parameter] = state


def _states(model: nn.Module, optimizer: Optimizer) -> Iterator[tuple[str, nn.Parameter, str, Any]]:
    for name, parameter, _ in _parameters(model, optimizer):
        for key, value in optimizer.state.get(parameter, {}).items():
            yield name, parameter, key, value


def _parameters(
    model: nn.Module, optimizer: Optimizer
) -> Iterator[tuple[str, nn.Parameter, dict[str, Any]]]:
    names = {parameter: _canonical(name) for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter not in names:
                raise CheckpointError(
                    f"The optimizer has a parameter of shape {tuple(parameter.shape)} that does "
                    "not belong to the model, so it has no name to be saved under. Make the "
                    "optimizer over model.parameters()."
                )
            yield names[parameter], parameter, group


def _canonical(name: str) -> str:
    return _WRAPPERS.sub("", name)


def on_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors to host memory (pinned, from a device), so that the originals may change."""
    copies = {
        name: tensor.to("cpu", non_blocking=True, copy=True) for name, tensor in tensors.items()
    }
    for device in {tensor.device for tensor in tensors.values() if tensor.device.type != "cpu"}:
        torch.get_device_module(device).current_stream(device).synchronize()
    return copies
