"""Resolves `auto`: strategy and sync policy by prediction, micro-batch size by dry runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from distaccum.app.auto.candidates import Candidates
from distaccum.app.auto.finder import find_max_micro_batch
from distaccum.app.auto.footprint import Footprint
from distaccum.app.auto.setups import usable_bytes
from distaccum.app.config import Config
from distaccum.app.oom import Predicted
from distaccum.app.task import Task
from distaccum.core.strategies import StrategyName, Sync
from distaccum.errors import ConfigError, in_one_line
from distaccum.parallel.apply import chosen
from distaccum.parallel.world import World
from distaccum.planner.hardware import HardwareProfile
from distaccum.step.overlap.schedule import AUTO


def resolve_auto(
    config: Config,
    task: Task,
    world: World,
    machine: HardwareProfile | None = None,
    kept: int | None = None,
    *,
    resumed: bool = False,
) -> tuple[Config, list[str]]:
    """Resolve `auto` for strategy, policy and micro-batch size. Call it on every rank.

    Args:
        config: the configuration; without `auto` it is returned unchanged.
        task: the task of the configuration.
        world: the ranks of the run.
        machine: the measured speeds, so that plans are compared by their times; None: they are
            compared by FLOPs and bytes sent.
        kept: the micro-batch size that this run found before it was resumed; None: it is found
            here.
        resumed: whether the run is resumed. Without `kept` it then runs on other ranks or with
            other settings than before.

    Returns:
        The configuration with the choices, and messages that explain them. Strategy and policy
        remain `auto` if no memory limit is known.

    Raises:
        ConfigError: on all ranks, see `find_max_micro_batch`.
    """
    usable = usable_bytes(config, world.device)
    messages: list[str] = []
    if usable is not None and has_auto(config, world.size):
        # GPUs may differ, but all ranks must make the same choice.
        rows, _ = world.gather_rows([float(usable)]).read()
        try:
            config, messages = resolved(
                config, task, world.size, int(min(row[0] for row in rows)), machine
            )
        except ConfigError:
            raise
        except Exception as error:  # the model does what fake tensors cannot; the same on all ranks
            messages = [
                "auto ignores the memory limit, because the memory of this model cannot be "
                f"predicted ({in_one_line(error)})"
            ]
    if config.accum.micro_batch_size != AUTO:
        return config, messages
    if kept is not None:
        messages.append(
            f"accum.micro_batch_size=auto: {kept} samples, as found before; no dry run was needed"
        )
    else:
        found = find_max_micro_batch(config, task, world)
        kept = found.micro_batch_size
        messages.append(
            found.text + ("; found again, because the ranks or settings changed" if resumed else "")
        )
    return replace(config, accum=replace(config.accum, micro_batch_size=kept)), messages


def has_auto(config: Config, world_size: int) -> bool:
    """Return whether `auto` leaves a strategy or a policy to choose on this number of ranks."""
    if config.parallel.name is StrategyName.auto:
        return world_size > 1
    return config.accum.sync is Sync.auto and config.parallel.name in (
        StrategyName.fsdp,
        StrategyName.hsdp,
    )


def resolved(
    config: Config, task: Task, world_size: int, usable: int | None, machine: HardwareProfile | None
) -> tuple[Config, list[str]]:
    """Replace `auto` in the configuration by a strategy and a policy, and explain the choice.

    Without a memory limit the configuration is returned unchanged. `auto` then means ddp on several
    ranks, and gradients sent at the boundary.

    Args:
        config: the configuration.
        task: the task of the configuration.
        world_size: the number of ranks.
        usable: bytes that each rank may take; None: no limit is known.
        machine: the measured speeds; None: plans are compared by FLOPs and bytes sent.
    """
    if usable is None or not has_auto(config, world_size):
        return config, []
    candidates = Candidates(config, task, world_size, machine, Footprint(config, task))
    best, why = candidates.choice(usable)
    setup, keys = best.setup, []
    if config.parallel.name is StrategyName.auto:
        keys.append(f"parallel=auto: {setup.strategy}")
    if config.accum.sync is Sync.auto and setup.sharded:
        keys.append(f"accum.sync=auto: {setup.sync}")
    parallel = replace(config.parallel, name=setup.strategy)
    accum = replace(config.accum, sync=setup.sync)
    return replace(config, parallel=parallel, accum=accum), [f"{', '.join(keys)}: {why}"]


def predicted(
    config: Config, task: Task, world_size: int, machine: HardwareProfile | None
) -> Predicted:
    """Predict the memory and time of a step on rank 0 for a configuration without `auto`."""
    name = chosen(config.parallel.name, world_size)
    config = replace(config, parallel=replace(config.parallel, name=name))
    one = Candidates(config, task, world_size, machine, Footprint(config, task)).configured()
    return Predicted(
        one.peak.total, one.peak.moment, None if one.time is None else one.time.total_s
    )


def machine_of(config: Config) -> HardwareProfile | None:
    """Return the hardware profile that the configuration names; None: it names none.

    Raises:
        ConfigError: if the file does not hold a hardware profile.
    """
    return None if config.machine is None else HardwareProfile.load(Path(config.machine))
