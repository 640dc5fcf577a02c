"""Writes full weights, equal on all ranks, into parameters that may be sharded."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def write(parameter: Tensor, full: Tensor) -> None:
    """Copy a full tensor into a parameter, or each rank's part of it into a sharded parameter.

    Args:
        parameter: the parameter, modified in place.
        full: the whole tensor, equal on all ranks.
    """
    if isinstance(parameter, DTensor):
        full = full.to(parameter.device, parameter.dtype)
        full = distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.copy_(full)
