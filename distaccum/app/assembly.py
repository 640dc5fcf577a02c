"""Builds the batch arithmetic and the accumulator of a run from its typed configuration."""

from __future__ import annotations

from pathlib import Path

from distaccum.app.config import Config
from distaccum.app.oom import OnOutOfMemory
from distaccum.app.task import Task, in_precision, make_model
from distaccum.checkpoint.export import load_weights
from distaccum.core.batch_schedule import BatchSchedule, entries_of
from distaccum.core.batch_size import BatchArithmetic, samples_of_tokens, solve
from distaccum.core.strategies import StrategyName, Sync
from distaccum.grads.scale import LossScale
from distaccum.nn.batchnorm_layers import BatchNormMode
from distaccum.nn.blocks import checkpoint_blocks, compile_blocks
from distaccum.optim import make_optimizer
from distaccum.parallel.apply import chosen, wrap
from distaccum.parallel.precision import Precision
from distaccum.parallel.world import World
from distaccum.step.accumulator import Accumulator


def make_accumulator(
    config: Config,
    task: Task,
    world: World,
    weights: str | None = None,
    overlap_limit: int | None = None,
) -> Accumulator:
    """Build the wrapped model, its optimizer and everything else that one optimizer step needs.

    Args:
        config: the configuration of the run.
        task: the task of `config`.
        world: the ranks that share each effective batch.
        weights: the path of a safetensors file with the initial weights; None draws them from
            `train.seed`.
        overlap_limit: the most micro-batches that `accum.overlap_micro_batches=auto` may overlap;
            None sets no limit.
    """
    precision, accum = config.precision, config.accum
    model = make_model(config, task, world.device)
    if weights is not None:
        load_weights(model, Path(weights))
    blocks = task.blocks_of(model)
    if config.nn.checkpoint:
        checkpoint_blocks(blocks)
    if config.nn.compile:
        compile_blocks(blocks)
    reduce_dtype = config.parallel.reduce_dtype and config.parallel.reduce_dtype.torch
    wrapped = wrap(
        model, blocks, config.parallel, world, precision.name.sharded_policy(reduce_dtype)
    )
    loss_scale = LossScale(precision.loss_scale, precision.loss_scale_growth_windows)
    return Accumulator(
        wrapped,
        make_optimizer(wrapped, config.optim),
        in_precision(config, task.objective),
        sync=accum.sync,
        clip_norm=config.optim.clip_norm,
        seed=config.train.seed,
        nonfinite=accum.nonfinite,
        audit=accum.audit,
        accum_dtype=accum.dtype and accum.dtype.torch,
        reduce_dtype=reduce_dtype,
        loss_scale=loss_scale if precision.name is Precision.fp16 else None,
        overlap_micro_batches=accum.overlap_micro_batches,
        overlap_limit=overlap_limit,
        blocks=blocks,
        agree_on_oom=accum.on_oom is OnOutOfMemory.shrink and _sends_after_windows(config, world),
    )


def _sends_after_windows(config: Config, world: World) -> bool:
    """Return whether micro-batches of this configuration send nothing, so a rank may leave one."""
    strategy = chosen(config.parallel.name, world.size)
    whole = (
        strategy in (StrategyName.single, StrategyName.ddp) and config.accum.sync is not Sync.every
    )
    return world.group is None or (whole and config.nn.batchnorm is not BatchNormMode.sync)


def batch_schedule(config: Config, task: Task) -> BatchSchedule | None:
    """Return the schedule of effective batch sizes in samples, or None if the size is constant."""
    accum = config.accum
    if accum.schedule is None:
        return None
    schedule = BatchSchedule(entries_of(accum.schedule), accum.schedule_unit, accum.ramp)
    return schedule.in_samples(task.tokens_per_sample)


def effective_batch_sizes(config: Config, task: Task) -> list[int]:
    """Return the effective batch sizes that the configuration gives, in samples.

    Returns:
        All sizes of the schedule, or the one size that is given, or an empty list if none is given.
    """
    accum, schedule = config.accum, batch_schedule(config, task)
    if schedule is not None:
        return [size for _, size in schedule.entries]
    if accum.effective_batch_tokens is not None:
        return [samples_of_tokens(accum.effective_batch_tokens, task.tokens_per_sample)]
    return [] if accum.effective_batch_size is None else [accum.effective_batch_size]


def batch_arithmetic(config: Config, task: Task, world_size: int) -> BatchArithmetic:
    """Solve the arithmetic of the effective batch for a number of ranks.

    With a schedule, the micro-batch size is the one of the largest effective batch. All effective
    batches are checked, and the arithmetic of the first one is returned.

    Raises:
        ConfigError: if the sizes contradict each other, or do not divide evenly and `accum.ragged`
            is `refuse`.
    """
    accum, batches = config.accum, effective_batch_sizes(config, task)
    if accum.schedule is not None:
        micro_batch_size = solve(world_size, max(batches), accum.micro_batch_size).micro_batch_size
        solved = [
            solve(world_size, size, micro_batch_size, ragged=accum.ragged) for size in batches
        ]
        return solved[0]
    return solve(
        world_size,
        batches[0] if batches else None,
        accum.micro_batch_size,
        accum.gradient_accumulation_steps,
        accum.ragged,
    )
