"""Translates a configuration into what predictions and dry runs need.

That is how its model is distributed over ranks, the memory that a rank may take, and the effective
batches that `accum.micro_batch_size=auto` must keep.
"""

from __future__ import annotations

import torch

from distaccum.app.assembly import effective_batch_sizes
from distaccum.app.config import Config
from distaccum.app.oom import OnOutOfMemory
from distaccum.app.task import Task
from distaccum.core.batch_schedule import Ramp
from distaccum.core.strategies import POLICIES, StrategyName, Sync
from distaccum.errors import ConfigError
from distaccum.parallel.apply import chosen, mesh_shape
from distaccum.planner.shapes import Setup


def setup_of(config: Config, world_size: int) -> Setup:
    """Return how the configured strategy and sync policy distribute the model.

    Nothing is predicted here: `auto` means ddp on several ranks, and gradients sent at the
    boundary.

    Args:
        config: the configuration.
        world_size: the number of ranks.

    Raises:
        ConfigError: if the strategy does not support the policy, or if the number of replicas does
            not divide the number of ranks.
    """
    strategy, sync = chosen(config.parallel.name, world_size), config.accum.sync
    if sync is Sync.auto or strategy is StrategyName.single:
        sync = Sync.boundary
    if sync not in POLICIES[strategy]:
        kept = [policy.value for policy in POLICIES[strategy]]
        raise ConfigError(f"accum.sync={sync} is not supported by {strategy}. Use one of {kept}.")
    return spread(config, world_size, strategy, sync)


def spread(config: Config, world_size: int, strategy: StrategyName, sync: Sync) -> Setup:
    """Return how a given strategy and sync policy distribute the model of a configuration.

    Args:
        config: the configuration, whose strategy and policy are not read.
        world_size: the number of ranks.
        strategy: the strategy to use.
        sync: the sync policy to use.
    """
    precision, parallel, accum = config.precision.name, config.parallel, config.accum
    hsdp = strategy is StrategyName.hsdp
    replicas = mesh_shape(strategy, parallel.replicas, world_size)[0] if hsdp else 1
    return Setup(
        strategy=strategy,
        sync=sync,
        world_size=world_size,
        replicas=replicas,
        compute=(
            precision.compute_dtype
            if precision.compute_dtype is not precision.parameter_dtype
            else None
        ),
        accumulate=None if accum.dtype is None else accum.dtype.torch,
        reduce=None if parallel.reduce_dtype is None else parallel.reduce_dtype.torch,
        reshard_after_forward=parallel.reshard_after_forward,
        find_unused_parameters=parallel.find_unused_parameters and not parallel.static_graph,
        bucket_mb=parallel.bucket_mb,
        apart=accum.on_oom is OnOutOfMemory.shrink,
    )


def usable_bytes(config: Config, device: torch.device) -> int | None:
    """Return the bytes that a rank may take of its device's memory; None: no limit is known.

    The limit is limits.memory, or else the memory of a GPU that other processes do not use.
    limits.margin is subtracted from it.

    Args:
        config: the configuration.
        device: the device of the rank.
    """
    limit = config.limits.memory_bytes
    if limit is None and device.type == "cuda":
        limit = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return None if limit is None else int(limit * (1 - config.limits.margin))


def require_limit(usable: int | None) -> int:
    """Return the memory limit, or raise an error if there is none.

    accum.micro_batch_size=auto needs a limit to know when a size does not fit.

    Args:
        usable: the result of `usable_bytes`.

    Raises:
        ConfigError: if no limit is known.
    """
    if usable is None:
        raise ConfigError(
            "accum.micro_batch_size=auto on the CPU needs a memory limit, because nothing else "
            "says how much memory a rank may take. Set limits.memory, such as limits.memory=2GiB "
            "for each rank, or set accum.micro_batch_size to a number."
        )
    return usable


def batches_for_auto(config: Config, task: Task) -> list[int]:
    """Return the effective batch sizes, which accum.micro_batch_size=auto must not change.

    Args:
        config: the configuration.
        task: the task of the configuration.

    Raises:
        ConfigError: if the configuration does not fix the effective batch sizes, or makes them
            depend on the micro-batch size.
    """
    accum, batches = config.accum, effective_batch_sizes(config, task)
    if not batches or accum.gradient_accumulation_steps is not None:
        others = (
            f"accum.gradient_accumulation_steps={accum.gradient_accumulation_steps} and "
            if accum.gradient_accumulation_steps is not None
            else ""
        )
        raise ConfigError(
            f"accum.micro_batch_size=auto is used with {others}{'an' if batches else 'no'} "
            "effective batch. It needs a fixed effective batch, from which the number of "
            "micro-batches follows once the size is found. Set accum.effective_batch_size (or "
            "effective_batch_tokens, or schedule), and leave accum.gradient_accumulation_steps "
            "null; or set two of accum.effective_batch_size, accum.micro_batch_size and "
            "accum.gradient_accumulation_steps to numbers."
        )
    if accum.schedule is not None and accum.ramp is Ramp.linear:
        raise ConfigError(
            "accum.micro_batch_size=auto cannot be used with accum.ramp=linear: the ramp rises in "
            "multiples of the micro-batch size, so the effective batches would depend on the "
            "available memory. Set accum.micro_batch_size to a number, or use accum.ramp=jump."
        )
    return batches
