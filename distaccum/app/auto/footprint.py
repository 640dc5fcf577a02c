"""The memory and the work of a configured run, before it begins."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

import torch

from distaccum.app.config import Config
from distaccum.app.task import Problem, in_precision, meta_model
from distaccum.core.objectives import cast_inputs
from distaccum.nn.blocks import checkpoint_blocks
from distaccum.optim import make_optimizer
from distaccum.parallel.apply import StrategyName
from distaccum.planner import (
    Memory,
    MicroTrace,
    ModelShape,
    Peak,
    Setup,
    Update,
    describe,
    memory,
    peak,
    states_of,
    trace,
    update,
)
from distaccum.step.overlap.schedule import AUTO

TRACED = (2, 16)  # samples; other sizes lie on the line through them. BatchNorm takes two at least


class Footprint:
    """Predicts for one configuration, whatever the strategy, policy, micro size, number of micros and checkpointing.

    A second or two for each kind of micro that is asked about first (checkpointed or not, cast by FSDP2 or not); from
    then on a millisecond an answer.
    """

    def __init__(self, config: Config, problem: Problem) -> None:
        """Nothing is traced yet."""
        self._config = config
        self._problem = problem
        self._device = torch.device("cuda" if torch.cuda.is_available() and config.device.value != "cpu" else "cpu")
        self._traces: dict[tuple[bool, bool], tuple[MicroTrace, MicroTrace]] = {}
        self._micros: dict[tuple[bool, bool, int], MicroTrace] = {}
        self._updates: dict[int, Update] = {}

    def peak(
        self, setup: Setup, samples: int, num_micros: int, overlap_micros: int = 1, checkpoint: bool | None = None
    ) -> Peak:
        """The most that a rank's tensors take at once.

        Args:
            setup: how the model is spread; its strategy may be another one than the configured one.
            samples: in a micro.
            num_micros: per rank in a window.
            overlap_micros: how many of them are computed block by block.
            checkpoint: whether blocks are computed twice; None: as configured.
        """
        micro, device = self.micro(samples, setup.sharded, checkpoint), self._device.type
        return peak(self.model, setup, self._update(setup.shards), micro, num_micros, overlap_micros, device)

    def memory(self, setup: Setup, samples: int, num_micros: int, checkpoint: bool | None = None) -> Memory:
        """What it is made of, part by part; the parts do not all live at once."""
        optim = self._config.optim
        states = states_of(optim.name.value, optim.momentum)
        parts = memory(self.model, setup, states, num_micros, self.micro(samples, setup.sharded, checkpoint).saved)
        return replace(parts, optimizer=self._update(setup.shards).kept)

    def flops(self, samples: int, checkpoint: bool | None = None) -> int:
        """Floating-point operations of matrix products in one micro, forward and backward, what is recomputed too."""
        return self.micro(samples, self.configured_sharded, checkpoint).flops

    def micro(self, samples: int, sharded: bool, checkpoint: bool | None = None) -> MicroTrace:
        """One micro of the longest samples, as FSDP2 or the others compute it."""
        recomputes = self._config.nn.checkpoint if checkpoint is None else checkpoint
        key = recomputes, sharded and self._casts
        if key not in self._traces:
            few, many = (self._traced(size, *key) for size in TRACED)
            self._traces[key] = few, many
        if (*key, samples) not in self._micros:
            self._micros[*key, samples] = MicroTrace.between(*self._traces[key], samples)
        return self._micros[*key, samples]

    @cached_property
    def model(self) -> ModelShape:
        """Shapes and dtypes of the configured model."""
        model = meta_model(self._config, self._problem)
        return describe(model, self._problem.blocks_of(model))

    @property
    def configured_sharded(self) -> bool:
        """Whether FSDP2 holds the model, as configured."""
        return self._config.parallel.name in (StrategyName.fsdp, StrategyName.hsdp)

    @property
    def _casts(self) -> bool:
        """Whether FSDP2 gathers parameters in another dtype, where others use autocast."""
        precision = self._config.precision.name
        return precision.compute_dtype is not precision.parameter_dtype

    def _traced(self, samples: int, checkpoint: bool, cast: bool) -> MicroTrace:
        config, problem = self._config, self._problem
        model, compute = meta_model(config, problem), config.precision.name.compute_dtype if cast else None
        if checkpoint:
            checkpoint_blocks(problem.blocks_of(model))
        name = StrategyName.fsdp if cast else StrategyName.single
        objective = in_precision(replace(config, parallel=replace(config.parallel, name=name)), problem.objective)
        if compute is not None:
            objective = cast_inputs(objective, compute)
        longest = problem.train.longest(1)
        micro = problem.train.batch(longest * samples, torch.Generator().manual_seed(0))
        return trace(model, problem.blocks_of, objective.loss_sum, micro, samples, self._device, compute)

    def _update(self, shards: int) -> Update:
        if shards not in self._updates:
            shapes = [(p.local(shards), p.dtype) for p in self.model.trained]
            self._updates[shards] = update(
                lambda model: make_optimizer(model, self._config.optim), shapes, self._device
            )
        return self._updates[shards]


def overlap_limit(config: Config, problem: Problem, micro_size: int) -> int | None:
    """The largest T that accum.overlap_micros=auto may choose within accum.overlap_memory_mb; None: no limit.

    Each further micro keeps what the backward of its blocks needs, and the head's gradients of parameters that an
    earlier part of the model uses too.
    """
    memory_mb = config.accum.overlap_memory_mb
    if config.accum.overlap_micros != AUTO or memory_mb is None:
        return None
    if not problem.blocks_of(meta_model(config, problem)):
        return None
    footprint = Footprint(config, problem)
    return 1 + memory_mb * 2**20 // footprint.micro(micro_size, footprint.configured_sharded).to_head
