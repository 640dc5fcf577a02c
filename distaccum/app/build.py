"""Builds a complete training run from a typed configuration; only this module knows every class."""

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
from distaccum.app.auto.resolve import machine_of, predicted, resolve_auto
from distaccum.app.config import Config, Device
from distaccum.app.oom import Budget
from distaccum.app.preemption import Preemption
from distaccum.app.progress import Intervals
from distaccum.app.task import Task, build_task, in_precision
from distaccum.app.trainer import Trainer
from distaccum.app.validation import Validation
from distaccum.checkpoint.saver import Saver
from distaccum.checkpoint.store import Checkpoints
from distaccum.core.batch_size import BatchArithmetic
from distaccum.core.plan import Plan
from distaccum.core.strategies import StrategyName
from distaccum.data.loader import Loader
from distaccum.errors import in_one_line, require
from distaccum.launch import Job
from distaccum.metrics import Report, make_report
from distaccum.optim import MOST_WARMUP_STEPS, LRSchedule, ScheduleUnit, with_warmup
from distaccum.parallel.world import World
from distaccum.planner.meter import Meter


@dataclass(frozen=True)
class Training:
    """Holds everything that one rank needs to train."""

    task: Task
    trainer: Trainer
    report: Report | None  # None on every rank but rank 0
    evaluated: list[int]  # indices of the validation samples that are evaluated
    baseline: float  # their loss when predicting by frequency alone


def build(config: Config, job: Job, world: World, preemption: Preemption) -> Training:
    """Build the model, data, plan and trainer, and load the checkpoint to resume from.

    Call it on every rank. Rank 0 also prints the start block.

    Raises:
        ConfigError: for a configuration that does not fit the data, the ranks or the checkpoint.
        CheckpointError: if there are checkpoints, and none of them can be read.
        OutOfMemoryError: if the model and its optimizer do not fit into memory.
    """
    torch.use_deterministic_algorithms(config.train.deterministic)
    machine = machine_of(config)
    task = build_task(config)
    checkpoints = found = None
    if config.checkpoint.keep:
        saving = config.checkpoint
        folder = job.run_dir / "checkpoints"
        checkpoints = Checkpoints(folder, world, keep=saving.keep, asynchronous=saving.asynchronous)
        found = resume.find(config, job.run_dir, checkpoints, world)
        config = replace(config, accum=resume.keep_effective_batch(config.accum, found, world.size))
    kept = resume.kept_micro_batch_size(found, job.config, world.size)
    config, auto_messages = resolve_auto(
        config, task, world, machine, kept, resumed=found is not None
    )
    arithmetic = batch_arithmetic(config, task, world.size)
    plan = make_plan(config, task, arithmetic)
    steps = num_steps(config, plan)
    weights = config.init_weights if found is None else None
    limit = overlap_limit(config, task, arithmetic.micro_batch_size) if world.size > 1 else None
    budget = Budget(
        Meter(world.device, config.limits.memory_bytes), config.accum.on_oom, job.run_dir
    )
    plan = replace(plan, halvings=budget.halvings(plan.micro_batch_size, world))
    if plan.halvings:
        size = plan.largest_micro_batch
        auto_messages = [
            *auto_messages,
            f"micro-batches of {size} sample(s), as an earlier start ran out of memory",
        ]
    with budget.building():
        accumulator = make_accumulator(config, task, world, weights, limit)
    budget.retries = accumulator.agree_on_oom
    schedule = schedule_of(config, task, plan, accumulator.optimizer, steps)
    pin_memory = (
        config.loader.pin_memory
        if config.loader.pin_memory is not None
        else world.device.type == "cuda"
    )
    loader = Loader(
        task.train,
        plan,
        world.rank,
        world.size,
        workers=config.loader.workers,
        pin_memory=pin_memory,
    )
    facts = resume.facts_of(config, job.config, task, plan, schedule.warmup, world)
    with budget.building():
        progress = None if found is None else resume.load(found, accumulator, facts, steps)
    # Files are removed only now, because a start that is refused must change nothing.
    removed = [] if checkpoints is None else checkpoints.clean()
    validation_plan = Plan(
        num_samples=len(task.validation),
        effective_batch_size=min(len(task.validation), config.train.validation_samples),
        micro_batch_size=arithmetic.micro_batch_size,
    )
    evaluated = [
        n
        for micro_batch in validation_plan.window().micro_batches
        for n in validation_plan.samples(micro_batch)
    ]
    report, baseline = None, task.baseline(evaluated)
    if world.rank == 0:
        started_before = (job.run_dir / "metrics.jsonl").exists()
        sections, facts_at_start = summary.start_block(
            config, task, arithmetic, plan, steps, schedule, accumulator, baseline
        )
        report = make_report(
            job.run_dir,
            config.logger,
            {**asdict(config), **facts_at_start},
            go_on=config.checkpoint.goes_on,
        )
        report.start(sections, facts_at_start)
        for text in [*auto_messages, *removed, *(found.passed_over if found is not None else ())]:
            report.note(text)
        if found is not None and progress is not None:
            report.resume(
                progress.step, progress.windows, list(resume.message(found, facts, progress))
            )
        elif started_before:
            report.resume(0, 0, ["starts from step 0, because an earlier start left no checkpoint"])
        try:
            budget.predicted = predicted(config, task, world.size, machine)
        # A prediction must not end the run: a model may not support fake tensors.
        except Exception as error:
            report.note(f"plan: memory could not be predicted ({in_one_line(error)})")
    trainer = Trainer(
        plan,
        loader,
        accumulator,
        schedule,
        config.optim.schedule.unit,
        Validation(task.validation, validation_plan, in_precision(config, task.evaluated)),
        Intervals(steps, config.train.log_every_steps, config.train.validate_every_steps),
        preemption,
        None if checkpoints is None else Saver(checkpoints, config.checkpoint, facts),
        report,
        budget,
        counts_tokens=task.unit == "token",
    )
    if progress is not None:
        trainer.resume(progress)
    return Training(task, trainer, report, evaluated, baseline)


def make_plan(config: Config, task: Task, arithmetic: BatchArithmetic) -> Plan:
    """Make the plan that assigns samples to windows and micro-batches."""
    return Plan(
        num_samples=len(task.train),
        effective_batch_size=arithmetic.effective_batch_size,
        micro_batch_size=arithmetic.micro_batch_size,
        seed=config.train.seed,
        last_window=config.accum.last_window,
        schedule=batch_schedule(config, task),
    )


def num_steps(config: Config, plan: Plan) -> int:
    """Return the length of the training in optimizer steps.

    Raises:
        ConfigError: if it is less than 1.
    """
    steps = (
        config.train.steps
        if config.train.steps is not None
        else plan.num_steps(config.train.epochs or 0)
    )
    require(
        steps >= 1,
        f"The training has {steps} steps. Set train.steps or train.epochs to at least 1.",
    )
    return steps


def schedule_of(
    config: Config, task: Task, plan: Plan, optimizer: Optimizer, steps: int
) -> LRSchedule:
    """Make the learning rate schedule of the training.

    Raises:
        ConfigError: if the schedule counts tokens, samples differ in length, and
            `optim.schedule.total` is null.
    """
    schedule, scale = config.optim.schedule, config.optim.scale
    total = schedule_position(schedule.unit, task, plan, steps)
    require(
        total is not None or schedule.total is not None,
        "optim.schedule.unit=tokens needs the number of tokens in the training, which is unknown "
        "because samples differ in length. Set optim.schedule.total in tokens, or use "
        "optim.schedule.unit=steps or samples.",
    )
    tenth = schedule_position(schedule.unit, task, plan, min(MOST_WARMUP_STEPS, steps // 10))
    scale = replace(
        scale,
        base_batch=plan.effective_batch_size if scale.base_batch is None else scale.base_batch,
    )
    return LRSchedule(optimizer, with_warmup(schedule, total, tenth), total, scale)


def schedule_position(unit: ScheduleUnit, task: Task, plan: Plan, step: int) -> int | None:
    """Return the position before a step in the schedule's unit, or None if it is unknown.

    It is unknown in tokens if samples differ in length.
    """
    if unit is ScheduleUnit.steps:
        return step
    if unit is ScheduleUnit.samples:
        return plan.start_of(step)
    return None if task.tokens_per_sample is None else plan.consumed(step) * task.tokens_per_sample


@contextmanager
def ranks(config: Config, job: Job) -> Iterator[World]:
    """Set up the process group of a job, and yield the world of its ranks.

    Call it on every rank. A single process may need no group.
    """
    device = _device(config.device, job.gpu_index)
    alone = job.world_size == 1 and config.parallel.name in (StrategyName.auto, StrategyName.single)
    if not alone:
        gpu = device if device.type == "cuda" else None
        dist.init_process_group(
            "nccl" if gpu else "gloo",
            store=job.store or dist.HashStore(),  # type: ignore[attr-defined]
            rank=job.rank,
            world_size=job.world_size,
            timeout=timedelta(seconds=config.train.timeout_s),
            device_id=gpu,
        )
        # The warning is about changing a module's output in place, which our models and objectives
        # never do.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    yield World.of(device)
    if not alone:
        # Reached only on success: a rank that failed exits without communicating with the others.
        dist.destroy_process_group()


def _device(asked: Device, local_rank: int) -> torch.device:
    if asked is Device.cpu or (asked is Device.auto and not torch.cuda.is_available()):
        return torch.device("cpu")
    require(
        torch.cuda.is_available(),
        "device=cuda, but torch sees no GPU here. Use device=auto or device=cpu.",
    )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device
