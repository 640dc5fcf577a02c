"""Runs `distaccum plan`, which prints what a training would do and need, without running it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from distaccum.app.assembly import batch_arithmetic
from distaccum.app.auto.candidates import Candidate, Candidates, pareto_front
from distaccum.app.auto.footprint import Footprint
from distaccum.app.auto.resolve import machine_of
from distaccum.app.auto.setups import require_limit, usable_bytes
from distaccum.app.build import make_plan, num_steps, schedule_of, schedule_position
from distaccum.app.config import Config, typed
from distaccum.app.summary import batch_section, warmup
from distaccum.app.task import Task, build_task
from distaccum.core.batch_size import BatchArithmetic, nearest_batches
from distaccum.core.plan import Plan
from distaccum.core.strategies import POLICIES, StrategyName
from distaccum.errors import ConfigError
from distaccum.launch import Job
from distaccum.metrics import Console, size
from distaccum.metrics.format import Field as Cell
from distaccum.metrics.format import count
from distaccum.metrics.table import table
from distaccum.metrics.textplot import plot
from distaccum.optim import LRSchedule, make_optimizer
from distaccum.planner.hardware import HardwareProfile
from distaccum.planner.shapes import ModelShape, Setup
from distaccum.planner.traffic import control_sends, gradient_sends
from distaccum.step.overlap.schedule import AUTO

PLOTTED_STEPS = 400  # maximum number of points of a plotted schedule
WORLDS = (1, 8, 64, 512, 4096, 16384)  # numbers of ranks for which the training is compared
TIMES = ["step time", "exposed communication"]  # extra columns if a hardware profile is given
MOST_ROWS = 12  # of the table of Pareto-optimal plans
PARTS = {
    "weights": "weights and buffers",
    "gradients": "gradients",
    "accumulation": "accumulation buffers",
    "optimizer": "optimizer state",
    "gathered": "gathered parameters",
    "buckets": "DDP buckets",
    "messages": "buffers of the reduction",
    "activations": "activations for the backward",
}


def plan(job: Job) -> None:
    """Print what the configured training would do and need, and compare it with other plans.

    Nothing is trained or sent.

    Args:
        job: the configuration, and this process's rank; only rank 0 prints.

    Raises:
        ConfigError: if `train` would refuse the configuration on this number of ranks.
    """
    if job.rank != 0:
        return
    config = typed(job.config)
    world_size = config.world_size or config.launch.world_size or job.world_size
    task = build_task(config)
    machine = machine_of(config)
    on_gpus = config.device.value != "cpu" and torch.cuda.is_available()
    usable = usable_bytes(config, torch.device("cuda" if on_gpus else "cpu"))
    footprint = Footprint(config, task)
    candidates = Candidates(config, task, world_size, machine, footprint)
    if config.accum.micro_batch_size == AUTO:
        require_limit(usable)
    chosen, why = candidates.choice(usable)
    asked, config = config, as_chosen(config, chosen)
    arithmetic = batch_arithmetic(config, task, world_size)
    windows = make_plan(config, task, arithmetic)
    steps = num_steps(config, windows)
    schedule = schedule_of(
        config, task, windows, make_optimizer(torch.nn.Linear(1, 1), config.optim), steps
    )
    console = Console()
    console.start_block(
        {
            "effective batch": {
                **batch_section(arithmetic, windows, task),
                "nearest": _nearest(arithmetic),
            },
            "training": {
                "steps": f"{steps:,}, {windows.start_of(steps) / windows.num_samples:.2f} epochs",
                "warm-up": warmup(config.optim.schedule, schedule),
                "model": (
                    f"{config.model.name}, {sum(p.numel for p in footprint.model.parameters):,} "
                    "parameters"
                ),
                "ranks": f"{world_size}, {chosen.setup.strategy}, sync {chosen.setup.sync}",
                **(
                    {} if machine is None else {"speeds": _speeds(config, footprint.model, machine)}
                ),
            },
        }
    )
    console.line(_memory(footprint, chosen))
    console.line(_network(chosen.setup, footprint.model, arithmetic.gradient_accumulation_steps))
    console.line(_plans(pareto_front(candidates.all()), chosen, why, usable))
    console.line(_worlds(asked, task, machine, footprint, usable))
    console.line(_schedules(config, task, windows, schedule, steps))


def as_chosen(config: Config, chosen: Candidate) -> Config:
    """Replace `auto` in the configuration by the values of the chosen plan.

    Args:
        config: the configuration.
        chosen: the plan to take the values from.
    """
    accum = config.accum
    if accum.micro_batch_size == AUTO:
        accum = replace(accum, micro_batch_size=chosen.micro_batch_size)
    return replace(
        config, accum=accum, parallel=replace(config.parallel, name=chosen.setup.strategy)
    )


def _speeds(config: Config, model: ModelShape, machine: HardwareProfile) -> str:
    """Describe where the predicted times come from, and warn if they are rough."""
    here = f"{config.model.name}, {sum(p.numel for p in model.parameters):,} parameters"
    text = (
        f"{machine.model} in {machine.precision}, {machine.ranks} rank(s) on {machine.device}, "
        f"{machine.date}"
    )
    if (machine.model, machine.precision) == (here, config.precision.name.value):
        return f"measured with {text}"
    return (
        f"measured with {text}; this training has another model or precision, so the times are "
        "rough"
    )


def _nearest(arithmetic: BatchArithmetic) -> str:
    if arithmetic.even:
        return (
            "divides evenly: every rank computes the same number of micro-batches of the same size"
        )
    below, above = nearest_batches(arithmetic)
    return (
        "does not divide evenly; the nearest batch sizes that do: "
        f"{f'{below} or ' if below else ''}{above}"
    )


def _memory(footprint: Footprint, chosen: Candidate) -> str:
    """Format the memory by part, with accumulation and for the same effective batch without it."""
    num_micro_batches, samples = chosen.gradient_accumulation_steps, chosen.micro_batch_size
    peaks = [chosen.peak, footprint.peak(chosen.setup, samples * num_micro_batches, 1)]
    rows: list[list[Cell]] = [
        [text, *(size(peak.parts[part]) for peak in peaks)]
        for part, text in PARTS.items()
        if any(peak.parts[part] for peak in peaks)
    ]
    rows.append(["peak (parts are not all alive at once)", *(size(peak.total) for peak in peaks)])
    rows.append(["  reached in", *(peak.moment for peak in peaks)])
    accumulation = f"{num_micro_batches} micro-batch(es) x {samples} samples"
    columns = [
        "memory per rank",
        accumulation,
        f"1 micro-batch x {samples * num_micro_batches} samples",
    ]
    return table(columns, rows) + "\n"


def _network(setup: Setup, model: ModelShape, num_micro_batches: int) -> str:
    """Format what is sent under every policy of the strategy."""
    if setup.world_size == 1:
        return "network: one rank sends nothing\n"
    sends = [
        (f"{sync} (chosen)" if sync is setup.sync else sync.value, entry)
        for sync in POLICIES[setup.strategy]
        for entry in gradient_sends(model, replace(setup, sync=sync), num_micro_batches)
    ]
    sends += [("any policy", entry) for entry in control_sends(setup)]
    rows: list[list[Cell]] = [
        [
            f"{name}: {entry.what}",
            entry.count,
            size(entry.num_bytes),
            size(entry.bytes_sent_per_rank),
        ]
        for name, entry in sends
    ]
    columns = ["network per step and rank", "collectives", "bytes", "bytes sent (ring)"]
    return table(columns, rows) + "\n"


def _plans(others: Sequence[Candidate], chosen: Candidate, why: str, usable: int | None) -> str:
    """Format the Pareto-optimal plans, and mark the plan that would be run."""
    shown = [*others[:MOST_ROWS], *([] if chosen in others[:MOST_ROWS] else [chosen])]
    rows: list[list[Cell]] = [
        [
            f"{'>' if one == chosen else ' '} {one.setup}",
            one.overlap_micro_batches,
            _micro_batches(one),
            "yes" if one.checkpoint else "no",
            size(one.peak.total)
            + ("" if usable is None or one.peak.total <= usable else " (too much)"),
            count(one.flops),
            size(one.sent_bytes),
            *_time(one),
        ]
        for one in shown
    ]
    columns = [
        "Pareto-optimal plans",
        "overlap",
        "micro-batches x samples",
        "checkpoint",
        "peak memory",
        "FLOPs",
        "bytes sent (ring)",
    ]
    times = TIMES if chosen.time is not None else []
    more = len(others) - MOST_ROWS
    left = f"  and {more} more plan(s), which take less memory and cost more\n" if more > 0 else ""
    return f"{table([*columns, *times], rows)}\n{left}> {chosen}: {why}\n"


def _worlds(
    config: Config,
    task: Task,
    machine: HardwareProfile | None,
    footprint: Footprint,
    usable: int | None,
) -> str:
    """Format the plans for the same effective batch on different numbers of ranks."""
    columns = [
        "ranks",
        "plan",
        "micro-batches x samples",
        "idle ranks",
        "peak memory",
        "bytes sent (ring)",
    ]
    columns += TIMES if machine is not None else []
    rows: list[list[Cell]] = []
    for ranks in WORLDS:
        there = _on_ranks(config, ranks)
        try:
            one, _ = Candidates(there, task, ranks, machine, footprint).choice(usable)
        except ConfigError as error:
            blank = [None] * (len(columns) - 2)
            rows.append([f"{ranks:,}", f"refused: {str(error).split('. ')[0]}", *blank])
            continue
        arithmetic = batch_arithmetic(as_chosen(there, one), task, ranks)
        busy = -(-arithmetic.effective_batch_size // arithmetic.micro_batch_size)
        row: list[Cell] = [f"{ranks:,}", str(one.setup), _micro_batches(one), max(0, ranks - busy)]
        rows.append([*row, size(one.peak.total), size(one.sent_bytes), *_time(one)])
    return table(columns, rows) + "\n"


def _micro_batches(one: Candidate) -> str:
    return f"{one.gradient_accumulation_steps} x {one.micro_batch_size}"


def _time(one: Candidate) -> list[str]:
    """Format the columns `TIMES` of a plan; the second one is a share of the step time."""
    if one.time is None:
        return []
    return [f"{one.time.total_s:.3g} s", f"{one.time.exposed_s / one.time.total_s:.0%}"]


def _on_ranks(config: Config, ranks: int) -> Config:
    """Return the configuration for `ranks` ranks; `single` is used on one rank only."""
    name = config.parallel.name
    if ranks == 1:
        name = StrategyName.single
    elif name is StrategyName.single:
        name = StrategyName.ddp
    return replace(config, parallel=replace(config.parallel, name=name))


def _schedules(config: Config, task: Task, windows: Plan, schedule: LRSchedule, steps: int) -> str:
    """Plot the effective batch and the learning rate over the steps of the training."""
    batches, rates = [], []
    for step in sorted({steps * i // PLOTTED_STEPS for i in range(PLOTTED_STEPS)}):
        window = windows.window(step, windows.start_of(step))
        batches.append((float(step), float(window.effective_batch_size)))
        position = schedule_position(config.optim.schedule.unit, task, windows, step)
        if position is not None:
            rates.append((float(step), schedule.set(position, window.effective_batch_size)))
    panels = {"effective batch (samples)": batches, **({"learning rate": rates} if rates else {})}
    unknown = (
        ""
        if rates
        else (
            "\nlearning rate: not plotted, because it depends on tokens and samples differ in"
            " length"
        )
    )
    return plot(panels, "steps", float(steps)) + unknown
