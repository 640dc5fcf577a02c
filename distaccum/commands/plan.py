"""`distaccum plan`: what a training would be, do and need, without running it."""

from __future__ import annotations

from dataclasses import replace

import torch

from distaccum.batch_arithmetic import BatchArithmetic, nearest_batches
from distaccum.build import batch_arithmetic, make_plan, num_steps, schedule_of
from distaccum.config import Config, typed
from distaccum.errors import ConfigError
from distaccum.footprint import activations
from distaccum.launch import Job
from distaccum.optim import make_optimizer
from distaccum.parallel.base import Sync
from distaccum.plan import Plan
from distaccum.predict import (
    Sends,
    Setup,
    control_sends,
    describe,
    gradient_sends,
    memory,
    states_of,
)
from distaccum.predict.shapes import ModelShape, Policy, Strategy
from distaccum.problem import Problem, make_problem, meta_model
from distaccum.report import Console, size
from distaccum.report.table import table
from distaccum.report.textplot import plot
from distaccum.summary import batch_section
from distaccum.wrap import StrategyName, chosen, mesh_shape

POLICIES: dict[Strategy, tuple[Policy, ...]] = {
    "single": ("boundary",),
    "ddp": ("boundary", "every"),
    "fsdp": ("boundary", "keep", "every"),
    "hsdp": ("boundary", "keep", "shard", "every"),
}
PLOTTED_STEPS = 400  # at most so many points of a schedule are computed


def plan(job: Job) -> None:
    """Print the arithmetic, the memory of a rank, the traffic of a step and the schedules. Trains and sends nothing.

    Raises:
        ConfigError: for what `train` would refuse on so many ranks.
    """
    if job.rank != 0:
        return
    config = typed(job.config)
    world_size = config.world_size or config.launch.world_size or job.world_size
    problem = make_problem(config)
    arithmetic = batch_arithmetic(config, problem, world_size)
    windows = make_plan(config, problem, arithmetic)
    steps = num_steps(config, windows)
    setup = _setup(config, world_size)
    model = describe_model(config, problem)
    console = Console()
    console.start_block(
        {
            "effective batch": {**batch_section(arithmetic, windows, problem), "nearest": _nearest(arithmetic)},
            "training": {
                "steps": f"{steps:,}, {windows.start_of(steps) / windows.num_samples:.2f} epochs",
                "model": f"{config.model.name}, {sum(p.numel for p in model.parameters):,} parameters",
                "ranks": f"{world_size}, {setup.strategy}, sync {setup.sync}",
            },
        }
    )
    console.line(_memory(config, problem, setup, model, arithmetic))
    console.line(_network(setup, model, arithmetic, world_size))
    console.line(_schedules(config, problem, windows, steps))


def describe_model(config: Config, problem: Problem) -> ModelShape:
    """The shapes of the configured model."""
    model = meta_model(config, problem)
    return describe(model, problem.blocks_of(model))


def _setup(config: Config, world_size: int) -> Setup:
    name = chosen(config.parallel.name, world_size)
    sharded = name in (StrategyName.fsdp, StrategyName.hsdp)
    mesh = mesh_shape(name, config.parallel.replicas, world_size) if sharded else ()
    precision, parallel, accum = config.precision.name, config.parallel, config.accum
    strategies: dict[StrategyName, Strategy] = {
        StrategyName.single: "single",
        StrategyName.ddp: "ddp",
        StrategyName.fsdp: "fsdp",
        StrategyName.hsdp: "hsdp",
    }
    strategy = strategies[name]
    asked = "boundary" if accum.sync is Sync.auto or strategy == "single" else accum.sync.value
    sync = next((policy for policy in POLICIES[strategy] if policy == asked), None)
    if sync is None:
        raise ConfigError(f"accum.sync={asked} cannot be kept by {strategy}. Use one of {list(POLICIES[strategy])}.")
    return Setup(
        strategy=strategy,
        sync=sync,
        world_size=world_size,
        replicas=mesh[0] if len(mesh) == 2 else 1,
        compute=precision.compute_dtype if precision.compute_dtype is not precision.parameter_dtype else None,
        accumulate=None if accum.dtype is None else accum.dtype.torch,
        reduce=None if parallel.reduce_dtype is None else parallel.reduce_dtype.torch,
        reshard_after_forward=parallel.reshard_after_forward,
        find_unused_parameters=parallel.find_unused_parameters and not parallel.static_graph,
        bucket_mb=parallel.bucket_mb,
    )


def _nearest(arithmetic: BatchArithmetic) -> str:
    if arithmetic.even:
        return "divides: every rank computes the same number of micros of the same size"
    below, above = nearest_batches(arithmetic)
    return f"does not divide; the nearest that do: {f'{below} or ' if below else ''}{above}"


def _memory(config: Config, problem: Problem, setup: Setup, model: ModelShape, arithmetic: BatchArithmetic) -> str:
    states = states_of(config.optim.name.value, config.optim.momentum)
    micros = arithmetic.num_micros
    one, two = (activations(config, problem, factor * arithmetic.micro_size) for factor in (1, 2))
    whole = one + (two - one) * (micros - 1)  # linear in the samples, beside what autocast keeps of the parameters
    accumulated = memory(model, setup, states, micros, one)
    at_once = memory(model, setup, states, 1, whole)  # the same effective batch without accumulation
    names = {
        "weights": "weights and buffers",
        "gradients": "gradients",
        "accumulation": "accumulation buffers",
        "optimizer": "optimizer state",
        "gathered": "gathered parameters",
        "buckets": "DDP's buckets",
        "messages": "messages of the reduction",
        "activations": "activations for the backward",
        "total": "together at most",
    }
    rows = []
    for name, text in names.items():
        both = getattr(accumulated, name), getattr(at_once, name)
        if any(both):
            rows.append([text, *map(size, both)])
    with_it = f"{micros} x {arithmetic.micro_size} samples"
    return table(["memory per rank", with_it, f"1 x {micros * arithmetic.micro_size} samples"], rows) + "\n"


def _network(setup: Setup, model: ModelShape, arithmetic: BatchArithmetic, world_size: int) -> str:
    if world_size == 1:
        return "network: nothing travels on one rank\n"
    rows = []
    for policy in POLICIES[setup.strategy]:
        sends = gradient_sends(model, replace(setup, sync=policy), arithmetic.num_micros)
        chosen_one = " (chosen)" if policy == setup.sync else ""
        rows += [_row(f"{policy}{chosen_one}: {entry.what}", entry) for entry in sends]
    rows += [_row(f"each: {entry.what}", entry) for entry in control_sends(world_size, num_terms=1)]
    columns = ["network per step and rank", "collectives", "bytes", "sent by a ring"]
    return table(columns, rows) + "\n"


def _row(name: str, entry: Sends) -> list[str | int]:
    return [name, entry.count, size(entry.num_bytes), size(entry.card_bytes)]


def _schedules(config: Config, problem: Problem, windows: Plan, steps: int) -> str:
    """The effective batch and the learning rate along the training, as `train` will set them."""
    optimizer = make_optimizer(torch.nn.Linear(1, 1), config.optim)
    schedule = schedule_of(config, problem, windows, optimizer, steps)
    batches, rates = [], []
    for step in sorted({steps * i // PLOTTED_STEPS for i in range(PLOTTED_STEPS)}):
        window = windows.window(step, windows.start_of(step))
        tokens = window.start * (problem.tokens_per_sample or 1)
        position = {"steps": step, "samples": window.start, "tokens": tokens}[config.optim.schedule.unit.value]
        schedule.set(position, window.effective_batch)
        batches.append((float(step), float(window.effective_batch)))
        rates.append((float(step), float(optimizer.param_groups[0]["lr"])))
    return plot({"effective batch (samples)": batches, "learning rate": rates}, "steps", float(steps))
