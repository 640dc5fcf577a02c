"""The start block: what will be trained, by which arithmetic, and what it will send."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from distaccum.app.config import Config
from distaccum.app.task import Problem
from distaccum.core.batch_size import BatchArithmetic
from distaccum.core.plan import LastWindow, Plan
from distaccum.metrics import size
from distaccum.nn.batchnorm import has_batchnorm
from distaccum.nn.batchnorm_layers import BatchNormMode
from distaccum.optim import AUTO, MOST_WARMUP_STEPS, LRSchedule, ScheduleConfig
from distaccum.parallel.ledger import Traffic
from distaccum.step.accumulator import Accumulator

Section = Mapping[str, str]


def start_block(
    config: Config,
    problem: Problem,
    arithmetic: BatchArithmetic,
    plan: Plan,
    steps: int,
    schedule: LRSchedule,
    accumulator: Accumulator,
    baseline: float,
) -> tuple[dict[str, Section], dict[str, object]]:
    """What people read at the start, and the same for machines."""
    strategy = accumulator.strategy
    traffic = strategy.forecast(arithmetic.num_micros) + accumulator.control_traffic()
    parameters = sum(p.numel() for p in strategy.model.parameters())
    device = strategy.world.device
    backend = "" if strategy.world.group is None else (", NCCL" if device.type == "cuda" else ", gloo")
    sections: dict[str, Section] = {
        "run": {
            "model": f"{config.model.name}, {parameters:,} parameters",
            "precision": _precision(config),
            "parallel": f"{type(strategy).__name__.lower()}, {strategy.world.size} rank(s) on {device.type}{backend}",
            **_batchnorm(config, strategy.model),
            "length": f"{steps:,} steps, {plan.start_of(steps) / plan.num_samples:.2f} epochs",
            "warm-up": warmup(config.optim.schedule, schedule),
        },
        "data": {
            **problem.described,
            "baseline": f"{baseline:.4f} nats per {problem.unit} on what is evaluated, by frequency alone",
        },
        "effective batch": batch_section(arithmetic, plan, problem),
        "network": {
            "sync": f"{strategy.sync.value}{f' ({strategy.reason})' if strategy.reason else ''}",
            **({} if config.accum.overlap_micros == 1 else {"overlap": str(accumulator.overlap)}),
            "per step": _network(traffic),
        },
    }
    facts: dict[str, object] = {
        "plan": {
            "effective_batch": arithmetic.effective_batch,
            "micro_size": arithmetic.micro_size,
            "num_micros": arithmetic.num_micros,
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
        "data": dict(problem.facts),
    }
    return sections, facts


def batch_section(arithmetic: BatchArithmetic, plan: Plan, problem: Problem) -> Section:
    """How the effective batch comes about, and how many make an epoch."""
    return {"arithmetic": _arithmetic(arithmetic, problem.tokens_per_sample), "windows": _windows(plan)}


def warmup(asked: ScheduleConfig, schedule: LRSchedule) -> str:
    """How long the learning rate rises, and why so long where nobody said it."""
    text = f"{schedule.warmup:,} {asked.unit.value}" if schedule.warmup else "none"
    auto = f" (auto: a tenth of the training, at most {MOST_WARMUP_STEPS} steps)"
    return text + (auto if asked.warmup == AUTO else "")


def _batchnorm(config: Config, model: nn.Module) -> dict[str, str]:
    """What differs from one big batch."""
    if not has_batchnorm(model):
        return {}
    differs = {
        BatchNormMode.sync: "normalised over the micro-batches that all ranks compute together, not over the window",
        BatchNormMode.pooled: (
            "normalised within each micro-batch; running statistics are those of the whole effective batch"
        ),
        BatchNormMode.frozen: "normalised by running statistics, which never change: exactly one big batch",
        BatchNormMode.micro: (
            "normalised within each micro-batch; running statistics are each rank's own and move with each micro"
        ),
    }[config.nn.batchnorm]
    return {"batchnorm": f"{config.nn.batchnorm.value}: {differs}"}


def _precision(config: Config) -> str:
    dtypes = config.accum.dtype, config.parallel.reduce_dtype
    accumulated, reduced = (dtype.value if dtype is not None else "float32 or wider" for dtype in dtypes)
    return f"{config.precision.name.value}; gradients summed over micros in {accumulated}, over ranks in {reduced}"


def _arithmetic(arithmetic: BatchArithmetic, tokens_per_sample: int | None) -> str:
    batch, micros, ranks = arithmetic.effective_batch, arithmetic.num_micros, arithmetic.world_size
    number = -(-batch // arithmetic.micro_size)  # of all ranks; their sizes differ by one at most, see Window
    micro = -(-batch // number)
    text = f"micro {micro} x {micros} micros x {ranks} rank(s) = {batch} samples"
    if micro * micros * ranks != batch:
        text = f"{batch} samples in uneven micros: up to {micro} x {micros} micros x {ranks} rank(s)"
    tokens = f" ({arithmetic.effective_batch * tokens_per_sample:,} tokens)" if tokens_per_sample else ""
    return f"{text}{tokens} per optimizer step"


def _windows(plan: Plan) -> str:
    if plan.schedule is not None:
        unit, ramp = plan.schedule.unit.value, plan.schedule.ramp.value
        entries = ", ".join(f"{size} from {start:,}" for start, size in plan.schedule.entries)
        return f"{plan.windows_per_epoch:,} in the first epoch; effective batch {entries} {unit} on ({ramp})"
    rest = plan.num_samples % plan.effective_batch
    if rest == 0:
        return f"{plan.windows_per_epoch:,} per epoch, all full"
    left_over = {
        LastWindow.keep: f"the last one of {rest} samples, each weighted as in any other",
        LastWindow.drop: f"and {rest} samples dropped",
        LastWindow.fill: f"the last one filled with {plan.effective_batch - rest} samples of the next epoch",
    }[plan.last_window]
    return f"{plan.windows_per_epoch:,} per epoch, {left_over}"


def _network(traffic: Traffic) -> str:
    collectives = traffic.counts.total()
    if not collectives:
        return "nothing: one process"
    return f"{collectives} collectives, {size(traffic.bytes.total())} (forecast): {traffic}"
