"""`distaccum plan`: what a training would be, do and need, without running it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from distaccum.app.assembly import batch_arithmetic
from distaccum.app.auto.candidates import Candidate, Candidates, front
from distaccum.app.auto.footprint import Footprint
from distaccum.app.auto.limits import require_limit, usable_bytes
from distaccum.app.auto.resolve import machine_of
from distaccum.app.auto.setups import POLICIES
from distaccum.app.build import make_plan, num_steps, schedule_of, schedule_position
from distaccum.app.config import Config, typed
from distaccum.app.summary import batch_section, warmup
from distaccum.app.task import Problem, make_problem
from distaccum.core.batch_size import BatchArithmetic, nearest_batches
from distaccum.core.plan import Plan
from distaccum.errors import ConfigError
from distaccum.launch import Job
from distaccum.metrics import Console, size
from distaccum.metrics.format import count
from distaccum.metrics.table import Cell, table
from distaccum.metrics.textplot import plot
from distaccum.optim import LRSchedule, make_optimizer
from distaccum.parallel.apply import StrategyName
from distaccum.planner import ModelShape, Sends, Setup, control_sends, gradient_sends
from distaccum.planner.hardware import Machine
from distaccum.step.overlap.schedule import AUTO

PLOTTED_STEPS = 400  # at most so many points of a schedule are computed
WORLDS = (1, 8, 64, 512, 4096, 16384)  # ranks for which the same training is told
TIMES = ["time", "waiting"]  # columns, where speeds are known
MOST_ROWS = 12  # of the plans that no other one beats


def plan(job: Job) -> None:
    """Print what the training would be and need, and the other ways of running it. Trains and sends nothing.

    Raises:
        ConfigError: for what `train` would refuse on so many ranks.
    """
    if job.rank != 0:
        return
    config = typed(job.config)
    world_size = config.world_size or config.launch.world_size or job.world_size
    problem = make_problem(config)
    machine = machine_of(config)
    on_gpus = config.device.value != "cpu" and torch.cuda.is_available()
    usable = usable_bytes(config, torch.device("cuda" if on_gpus else "cpu"))
    footprint = Footprint(config, problem)
    candidates = Candidates(config, problem, world_size, machine, footprint)
    if config.accum.micro == AUTO:
        require_limit(usable)
    chosen, why = candidates.choice(usable)
    asked, config = config, as_chosen(config, chosen)
    arithmetic = batch_arithmetic(config, problem, world_size)
    windows = make_plan(config, problem, arithmetic)
    steps = num_steps(config, windows)
    schedule = schedule_of(config, problem, windows, make_optimizer(torch.nn.Linear(1, 1), config.optim), steps)
    console = Console()
    console.start_block(
        {
            "effective batch": {**batch_section(arithmetic, windows, problem), "nearest": _nearest(arithmetic)},
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
    console.line(_plans(front(candidates.all()), chosen, why, usable))
    console.line(_worlds(asked, problem, machine, footprint, usable))
    console.line(_schedules(config, problem, windows, schedule, steps))


def as_chosen(config: Config, chosen: Candidate) -> Config:
    """The configuration with the choice in the place of `auto`."""
    if config.accum.micro == AUTO:
        config = replace(config, accum=replace(config.accum, micro=chosen.micro_size))
    if config.parallel.name is StrategyName.auto:
        config = replace(config, parallel=replace(config.parallel, name=StrategyName(chosen.setup.strategy)))
    return config


def _speeds(config: Config, model: ModelShape, machine: Machine) -> str:
    """Where times come from, and whether they can be trusted."""
    here = f"{config.model.name}, {sum(p.numel for p in model.parameters):,} parameters"
    text = f"{machine.model} in {machine.precision}, {machine.ranks} rank(s) on {machine.device}, {machine.date}"
    if (machine.model, machine.precision) == (here, config.precision.name.value):
        return f"measured with {text}"
    return f"measured with {text}; this model or precision is another one, so that times are rough"


def _nearest(arithmetic: BatchArithmetic) -> str:
    if arithmetic.even:
        return "divides: every rank computes the same number of micros of the same size"
    below, above = nearest_batches(arithmetic)
    return f"does not divide; the nearest that do: {f'{below} or ' if below else ''}{above}"


def _memory(footprint: Footprint, chosen: Candidate) -> str:
    """Part by part with accumulation, and for the same effective batch without it."""
    setup, micros, micro = chosen.setup, chosen.num_micros, chosen.micro_size
    both = ((micro, micros), (micro * micros, 1))
    accumulated, at_once = (footprint.memory(setup, samples, number) for samples, number in both)
    peaks = [footprint.peak(setup, micro, micros, chosen.overlap_micros), footprint.peak(setup, micro * micros, 1)]
    names = {
        "weights": "weights and buffers",
        "gradients": "gradients",
        "accumulation": "accumulation buffers",
        "optimizer": "optimizer state",
        "gathered": "gathered parameters",
        "buckets": "DDP's buckets",
        "messages": "messages of the reduction",
        "activations": "activations for the backward",
    }
    rows: list[list[Cell]] = []
    for name, text in names.items():
        values = getattr(accumulated, name), getattr(at_once, name)
        if any(values):
            rows.append([text, *map(size, values)])
    rows.append(["peak, as not all live at once", *(size(peak.total) for peak in peaks)])
    rows.append(["  in", *(peak.moment for peak in peaks)])
    columns = [
        "memory per rank (parts do not all live at once)",
        f"{micros} x {micro} samples",
        f"1 x {micro * micros}",
    ]
    return table(columns, rows) + "\n"


def _network(setup: Setup, model: ModelShape, arithmetic: BatchArithmetic, world_size: int) -> str:
    if world_size == 1:
        return "network: nothing travels on one rank\n"
    rows = []
    for policy in POLICIES[setup.strategy]:
        sends = gradient_sends(model, replace(setup, sync=policy), arithmetic.num_micros)
        chosen_one = " (chosen)" if policy == setup.sync else ""
        rows += [_row(f"{policy}{chosen_one}: {entry.what}", entry) for entry in sends]
    rows += [
        _row(f"each: {entry.what}", entry) for entry in control_sends(world_size, num_terms=1, rows=1 + setup.apart)
    ]
    columns = ["network per step and rank", "collectives", "bytes", "sent by a ring"]
    return table(columns, rows) + "\n"


def _row(name: str, entry: Sends) -> list[str | int]:
    return [name, entry.count, size(entry.num_bytes), size(entry.card_bytes)]


def _plans(others: Sequence[Candidate], chosen: Candidate, why: str, usable: int | None) -> str:
    """Those that no other one beats, and the one that would be run."""
    rows = []
    for one in [*others[:MOST_ROWS], *([] if chosen in others[:MOST_ROWS] else [chosen])]:
        fits = "" if usable is None or one.peak.total <= usable else ", too much"
        rows.append(
            [
                f"{'>' if one == chosen else ' '} {one.setup.strategy} {one.setup.sync}",
                one.overlap_micros,
                f"{one.num_micros} x {one.micro_size}",
                "yes" if one.checkpoint else "no",
                f"{size(one.peak.total)}{fits}",
                count(one.flops),
                size(one.sent_bytes),
                *_time(one),
            ]
        )
    columns = ["plans that no other one beats", "T", "micros", "checkpoint", "peak memory", "FLOPs", "sent by a ring"]
    times = TIMES if chosen.time is not None else []
    more = len(others) - MOST_ROWS
    left = f"  and {more} more, which take less memory and cost more\n" if more > 0 else ""
    return f"{table([*columns, *times], rows)}\n{left}> {chosen}: {why}\n"


def _worlds(config: Config, problem: Problem, machine: Machine | None, footprint: Footprint, usable: int | None) -> str:
    """The same training on more and more ranks: the effective batch stays, so that each has less to do."""
    rows: list[list[Cell]] = []
    for ranks in WORLDS:
        there = _on_ranks(config, ranks)
        candidates = Candidates(there, problem, ranks, machine, footprint)
        try:
            one, _ = candidates.choice(usable)
        except ConfigError as error:
            blank = [None] * (4 + 2 * (machine is not None))
            rows.append([f"{ranks:,}", f"refused: {str(error).split('. ')[0]}", *blank])
            continue
        arithmetic = batch_arithmetic(as_chosen(there, one), problem, ranks)
        idle = max(0, ranks - -(-arithmetic.effective_batch // arithmetic.micro_size))
        plan = f"{one.setup.strategy} {one.setup.sync}"
        peak, sent = size(one.peak.total), size(one.sent_bytes)
        rows.append([f"{ranks:,}", plan, f"{one.num_micros} x {one.micro_size}", idle, peak, sent, *_time(one)])
    columns = ["on so many ranks", "plan", "micros", "ranks without", "peak memory", "sent by a ring"]
    return table([*columns, *(TIMES if machine is not None else [])], rows) + "\n"


def _time(one: Candidate) -> list[str]:
    if one.time is None:
        return []
    return [f"{one.time.total_s:.3g} s", f"{one.time.exposed_s / one.time.total_s:.0%}"]


def _on_ranks(config: Config, ranks: int) -> Config:
    """One process needs no strategy, and one strategy cannot serve several ranks."""
    name = config.parallel.name
    if ranks == 1:
        name = StrategyName.single
    elif name is StrategyName.single:
        name = StrategyName.ddp
    return replace(config, parallel=replace(config.parallel, name=name))


def _schedules(config: Config, problem: Problem, windows: Plan, schedule: LRSchedule, steps: int) -> str:
    """The effective batch and the learning rate along the training, as `train` will set them."""
    batches, rates = [], []
    for step in sorted({steps * i // PLOTTED_STEPS for i in range(PLOTTED_STEPS)}):
        window = windows.window(step, windows.start_of(step))
        batches.append((float(step), float(window.effective_batch)))
        position = schedule_position(config.optim.schedule.unit, problem, windows, step)
        if position is not None:
            rates.append((float(step), schedule.set(position, window.effective_batch)))
    panels = {"effective batch (samples)": batches, **({"learning rate": rates} if rates else {})}
    unknown = "" if rates else "\nlearning rate: not drawn, since it depends on tokens and samples differ in length"
    return plot(panels, "steps", float(steps)) + unknown
