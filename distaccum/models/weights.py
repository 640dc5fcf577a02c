"""Checks the sizes of models, and draws their weights, which are equal on all ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from distaccum.errors import ConfigError


def checked_sizes(config: object, from_data: Sequence[str], others: Sequence[str]) -> list[int]:
    """Refuse sizes that are unknown or less than 1, and return those that the data decides.

    Args:
        config: the configuration of a model.
        from_data: names of the sizes that are taken from the data if they are None.
        others: names of the other sizes.

    Raises:
        ConfigError: if no model can have these sizes.
    """
    sizes = {key: getattr(config, key) for key in (*from_data, *others)}
    if None in sizes.values():
        got = ", ".join(f"model.{key}={sizes[key]}" for key in from_data)
        raise ConfigError(
            f"{got}: both must be known when the model is built. Take them from the data, or set "
            "them."
        )
    for key, size in sizes.items():
        if size < 1:
            raise ConfigError(f"model.{key} ({size}) must be at least 1.")
    return [sizes[key] for key in from_data]


@torch.no_grad()
def draw(model: nn.Module, std_of: Callable[[str, Tensor], float]) -> None:
    """Initialize all parameters: matrices and kernels normal with mean 0, biases 0, norms 1.

    Every rank draws the whole tensors from torch's global CPU generator, in float32 and in the
    order of `named_parameters()`, and keeps its own shard. Equal seeds therefore give equal models
    on any device, in any dtype (up to rounding) and on any number of ranks. The caller sets the
    seed. Nothing is communicated.

    Args:
        model: the model, modified in place.
        std_of: returns the standard deviation for the name and the tensor of a parameter.

    Raises:
        ConfigError: if a parameter is on the meta device.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ConfigError(
                f"{type(model).__name__}.init_weights: the parameter {name} is on the meta device; "
                "call to_empty(device=...) first."
            )
        if parameter.ndim == 1:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            full = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
            write(parameter, full.normal_(0.0, std_of(name, parameter)))


def write(parameter: Tensor, full: Tensor) -> None:
    """Copy a full tensor into a parameter, or each rank's part of it into a sharded parameter.

    Args:
        parameter: the parameter, modified in place.
        full: the whole tensor, equal on all ranks.
    """
    if isinstance(parameter, DTensor):
        full = full.to(parameter.device, parameter.dtype)
        full = distribute_tensor(
            full, parameter.device_mesh, parameter.placements, src_data_rank=None
        )
    parameter.copy_(full)
