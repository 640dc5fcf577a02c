"""Refuses FSDP2 models whose gradients would silently be wrong; fsdp.py reads without it."""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from distaccum import _torch
from distaccum.core.loss import wide
from distaccum.core.strategies import Sync
from distaccum.errors import ConfigError
from distaccum.grads.accumulate import GradientDtypes
from distaccum.parallel.world import World

# Names of mesh dimensions along which ranks work on parts of the same samples.
MODEL_PARALLEL = {
    "tp",
    "cp",
    "pp",
    "sp",
    "ep",
    "tensor",
    "context",
    "pipeline",
    "sequence",
    "expert",
}


def checked_mesh(model: nn.Module, world: World) -> DeviceMesh:
    """Return the mesh of an FSDP2 module's parameters, after checks of both.

    Raises:
        ConfigError: for trained parameters that are not sharded, for offloading to the CPU, and for
            any mesh but a 1-D or a (replicate, shard) one over all ranks.
    """
    named = list(model.named_parameters())
    sharded = [(name, parameter) for name, parameter in named if isinstance(parameter, DTensor)]
    outside = [
        name
        for name, parameter in named
        if parameter.requires_grad and not isinstance(parameter, DTensor)
    ]
    if outside:
        raise ConfigError(
            f"{len(outside)} trained parameter(s) are not sharded, such as {outside[0]}, so their "
            "gradients would differ between ranks. Shard them too, or freeze them."
        )
    if not sharded:
        raise ConfigError(
            "fully_shard() was applied to this model, but none of its parameters is sharded. Apply "
            "it to the modules that have parameters, or to the whole model."
        )
    (_, first), *_ = sharded
    for name, parameter in sharded:
        _refuse_other_meshes(name, parameter, first, world)
    if _torch.offloads(model):
        raise ConfigError(
            "This FSDP2 model uses CPUOffloadPolicy, which is not supported: its parameters are on "
            "the CPU, while micro-batches are on the GPU. Call fully_shard() without "
            "offload_policy. To save memory use nn.checkpoint, smaller micro-batches or more ranks."
        )
    return first.device_mesh


def refuse_other_dtypes(model: nn.Module, sync: Sync, dtypes: GradientDtypes) -> None:
    """Raise ConfigError if the module sums gradients in another dtype than requested.

    The module's own mixed precision policy decides in which dtype it reduces, and in which it
    sums over micro-batches that it does not reduce.

    Args:
        model: the FSDP2 module.
        sync: its sync policy, not `auto`.
        dtypes: the requested dtypes.
    """
    for group in _torch.sharded_groups(model):
        found, asked = group.reduce_dtype, dtypes.reduce or wide(group.reduce_dtype)
        why = "" if dtypes.reduce else ", because long sums in narrow dtypes lose small terms"
        if group.scatter_bytes and found is not asked:
            raise ConfigError(
                f"This FSDP2 module reduces gradients in {found}, but {asked} is needed"
                f"{why}. Use fully_shard(..., mp_policy=MixedPrecisionPolicy(param_dtype=..., "
                f"reduce_dtype={asked})), or pass reduce_dtype={found} if that is intended."
            )
        accumulated = dtypes.accumulate or wide(found)
        if group.scatter_bytes and sync is not Sync.every and found is not accumulated:
            raise ConfigError(
                "FSDP2 sums the gradients that it has not reduced yet in the dtype in which it "
                f"reduces ({found}), but a sum in {accumulated} is needed. Use one dtype for both "
                "(accum.dtype and parallel.reduce_dtype on the command line), or sync='every'."
            )


def _refuse_other_meshes(name: str, parameter: DTensor, first: DTensor, world: World) -> None:
    """Refuse parameters that are not sharded over all ranks on one mesh, 1-D or with replicas."""
    mesh, placements = parameter.device_mesh, parameter.placements
    wanted = (Replicate,) * (mesh.ndim - 1) + (Shard,)
    shared = sorted(MODEL_PARALLEL.intersection(mesh.mesh_dim_names or ()))
    reasons = {
        f"it is on another mesh than the first parameter, which is on {first.device_mesh}": (
            mesh != first.device_mesh
        ),
        "ranks share samples along a dimension that neither replicates nor shards whole "
        "parameters": (mesh.ndim > 2 or tuple(map(type, placements)) != wanted),
        f"ranks along {', '.join(shared)} share samples, as the mesh's names say": bool(shared),
        f"the model is sharded over {mesh.size()} of {world.size} ranks": mesh.size() != world.size,
    }
    reason = next((text for text, holds in reasons.items() if holds), None)
    if reason is not None:
        raise ConfigError(
            f"The parameter {name} is on the mesh {mesh} with the placements {placements}: "
            f"{reason}. Every rank must have its own samples in the effective batch; otherwise "
            "losses, counts and norms would be wrong. Use one 1-D mesh over all ranks, or one 2-D "
            "mesh (replicate, shard)."
        )
