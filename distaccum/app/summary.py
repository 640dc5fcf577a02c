"""Describes a run at its start: its model, data, batch arithmetic and network traffic."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from distaccum.app.config import Config
from distaccum.app.task import Task
from distaccum.core.batch_size import BatchArithmetic
from distaccum.core.plan import LastWindow, Plan
from distaccum.core.traffic import Traffic
from distaccum.metrics import size
from distaccum.nn.batchnorm import has_batchnorm
from distaccum.nn.batchnorm_layers import BatchNormMode
from distaccum.optim import AUTO, MOST_WARMUP_STEPS, LRSchedule, ScheduleConfig
from distaccum.step.accumulator import Accumulator

Section = Mapping[str, str]


def start_block(
    config: Config,
    task: Task,
    arithmetic: BatchArithmetic,
    plan: Plan,
    steps: int,
    schedule: LRSchedule,
    accumulator: Accumulator,
    baseline: float,
) -> tuple[dict[str, Section], dict[str, object]]:
    """Return the start block for people, and the same information for machines.

    Returns:
        The sections of the start block by title, and the facts of the record "start".
    """
    strategy = accumulator.strategy
    traffic = (
        strategy.forecast(arithmetic.gradient_accumulation_steps) + accumulator.control_traffic()
    )
    parameters = sum(p.numel() for p in strategy.model.parameters())
    device = strategy.world.device
    backend = (
        "" if strategy.world.group is None else (", NCCL" if device.type == "cuda" else ", gloo")
    )
    sections: dict[str, Section] = {
        "run": {
            "model": f"{config.model.name}, {parameters:,} parameters",
            "precision": _precision(config),
            "parallel": (
                f"{type(strategy).__name__.lower()}, {strategy.world.size} rank(s) on "
                f"{device.type}{backend}"
            ),
            **_batchnorm(config, strategy.model),
            "length": f"{steps:,} steps, {plan.start_of(steps) / plan.num_samples:.2f} epochs",
            "warm-up": warmup(config.optim.schedule, schedule),
        },
        "data": {
            **task.described,
            "baseline": (
                f"{baseline:.4f} nats per {task.unit} on the validation samples, predicting by "
                "frequency alone"
            ),
        },
        "effective batch": batch_section(arithmetic, plan, task),
        "network": {
            "sync": f"{strategy.sync.value}{f' ({strategy.reason})' if strategy.reason else ''}",
            **(
                {}
                if config.accum.overlap_micro_batches == 1
                else {"overlap": str(accumulator.overlap)}
            ),
            "per step": _network(traffic),
        },
    }
    facts: dict[str, object] = {
        "plan": {
            "effective_batch_size": arithmetic.effective_batch_size,
            "micro_batch_size": arithmetic.micro_batch_size,
            "gradient_accumulation_steps": arithmetic.gradient_accumulation_steps,
            "world_size": arithmetic.world_size,
            "num_samples": plan.num_samples,
            "windows_per_epoch": plan.windows_per_epoch,
            "last_window_size": plan.last_window_size,
            "steps": steps,
            "warmup": schedule.warmup,
        },
        "forecast": {"counts": dict(traffic.counts), "bytes": dict(traffic.bytes)},
        "parameters": parameters,
        "baseline": baseline,
        "data": dict(task.facts),
    }
    return sections, facts


def batch_section(arithmetic: BatchArithmetic, plan: Plan, task: Task) -> Section:
    """Return the lines on the arithmetic of the effective batch and on the windows per epoch."""
    return {
        "arithmetic": _arithmetic(arithmetic, task.tokens_per_sample),
        "windows": _windows(plan),
    }


def warmup(asked: ScheduleConfig, schedule: LRSchedule) -> str:
    """Describe the length of the warm-up, and the rule behind it if it is `auto`."""
    text = f"{schedule.warmup:,} {asked.unit.value}" if schedule.warmup else "none"
    auto = f" (auto: a tenth of the training, at most {MOST_WARMUP_STEPS} steps)"
    return text + (auto if asked.warmup == AUTO else "")


def _batchnorm(config: Config, model: nn.Module) -> dict[str, str]:
    """Return a line on how BatchNorm differs from one big batch; empty without BatchNorm."""
    if not has_batchnorm(model):
        return {}
    differs = {
        BatchNormMode.sync: (
            "normalized over the micro-batches that all ranks compute at the same time, not over "
            "the whole window"
        ),
        BatchNormMode.pooled: (
            "normalized within each micro-batch; running statistics are those of the whole "
            "effective batch"
        ),
        BatchNormMode.frozen: (
            "normalized by running statistics, which never change: exactly the same as one big "
            "batch"
        ),
        BatchNormMode.micro_batch: (
            "normalized within each micro-batch; each rank has its own running statistics, updated "
            "by each micro-batch"
        ),
    }[config.nn.batchnorm]
    return {"batchnorm": f"{config.nn.batchnorm.value}: {differs}"}


def _precision(config: Config) -> str:
    accumulated, reduced = (
        dtype.value if dtype is not None else "float32 or wider"
        for dtype in (config.accum.dtype, config.parallel.reduce_dtype)
    )
    return (
        f"{config.precision.name.value}; gradients summed over micro-batches in {accumulated}, "
        f"over ranks in {reduced}"
    )


def _arithmetic(arithmetic: BatchArithmetic, tokens_per_sample: int | None) -> str:
    batch = arithmetic.effective_batch_size
    steps = arithmetic.gradient_accumulation_steps
    ranks = arithmetic.world_size
    # The largest micro-batch. Over all ranks, sizes differ by at most one sample, see Window.
    largest = -(-batch // -(-batch // arithmetic.micro_batch_size))
    counts = f"{steps} accumulation step(s) x {ranks} rank(s)"
    if largest * steps * ranks == batch:
        text = f"micro-batch size {largest} x {counts} = {batch} samples"
    else:
        text = f"{batch} samples in uneven micro-batches: at most {largest} sample(s) x {counts}"
    tokens = f" ({batch * tokens_per_sample:,} tokens)" if tokens_per_sample else ""
    return f"{text}{tokens} per optimizer step"


def _windows(plan: Plan) -> str:
    if plan.schedule is not None:
        unit, ramp = plan.schedule.unit.value, plan.schedule.ramp.value
        entries = ", ".join(f"{size} from {start:,}" for start, size in plan.schedule.entries)
        return (
            f"{plan.windows_per_epoch:,} in the first epoch; effective batch size {entries} {unit} "
            f"(ramp: {ramp})"
        )
    rest = plan.num_samples % plan.effective_batch_size
    if rest == 0:
        return f"{plan.windows_per_epoch:,} per epoch, all full"
    left_over = {
        LastWindow.keep: (
            f"the last one has only {rest} samples, and its loss is averaged over these"
        ),
        LastWindow.drop: f"the other {rest} samples are dropped",
        LastWindow.fill: (
            f"the last one is filled with {plan.effective_batch_size - rest} samples of the next "
            "epoch"
        ),
    }[plan.last_window]
    return f"{plan.windows_per_epoch:,} per epoch, {left_over}"


def _network(traffic: Traffic) -> str:
    collectives = traffic.counts.total()
    if not collectives:
        return "nothing, as there is only one process"
    return f"{collectives} collectives, {size(traffic.bytes.total())} (forecast): {traffic}"
