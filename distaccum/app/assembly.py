"""From a typed configuration to the arithmetic of its windows, and to what makes a step of one."""

from __future__ import annotations

from pathlib import Path

import torch

from distaccum.app.config import Config
from distaccum.app.oom import OnOutOfMemory
from distaccum.app.task import Problem, in_precision, make_model
from distaccum.checkpoint.export import load_weights
from distaccum.core.batch_schedule import BatchSchedule, entries_of
from distaccum.core.batch_size import BatchArithmetic, samples_of_tokens, solve
from distaccum.grads.accumulate import SumDtype
from distaccum.grads.scale import LossScale
from distaccum.nn.blocks import checkpoint_blocks, compile_blocks
from distaccum.optim import make_optimizer
from distaccum.parallel.apply import wrap
from distaccum.parallel.precision import Precision
from distaccum.parallel.world import World
from distaccum.step.accumulator import Accumulator


def make_accumulator(
    config: Config, problem: Problem, world: World, weights: str | None = None, overlap_limit: int | None = None
) -> Accumulator:
    """The model, wrapped, with its optimizer and all that one step needs; its weights drawn, or from a file."""
    precision, accum = config.precision, config.accum
    model = make_model(config, problem, world.device)
    if weights is not None:
        load_weights(model, Path(weights))
    blocks = problem.blocks_of(model)
    if config.nn.checkpoint:
        checkpoint_blocks(blocks)
    if config.nn.compile:
        compile_blocks(blocks)
    reduce_dtype = _torch(config.parallel.reduce_dtype)
    wrapped = wrap(model, blocks, config.parallel, world, precision.name.sharded_policy(reduce_dtype))
    loss_scale = LossScale(precision.loss_scale, precision.loss_scale_growth_windows)
    return Accumulator(
        wrapped,
        make_optimizer(wrapped, config.optim),
        in_precision(config, problem.objective),
        sync=accum.sync,
        clip_norm=config.optim.clip_norm,
        seed=config.train.seed,
        nonfinite=accum.nonfinite,
        audit=accum.audit,
        accum_dtype=_torch(accum.dtype),
        reduce_dtype=reduce_dtype,
        loss_scale=loss_scale if precision.name is Precision.fp16 else None,
        overlap_micros=accum.overlap_micros,
        overlap_limit=overlap_limit,
        blocks=blocks,
        agree_on_oom=accum.on_oom is OnOutOfMemory.shrink,
    )


def batch_schedule(config: Config, problem: Problem) -> BatchSchedule | None:
    """The effective batch along the training; None where it is one."""
    accum = config.accum
    if accum.schedule is None:
        return None
    schedule = BatchSchedule(entries_of(accum.schedule), accum.schedule_unit, accum.ramp)
    return schedule.in_samples(problem.tokens_per_sample)


def effective_batches(config: Config, problem: Problem) -> list[int]:
    """The effective batches that are asked for, in samples: one, those of a schedule, or none."""
    accum, schedule = config.accum, batch_schedule(config, problem)
    if schedule is not None:
        return [size for _, size in schedule.entries]
    if accum.effective_tokens is not None:
        return [samples_of_tokens(accum.effective_tokens, problem.tokens_per_sample)]
    return [] if accum.effective_batch is None else [accum.effective_batch]


def batch_arithmetic(config: Config, problem: Problem, world_size: int) -> BatchArithmetic:
    """The effective batch, as asked for in samples or tokens, for so many ranks; with a schedule, the first one."""
    accum, batches = config.accum, effective_batches(config, problem)
    if accum.schedule is not None:
        micro_size = solve(world_size, max(batches), accum.micro).micro_size
        solved = [solve(world_size, size, micro_size, ragged=accum.ragged) for size in batches]
        return solved[0]
    return solve(world_size, batches[0] if batches else None, accum.micro, accum.num_micros, accum.ragged)


def _torch(dtype: SumDtype | None) -> torch.dtype | None:
    return None if dtype is None else dtype.torch
