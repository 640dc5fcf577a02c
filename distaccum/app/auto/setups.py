"""Derives from a configuration how its model is distributed over ranks, for the predictions."""

from __future__ import annotations

from distaccum.app.config import Config
from distaccum.app.oom import OnOutOfMemory
from distaccum.core.strategies import StrategyName, Sync
from distaccum.errors import ConfigError
from distaccum.parallel.apply import chosen, mesh_shape
from distaccum.planner.shapes import Policy, Setup, Strategy

POLICIES: dict[Strategy, tuple[Policy, ...]] = {
    "single": ("boundary",),
    "ddp": ("boundary", "every"),
    "fsdp": ("boundary", "gather_once", "every"),
    "hsdp": ("boundary", "gather_once", "reduce_scatter", "every"),
}
_STRATEGIES: dict[StrategyName, Strategy] = {
    StrategyName.single: "single",
    StrategyName.ddp: "ddp",
    StrategyName.fsdp: "fsdp",
    StrategyName.hsdp: "hsdp",
}


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
    strategy = _STRATEGIES[chosen(config.parallel.name, world_size)]
    asked = "boundary" if config.accum.sync is Sync.auto or strategy == "single" else config.accum.sync.value
    sync = next((policy for policy in POLICIES[strategy] if policy == asked), None)
    if sync is None:
        raise ConfigError(f"accum.sync={asked} is not supported by {strategy}. Use one of {list(POLICIES[strategy])}.")
    return spread(config, world_size, strategy, sync)


def spread(config: Config, world_size: int, strategy: Strategy, sync: Policy) -> Setup:
    """Return how a given strategy and sync policy distribute the model of a configuration.

    Args:
        config: the configuration, whose strategy and policy are not read.
        world_size: the number of ranks.
        strategy: the strategy to use.
        sync: the sync policy to use.
    """
    precision, parallel, accum = config.precision.name, config.parallel, config.accum
    replicas = mesh_shape(StrategyName.hsdp, parallel.replicas, world_size)[0] if strategy == "hsdp" else 1
    return Setup(
        strategy=strategy,
        sync=sync,
        world_size=world_size,
        replicas=replicas,
        compute=precision.compute_dtype if precision.compute_dtype is not precision.parameter_dtype else None,
        accumulate=None if accum.dtype is None else accum.dtype.torch,
        reduce=None if parallel.reduce_dtype is None else parallel.reduce_dtype.torch,
        reshard_after_forward=parallel.reshard_after_forward,
        find_unused_parameters=parallel.find_unused_parameters and not parallel.static_graph,
        bucket_mb=parallel.bucket_mb,
        apart=accum.on_oom is OnOutOfMemory.shrink,
    )
