"""What `auto` stands for: a strategy and a policy by prediction, then a micro size by rehearsal."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from distaccum.app.auto.candidates import Candidates
from distaccum.app.auto.finder import find_micro
from distaccum.app.auto.footprint import Footprint
from distaccum.app.auto.limits import usable_bytes
from distaccum.app.config import Config
from distaccum.app.oom import Predicted
from distaccum.app.task import Problem
from distaccum.errors import ConfigError, in_one_line
from distaccum.parallel.apply import StrategyName, chosen
from distaccum.parallel.base import Sync
from distaccum.parallel.world import World
from distaccum.planner.hardware import Machine
from distaccum.step.overlap.schedule import AUTO


def settled(
    config: Config,
    problem: Problem,
    world: World,
    machine: Machine | None = None,
    kept: int | None = None,
    *,
    anew: bool = False,
) -> tuple[Config, list[str]]:
    """The configuration with what each `auto` stands for, and what people have to know of it. Call it on every rank.

    Args:
        config: any; without `auto` it is returned as it is.
        problem: of the configuration.
        world: the ranks of the run.
        machine: tells times, by which plans are compared; None: by work and messages.
        kept: the micro size that was found before in a run that goes on; None: it is found here.
        anew: whether the run goes on all the same, on other ranks or with other settings.

    Raises:
        ConfigError: on all ranks, see `find_micro`.
    """
    usable = usable_bytes(config, world.device)
    told: list[str] = []
    if usable is not None and is_open(config, world.size):
        rows, _ = world.share([float(usable)]).read()  # GPUs may differ, and all ranks must choose alike
        try:
            config, told = resolved(config, problem, world.size, int(min(row[0] for row in rows)), machine)
        except ConfigError:
            raise
        except Exception as error:  # a model may do what tensors without memory cannot; the same on all ranks
            told = [f"auto as without a limit, as memory cannot be predicted here ({in_one_line(error)})"]
    if config.accum.micro != AUTO:
        return config, told
    if kept is not None:
        told.append(f"accum.micro=auto: {kept} samples, as found before; nothing was rehearsed")
    else:
        found = find_micro(config, problem, world)
        kept = found.micro_size
        told.append(found.text + ("; found anew, as ranks or settings are others than before" if anew else ""))
    return replace(config, accum=replace(config.accum, micro=kept)), told


def is_open(config: Config, world_size: int) -> bool:
    """Whether there is a strategy or a policy to choose."""
    if config.parallel.name is StrategyName.auto:
        return world_size > 1
    return config.accum.sync is Sync.auto and config.parallel.name in (StrategyName.fsdp, StrategyName.hsdp)


def resolved(
    config: Config, problem: Problem, world_size: int, usable: int | None, machine: Machine | None
) -> tuple[Config, list[str]]:
    """The configuration with a strategy and a policy in the place of `auto`, and why.

    Without a limit of memory `auto` stays what it is: ddp on several ranks, and gradients sent at the boundary.
    """
    if usable is None or not is_open(config, world_size):
        return config, []
    candidates = Candidates(config, problem, world_size, machine, Footprint(config, problem))
    best, why = candidates.choice(usable)
    setup, keys = best.setup, []
    if config.parallel.name is StrategyName.auto:
        keys.append(f"parallel=auto: {setup.strategy}")
    if config.accum.sync is Sync.auto and setup.sharded:
        keys.append(f"accum.sync=auto: {setup.sync}")
    parallel = replace(config.parallel, name=StrategyName(setup.strategy))
    accum = replace(config.accum, sync=Sync(setup.sync))
    return replace(config, parallel=parallel, accum=accum), [f"{', '.join(keys)}: {why}"]


def predicted(config: Config, problem: Problem, world_size: int, machine: Machine | None) -> Predicted:
    """What a step of a configuration without `auto` should need on rank 0."""
    name = chosen(config.parallel.name, world_size)
    config = replace(config, parallel=replace(config.parallel, name=name))
    one = Candidates(config, problem, world_size, machine, Footprint(config, problem)).configured()
    return Predicted(one.peak.total, one.peak.moment, None if one.time is None else one.time.total_s)


def machine_of(config: Config) -> Machine | None:
    """The speeds that the configuration names.

    Raises:
        ConfigError: for a file that holds none.
    """
    return None if config.machine is None else Machine.load(Path(config.machine))
