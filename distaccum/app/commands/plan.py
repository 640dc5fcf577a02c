"""Runs `distaccum plan`, which prints what a training would do and need, without running it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from distaccum.app.assembly import batch_arithmetic
from distaccum.app.auto.candidates import Candidate, Candidates, pareto_front
from distaccum.app.auto.footprint import Footprint
from distaccum.app.auto.limits import require_limit, usable_bytes
from distaccum.app.auto.resolve import machine_of
from distaccum.app.auto.setups import POLICIES
from distaccum.app.build import make_plan, num_steps, schedule_of, schedule_position
from distaccum.app.config import Config, typed
from distaccum.app.summary import batch_section, warmup
from distaccum.app.task import Task, build_task
from distaccum.core.batch_size import BatchArithmetic, nearest_batches
from distaccum.core.plan import Plan
from distaccum.core.strategies import StrategyName
from distaccum.errors import ConfigError
from distaccum.launch import Job
from distaccum.metrics import Console, size
from distaccum.metrics.format import count
from distaccum.metrics.table import Cell, table
from distaccum.metrics.textplot import plot
from distaccum.optim import LRSchedule, make_optimizer
from distaccum.planner import CollectiveCost, ModelShape, Setup, control_sends, gradient_sends
from distaccum.planner.hardware import HardwareProfile
from distaccum.step.overlap.schedule import AUTO

PLOTTED_STEPS = 400  # maximum number of points of a plotted schedule
WORLDS = (1, 8, 64, 512, 4096, 16384)  # numbers of ranks for which the training is compared
TIMES = ["step time", "exposed communication"]  # extra columns if a hardware profile is given
MOST_ROWS = 12  # of the table of Pareto-optimal plans


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
    schedule = schedule_of(config, task, windows, make_optimizer(torch.nn.Linear(1, 1), config.optim), steps)
    console = Console()
    console.start_block(
        {
            "effective batch": {**batch_section(arithmetic, windows, task), "nearest": _nearest(arithmetic)},
            "training": {
                "steps": f"{steps:,}, {windows.start_of(steps) / windows.num_samples:.2f} epochs",
                "warm-up": warmup(config.optim.schedule, schedule),
                "model": f"{config.model.name}, {sum(p.numel for p in footprint.model.parameters):,} parameters",
                "ranks": f"{world_size}, {chosen.setup.strategy}, sync {chosen.setup.sync}",
                **({} if machine is None else {"speeds": _speeds(config, footprint.model, machine)}),
            },
        }
    )
    console.line(_memory(footprint, chosen))
    console.line(_network(chosen.setup, footprint.model, arithmetic, world_size))
    console.line(_plans(pareto_front(candidates.all()), chosen, why, usable))
    console.line(_worlds(asked, task, machine, footprint, usable))
    console.line(_schedules(config, task, windows, schedule, steps))


def as_chosen(config: Config, chosen: Candidate) -> Config:
    """Replace `auto` in the configuration by the values of the chosen plan.

    Args:
        config: the configuration.
        chosen: the plan to take the values from.
    """
    if config.accum.micro_batch_size == AUTO:
        config = replace(config, accum=replace(config.accum, micro_batch_size=chosen.micro_batch_size))
    if config.parallel.name is StrategyName.auto:
        config = replace(config, parallel=replace(config.parallel, name=StrategyName(chosen.setup.strategy)))
    return config


def _speeds(config: Config, model: ModelShape, machine: HardwareProfile) -> str:
    """Describe where the predicted times come from, and warn if they are rough."""
    here = f"{config.model.name}, {sum(p.numel for p in model.parameters):,} parameters"
    text = f"{machine.model} in {machine.precision}, {machine.ranks} rank(s) on {machine.device}, {machine.date}"
    if (machine.model, machine.precision) == (here, config.precision.name.value):
        return f"measured with {text}"
    return f"measured with {text}; this training has another model or precision, so the times are rough"


def _nearest(arithmetic: BatchArithmetic) -> str:
    if arithmetic.even:
        return "divides evenly: every rank computes the same number of micro-batches of the same size"
    below, above = nearest_batches(arithmetic)
    return f"does not divide evenly; the nearest batch sizes that do: {f'{below} or ' if below else ''}{above}"


def _memory(footprint: Footprint, chosen: Candidate) -> str:
    """Format the memory by part, with accumulation and for the same effective batch without it."""
    setup, micro_batches, micro_batch = chosen.setup, chosen.gradient_accumulation_steps, chosen.micro_batch_size
    both = ((micro_batch, micro_batches), (micro_batch * micro_batches, 1))
    accumulated, at_once = (footprint.memory(setup, samples, number) for samples, number in both)
    peaks = [
        footprint.peak(setup, micro_batch, micro_batches, chosen.overlap_micro_batches),
        footprint.peak(setup, micro_batch * micro_batches, 1),
    ]
    names = {
        "weights": "weights and buffers",
        "gradients": "gradients",
        "accumulation": "accumulation buffers",
        "optimizer": "optimizer state",
        "gathered": "gathered parameters",
        "buckets": "DDP buckets",
        "messages": "buffers of the reduction",
        "activations": "activations for the backward",
    }
    rows: list[list[Cell]] = []
    for name, text in names.items():
        values = getattr(accumulated, name), getattr(at_once, name)
        if any(values):
            rows.append([text, *map(size, values)])
    rows.append(["peak (parts are not all alive at once)", *(size(peak.total) for peak in peaks)])
    rows.append(["  reached in", *(peak.moment for peak in peaks)])
    accumulation = f"{micro_batches} micro-batch(es) x {micro_batch} samples"
    columns = ["memory per rank", accumulation, f"1 micro-batch x {micro_batch * micro_batches} samples"]
    return table(columns, rows) + "\n"


def _network(setup: Setup, model: ModelShape, arithmetic: BatchArithmetic, world_size: int) -> str:
    if world_size == 1:
        return "network: one rank sends nothing\n"
    rows = []
    for policy in POLICIES[setup.strategy]:
        sends = gradient_sends(model, replace(setup, sync=policy), arithmetic.gradient_accumulation_steps)
        chosen_one = " (chosen)" if policy == setup.sync else ""
        rows += [_row(f"{policy}{chosen_one}: {entry.what}", entry) for entry in sends]
    rows += [
        _row(f"any policy: {entry.what}", entry)
        for entry in control_sends(world_size, num_terms=1, rows=1 + setup.apart)
    ]
    columns = ["network per step and rank", "collectives", "bytes", "bytes sent (ring)"]
    return table(columns, rows) + "\n"


def _row(name: str, entry: CollectiveCost) -> list[str | int]:
    return [name, entry.count, size(entry.num_bytes), size(entry.bytes_sent_per_rank)]


def _plans(others: Sequence[Candidate], chosen: Candidate, why: str, usable: int | None) -> str:
    """Format the Pareto-optimal plans, and mark the plan that would be run."""
    rows = []
    for one in [*others[:MOST_ROWS], *([] if chosen in others[:MOST_ROWS] else [chosen])]:
        fits = "" if usable is None or one.peak.total <= usable else " (too much)"
        rows.append(
            [
                f"{'>' if one == chosen else ' '} {one.setup.strategy} {one.setup.sync}",
                one.overlap_micro_batches,
                f"{one.gradient_accumulation_steps} x {one.micro_batch_size}",
                "yes" if one.checkpoint else "no",
                f"{size(one.peak.total)}{fits}",
                count(one.flops),
                size(one.sent_bytes),
                *_time(one),
            ]
        )
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
    config: Config, task: Task, machine: HardwareProfile | None, footprint: Footprint, usable: int | None
) -> str:
    """Format the plans for the same effective batch on different numbers of ranks."""
    rows: list[list[Cell]] = []
    for ranks in WORLDS:
        there = _on_ranks(config, ranks)
        candidates = Candidates(there, task, ranks, machine, footprint)
        try:
            one, _ = candidates.choice(usable)
        except ConfigError as error:
            blank = [None] * (4 + 2 * (machine is not None))
            rows.append([f"{ranks:,}", f"refused: {str(error).split('. ')[0]}", *blank])
            continue
        arithmetic = batch_arithmetic(as_chosen(there, one), task, ranks)
        idle = max(0, ranks - -(-arithmetic.effective_batch_size // arithmetic.micro_batch_size))
        plan = f"{one.setup.strategy} {one.setup.sync}"
        peak, sent = size(one.peak.total), size(one.sent_bytes)
        rows.append(
            [
                f"{ranks:,}",
                plan,
                f"{one.gradient_accumulation_steps} x {one.micro_batch_size}",
                idle,
                peak,
                sent,
                *_time(one),
            ]
        )
    columns = ["ranks", "plan", "micro-batches x samples", "idle ranks", "peak memory", "bytes sent (ring)"]
    return table([*columns, *(TIMES if machine is not None else [])], rows) + "\n"


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
    unknown = "" if rates else "\nlearning rate: not plotted, because it depends on tokens and samples differ in length"
    return plot(panels, "steps", float(steps)) + unknown
