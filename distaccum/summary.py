"""The start block: what will be trained, by which arithmetic, and what it will send."""

from __future__ import annotations

from collections.abc import Mapping

from distaccum.config import Config
from distaccum.parallel.ledger import Traffic
from distaccum.plan import BatchArithmetic, LastWindow, Plan
from distaccum.report import size
from distaccum.step import Accumulator

Section = Mapping[str, str]


def start_block(
    config: Config,
    arithmetic: BatchArithmetic,
    plan: Plan,
    steps: int,
    accumulator: Accumulator,
    texts: Mapping[str, object],
    heldout: Mapping[str, object],
    baseline: float,
) -> tuple[dict[str, Section], dict[str, object]]:
    """What people read at the start, and the same for machines."""
    strategy = accumulator.strategy
    traffic = strategy.forecast(arithmetic.num_micros) + accumulator.control_traffic(rows=1)
    parameters = sum(p.numel() for p in strategy.model.parameters())
    device = strategy.world.device
    backend = "" if strategy.world.group is None else (", NCCL" if device.type == "cuda" else ", gloo")
    sections: dict[str, Section] = {
        "run": {
            "model": f"{config.model.name}, {parameters:,} parameters",
            "precision": f"{config.precision.name.value}; gradients accumulated and reduced in float32 or wider",
            "parallel": f"{type(strategy).__name__.lower()}, {strategy.world.size} rank(s) on {device.type}{backend}",
            "length": f"{steps:,} steps, {steps / plan.windows_per_epoch:.2f} epochs",
        },
        "data": {
            "source": "{source}: {files:,} files, {bytes:,} bytes, digest {digest}".format(**texts),
            "training": "{samples:,} samples, {tokens:,} predicted tokens per epoch".format(**texts),
            "held out": "{samples:,} samples, {tokens:,} predicted tokens; split {split}".format(**heldout),
            "baseline": f"{baseline:.4f} nats per token on what is evaluated, by token frequency alone (unigram)",
        },
        "effective batch": {
            "arithmetic": _arithmetic(arithmetic, config.data.seq_len),
            "windows": f"{plan.windows_per_epoch:,} per epoch{_last_window(plan)}",
        },
        "network": {
            "sync": f"{strategy.sync.value}{f' ({strategy.reason})' if strategy.reason else ''}",
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
        },
        "forecast": {"counts": dict(traffic.counts), "bytes": dict(traffic.bytes)},
        "parameters": parameters,
        "baseline": baseline,
        "training_text": dict(texts),
        "heldout_text": dict(heldout),
    }
    return sections, facts


def _arithmetic(arithmetic: BatchArithmetic, seq_len: int) -> str:
    micro, micros, ranks = arithmetic.micro_size, arithmetic.num_micros, arithmetic.world_size
    text = f"micro {micro} x {micros} micros x {ranks} rank(s) = {micro * micros * ranks} samples"
    if not arithmetic.even:
        text = (
            f"{arithmetic.effective_batch} samples in uneven micros: up to {micro} x {micros} micros x {ranks} rank(s)"
        )
    return f"{text} ({arithmetic.effective_batch * seq_len:,} tokens) per optimizer step"


def _last_window(plan: Plan) -> str:
    rest = plan.num_samples % plan.effective_batch
    if rest == 0:
        return ", all full"
    return {
        LastWindow.keep: f", the last one of {rest} samples, each weighted as in any other",
        LastWindow.drop: f", and {rest} samples dropped",
        LastWindow.fill: f", the last one filled with {plan.effective_batch - rest} samples of the next epoch",
    }[plan.last_window]


def _network(traffic: Traffic) -> str:
    collectives = traffic.counts.total()
    if not collectives:
        return "nothing: one process"
    return f"{collectives} collectives, {size(traffic.bytes.total())} (forecast): {traffic}"
