"""The composition root: the only file that knows every class. From a typed configuration to a training that runs."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.optim import Optimizer

from distaccum.app import resume, summary
from distaccum.app.assembly import batch_arithmetic, batch_schedule, make_accumulator
from distaccum.app.auto.footprint import overlap_limit
from distaccum.app.auto.resolve import machine_of, predicted, settled
from distaccum.app.config import Config, Device
from distaccum.app.oom import Budget
from distaccum.app.preemption import Preemption
from distaccum.app.progress import Rhythm
from distaccum.app.task import Problem, in_precision, make_problem
from distaccum.app.trainer import Trainer
from distaccum.app.validation import Heldout
from distaccum.checkpoint.saver import Saver
from distaccum.checkpoint.store import Checkpoints
from distaccum.core.batch_size import BatchArithmetic
from distaccum.core.plan import Plan
from distaccum.data.loader import Loader
from distaccum.errors import ConfigError, in_one_line
from distaccum.launch import Job
from distaccum.metrics import Report, make_report
from distaccum.optim import MOST_WARMUP_STEPS, LRSchedule, ScheduleUnit, with_warmup
from distaccum.parallel.apply import StrategyName
from distaccum.parallel.world import World
from distaccum.planner.meter import Meter


@dataclass(frozen=True)
class Training:
    """Everything that one rank needs to train."""

    problem: Problem
    trainer: Trainer
    report: Report | None  # on rank 0
    evaluated: list[int]  # held-out samples
    baseline: float  # held-out loss by frequency alone


def build(config: Config, job: Job, world: World, preemption: Preemption) -> Training:
    """Make model, data, plan and all collaborators, go on from a checkpoint, and draw the start block on rank 0."""
    torch.use_deterministic_algorithms(config.train.deterministic)
    machine = machine_of(config)
    problem = make_problem(config)
    checkpoints = found = None
    if config.checkpoint.keep:
        saving = config.checkpoint
        folder = job.run_dir / "checkpoints"
        checkpoints = Checkpoints(folder, world, keep=saving.keep, asynchronous=saving.asynchronous)
        found = resume.find(config, job.run_dir, checkpoints, world)
        config = replace(config, accum=resume.keep_effective_batch(config.accum, found, world.size))
    kept = resume.kept_micro(found, job.config, world.size)
    config, micro_told = settled(config, problem, world, machine, kept, anew=found is not None)
    arithmetic = batch_arithmetic(config, problem, world.size)
    plan = make_plan(config, problem, arithmetic)
    steps = num_steps(config, plan)
    weights = config.init_weights if found is None else None
    limit = overlap_limit(config, problem, arithmetic.micro_size) if world.size > 1 else None
    budget = Budget(Meter(world.device, config.limits.memory_bytes), config.accum.on_oom)
    with budget.building():
        accumulator = make_accumulator(config, problem, world, weights, limit)
    schedule = schedule_of(config, problem, plan, accumulator.optimizer, steps)
    pin_memory = config.loader.pin_memory if config.loader.pin_memory is not None else world.device.type == "cuda"
    loader = Loader(problem.train, plan, world.rank, world.size, workers=config.loader.workers, pin_memory=pin_memory)
    facts = resume.facts_of(config, job.config, problem, plan, schedule.warmup, world)
    with budget.building():
        progress = None if found is None else resume.load(found, accumulator, facts, steps)
    # Only now, as a start that is refused must leave everything as it was.
    removed = [] if checkpoints is None else checkpoints.clean()
    heldout_plan = Plan(
        num_samples=len(problem.heldout),
        effective_batch=min(len(problem.heldout), config.train.heldout_samples),
        micro_size=arithmetic.micro_size,
    )
    evaluated = [n for micro in heldout_plan.window().micros for n in heldout_plan.samples(micro)]
    report, baseline = None, problem.baseline(evaluated)
    if world.rank == 0:
        begun = (job.run_dir / "metrics.jsonl").exists()
        sections, told = summary.start_block(config, problem, arithmetic, plan, steps, schedule, accumulator, baseline)
        report = make_report(job.run_dir, config.logger, {**asdict(config), **told}, go_on=config.checkpoint.goes_on)
        report.start(sections, told)
        for text in [*micro_told, *removed, *(found.passed_over if found is not None else ())]:
            report.note(text)
        if found is not None and progress is not None:
            report.resume(progress.step, progress.windows, list(resume.told(found, facts, progress)))
        elif begun:
            report.resume(0, 0, ["begins anew: an earlier start has left no checkpoint"])
        try:
            budget.predicted = predicted(config, problem, world.size, machine)
        except Exception as error:  # advice is not worth a run: a model may do what tensors without memory cannot
            report.note(f"plan: memory was not predicted ({in_one_line(error)})")
    trainer = Trainer(
        plan,
        loader,
        accumulator,
        schedule,
        config.optim.schedule.unit,
        Heldout(problem.heldout, heldout_plan, in_precision(config, problem.evaluated)),
        Rhythm(steps, config.train.log_every_steps, config.train.evaluate_every_steps),
        preemption,
        None if checkpoints is None else Saver(checkpoints, config.checkpoint, facts),
        report,
        budget,
        counts_tokens=problem.unit == "token",
    )
    if progress is not None:
        trainer.resume(progress)
    return Training(problem, trainer, report, evaluated, baseline)


def make_plan(config: Config, problem: Problem, arithmetic: BatchArithmetic) -> Plan:
    """Which samples make which window."""
    return Plan(
        num_samples=len(problem.train),
        effective_batch=arithmetic.effective_batch,
        micro_size=arithmetic.micro_size,
        seed=config.train.seed,
        last_window=config.accum.last_window,
        schedule=batch_schedule(config, problem),
    )


def num_steps(config: Config, plan: Plan) -> int:
    """The length of the training in optimizer steps."""
    steps = config.train.steps if config.train.steps is not None else plan.num_steps(config.train.epochs or 0)
    if steps < 1:
        raise ConfigError(f"The training has {steps} steps; give train.steps or train.epochs of at least 1.")
    return steps


def schedule_of(config: Config, problem: Problem, plan: Plan, optimizer: Optimizer, steps: int) -> LRSchedule:
    """The learning rate along the training."""
    schedule, scale = config.optim.schedule, config.optim.scale
    total = schedule_position(schedule.unit, problem, plan, steps)
    if total is None and schedule.total is None:
        raise ConfigError(
            "optim.schedule.unit=tokens cannot tell where the training ends, as samples differ in length. Give "
            "optim.schedule.total in tokens, or use unit=steps or samples."
        )
    tenth = schedule_position(schedule.unit, problem, plan, min(MOST_WARMUP_STEPS, steps // 10))
    scale = replace(scale, base_batch=plan.effective_batch if scale.base_batch is None else scale.base_batch)
    return LRSchedule(optimizer, with_warmup(schedule, total, tenth), total, scale)


def schedule_position(unit: ScheduleUnit, problem: Problem, plan: Plan, step: int) -> int | None:
    """Return the schedule position before a step, in the schedule's unit; None for tokens of unknown number."""
    if unit is ScheduleUnit.steps:
        return step
    if unit is ScheduleUnit.samples:
        return plan.start_of(step)
    return None if problem.tokens_per_sample is None else plan.consumed(step) * problem.tokens_per_sample


@contextmanager
def ranks(config: Config, job: Job) -> Iterator[World]:
    """The ranks of a job, able to talk to each other."""
    device = _device(config.device, job.gpu_index)
    with _process_group(config, job, device):
        yield World.of(device)


def _device(asked: Device, local_rank: int) -> torch.device:
    if asked is Device.cpu or (asked is Device.auto and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("device=cuda, and torch sees no GPU here. Use device=auto or device=cpu.")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


@contextmanager
def _process_group(config: Config, job: Job, device: torch.device) -> Iterator[None]:
    """Ranks that talk to each other; one process too, where it is asked to be spread as if it were several."""
    if job.world_size == 1 and config.parallel.name in (StrategyName.auto, StrategyName.single):
        yield
        return
    gpu = device if device.type == "cuda" else None
    dist.init_process_group(
        "nccl" if gpu else "gloo",
        store=job.store or dist.HashStore(),  # type: ignore[attr-defined]
        rank=job.rank,
        world_size=job.world_size,
        timeout=timedelta(seconds=config.train.timeout_s),
        device_id=gpu,
    )
    # Our models and objectives do nothing in place on a module's output, which is what this warning is about.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    yield
    # Reached only when every rank succeeded: after an error a rank leaves without a word to the others.
    dist.destroy_process_group()
