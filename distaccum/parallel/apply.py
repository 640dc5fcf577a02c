"""Applies a strategy to a model from outside: for the command line, which has only a configuration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from distaccum.errors import ConfigError
from distaccum.grads.accumulate import SumDtype
from distaccum.parallel.world import World


class StrategyName(Enum):
    """`auto` is single on one rank and ddp on several."""

    auto = "auto"
    single = "single"
    ddp = "ddp"
    fsdp = "fsdp"
    hsdp = "hsdp"


@dataclass
class ParallelConfig:
    """How a model is spread over ranks. conf/parallel owns the values."""

    name: StrategyName
    replicas: int | None  # hsdp: groups of ranks that hold the whole model each; null: two
    find_unused_parameters: bool  # ddp
    static_graph: bool  # ddp
    bucket_mb: int  # ddp: gradients in one all-reduce, in MiB
    reshard_after_forward: bool  # fsdp, hsdp: gather again for the backward, or keep the parameters until then
    reduce_dtype: SumDtype | None  # in which gradients are summed over ranks; null: float32, or wider parameters' own


def wrap(
    model: nn.Module, blocks: Sequence[nn.Module], config: ParallelConfig, world: World, policy: MixedPrecisionPolicy
) -> nn.Module:
    """The model, spread as configured; its blocks become FSDP2's groups, the rest the root's.

    Raises:
        ConfigError: for a strategy that does not fit the number of ranks.
    """
    name = chosen(config.name, world.size)
    if name is StrategyName.single:
        if world.size > 1:
            raise ConfigError(f"parallel=single on {world.size} ranks: each would train alone. Use ddp, fsdp or hsdp.")
        return model
    if world.group is None:
        raise ConfigError(
            f"parallel={name.value} needs ranks, and this is one process without a process group. Start it with "
            "torchrun --nproc-per-node N (N may be 1) or launch.nproc_per_node=N, or use parallel=single."
        )
    if name is StrategyName.ddp:
        return DistributedDataParallel(
            model,
            find_unused_parameters=config.find_unused_parameters,
            static_graph=config.static_graph,
            bucket_cap_mb=config.bucket_mb,
            gradient_as_bucket_view=False,  # it saves memory only where gradients are not set to None
        )
    # torch takes meshes of equal names for equal and keeps what it has worked out for one: that of a group that sends
    # nothing must not be found again for a group that does.
    names = tuple(f"{dim} in {world.group.group_name}" for dim in _NAMES[name])
    mesh = init_device_mesh(world.device.type, mesh_shape(name, config.replicas, world.size), mesh_dim_names=names)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=config.reshard_after_forward)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return model


def chosen(name: StrategyName, ranks: int) -> StrategyName:
    """What `auto` means on so many ranks."""
    if name is not StrategyName.auto:
        return name
    return StrategyName.single if ranks == 1 else StrategyName.ddp


_NAMES = {StrategyName.fsdp: ("shard",), StrategyName.hsdp: ("replicate", "shard")}


def mesh_shape(name: StrategyName, replicas: int | None, ranks: int) -> tuple[int, ...]:
    """(shards,) for fsdp, (replicas, shards) for hsdp.

    Raises:
        ConfigError: for replicas that do not divide the ranks.
    """
    if name is StrategyName.fsdp:
        return (ranks,)
    groups = replicas if replicas is not None else 2
    if groups < 1 or ranks % groups:
        raise ConfigError(
            f"parallel.replicas={groups} does not divide {ranks} ranks. HSDP needs replicas x shards = ranks: use one "
            f"of {[n for n in range(1, ranks + 1) if ranks % n == 0]}."
        )
    return groups, ranks // groups
