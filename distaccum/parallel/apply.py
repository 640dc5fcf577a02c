"""Wraps a model for DDP, FSDP2 or HSDP from a configuration.

The command line uses it, because it has only a configuration. Users of the library wrap their model
themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from distaccum.core.strategies import StrategyName
from distaccum.errors import ConfigError
from distaccum.grads.accumulate import SumDtype
from distaccum.parallel.world import World


@dataclass
class ParallelConfig:
    """Describes how a model is distributed over ranks; the values come from conf/parallel."""

    name: StrategyName
    replicas: int | None  # hsdp: groups of ranks, each of which holds the whole model; null: two
    find_unused_parameters: bool  # ddp
    static_graph: bool  # ddp
    bucket_mb: int  # ddp: size of the gradients in one all-reduce, in MiB
    # fsdp, hsdp: whether parameters are freed after the forward and gathered again for the backward
    reshard_after_forward: bool
    # dtype in which gradients are summed over ranks; null: float32, or the parameters' own if wider
    reduce_dtype: SumDtype | None


def wrap(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    config: ParallelConfig,
    world: World,
    policy: MixedPrecisionPolicy,
) -> nn.Module:
    """Return the model, wrapped for the configured strategy.

    Under FSDP2 and HSDP each block becomes a parameter group of its own; all other parameters form
    the root's group.

    Args:
        model: a plain module on its device.
        blocks: its blocks, such as transformer layers; only fsdp and hsdp use them.
        config: the strategy and its options.
        world: the ranks that train the model.
        policy: the dtypes that FSDP2 computes and reduces in; only fsdp and hsdp use it.

    Returns:
        A DistributedDataParallel module for ddp, the model sharded in place for fsdp and hsdp, and
        the unchanged model for single.

    Raises:
        ConfigError: if the strategy does not fit the number of ranks.
    """
    name = chosen(config.name, world.size)
    if name is StrategyName.single:
        if world.size > 1:
            raise ConfigError(
                f"parallel=single was chosen on {world.size} ranks, so each rank would train "
                "alone. Use parallel=ddp, fsdp or hsdp."
            )
        return model
    if world.group is None:
        raise ConfigError(
            f"parallel={name.value} needs ranks, but this is a single process without a process "
            "group. Start it with torchrun --nproc-per-node N (N may be 1) or "
            "launch.nproc_per_node=N, or use parallel=single."
        )
    if name is StrategyName.ddp:
        return DistributedDataParallel(
            model,
            find_unused_parameters=config.find_unused_parameters,
            static_graph=config.static_graph,
            bucket_cap_mb=config.bucket_mb,
            gradient_as_bucket_view=False,  # True saves no memory if gradients are set to None
        )
    # torch treats meshes with equal names as equal, and caches what it computes for a mesh. What it
    # cached for a process group that sends nothing (dry run) must not be used for one that sends.
    names = tuple(f"{dim} in {world.group.group_name}" for dim in _NAMES[name])
    mesh = init_device_mesh(
        world.device.type, mesh_shape(name, config.replicas, world.size), mesh_dim_names=names
    )
    for block in blocks:
        fully_shard(
            block, mesh=mesh, mp_policy=policy, reshard_after_forward=config.reshard_after_forward
        )
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return model


def chosen(name: StrategyName, ranks: int) -> StrategyName:
    """Return the strategy that `auto` means on this number of ranks; other names stay unchanged."""
    if name is not StrategyName.auto:
        return name
    return StrategyName.single if ranks == 1 else StrategyName.ddp


_NAMES = {StrategyName.fsdp: ("shard",), StrategyName.hsdp: ("replicate", "shard")}


def mesh_shape(name: StrategyName, replicas: int | None, ranks: int) -> tuple[int, ...]:
    """Return the shape of the device mesh: (shards,) for fsdp, (replicas, shards) for hsdp.

    Raises:
        ConfigError: if `replicas` is below 1 or does not divide the number of ranks.
    """
    if name is StrategyName.fsdp:
        return (ranks,)
    groups = replicas if replicas is not None else 2
    if groups < 1 or ranks % groups:
        raise ConfigError(
            f"parallel.replicas={groups} does not divide {ranks} ranks. HSDP needs replicas x "
            f"shards = ranks: use one of {[n for n in range(1, ranks + 1) if ranks % n == 0]}."
        )
    return groups, ranks // groups
