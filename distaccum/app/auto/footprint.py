"""Predicts the memory and the FLOPs of a configured run before it begins."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

import torch

from distaccum.app.config import Config
from distaccum.app.task import Task, in_precision, meta_model
from distaccum.core.objectives import cast_inputs
from distaccum.core.strategies import StrategyName
from distaccum.nn.blocks import checkpoint_blocks
from distaccum.optim import make_optimizer
from distaccum.planner.peak import peak
from distaccum.planner.segments import MicroBatchTrace, Update
from distaccum.planner.shapes import ModelShape, Setup, describe
from distaccum.planner.timeline import Peak
from distaccum.planner.trace import trace, update
from distaccum.step.overlap.schedule import AUTO

# Samples of the two traced micro-batches. The line through these two predicts other sizes. The
# smaller one has 2 samples, since BatchNorm needs at least two.
TRACED = (2, 16)


class Footprint:
    """Predicts memory and FLOPs of a configuration for any strategy, policy and micro-batch size.

    The number of micro-batches and checkpointing may vary too. The first prediction for each kind
    of micro-batch (checkpointed or not, cast by FSDP2 or not) takes a second or two; each further
    prediction takes about a millisecond.
    """

    def __init__(self, config: Config, task: Task) -> None:
        """Prepare the predictions; nothing is traced yet."""
        self._config = config
        self._task = task
        self._device = torch.device(
            "cuda" if torch.cuda.is_available() and config.device.value != "cpu" else "cpu"
        )
        # Whether FSDP2 casts gathered parameters; other strategies use autocast.
        self._casts = (
            config.precision.name.compute_dtype is not config.precision.name.parameter_dtype
        )
        self._traces: dict[tuple[bool, bool], tuple[MicroBatchTrace, MicroBatchTrace]] = {}
        self._updates: dict[int, Update] = {}

    def peak(
        self,
        setup: Setup,
        samples: int,
        num_micro_batches: int,
        overlap_micro_batches: int = 1,
        checkpoint: bool | None = None,
    ) -> Peak:
        """Predict the peak memory of a rank's tensors.

        Args:
            setup: how the model is distributed; its strategy may differ from the configured one.
            samples: samples per micro-batch.
            num_micro_batches: micro-batches per rank in a window.
            overlap_micro_batches: how many of the last micro-batches are computed block by block.
            checkpoint: whether blocks are checkpointed; None: as configured.
        """
        return peak(
            self.model,
            setup,
            self._update(setup.shards),
            self.micro_batch(samples, setup.sharded, checkpoint),
            num_micro_batches,
            overlap_micro_batches,
            self._device.type,
        )

    def flops(self, samples: int, checkpoint: bool | None = None) -> int:
        """Count the FLOPs of matrix products in the forward and backward of one micro-batch.

        Recomputation by checkpointing is included.

        Args:
            samples: samples in the micro-batch.
            checkpoint: whether blocks are checkpointed; None: as configured.
        """
        return self.micro_batch(samples, self.configured_sharded, checkpoint).flops

    def micro_batch(
        self, samples: int, sharded: bool, checkpoint: bool | None = None
    ) -> MicroBatchTrace:
        """Return the trace of one micro-batch of the longest samples.

        Args:
            samples: samples in the micro-batch.
            sharded: whether FSDP2 shards the model; it may cast the parameters that it gathers.
            checkpoint: whether blocks are checkpointed; None: as configured.
        """
        recomputes = self._config.nn.checkpoint if checkpoint is None else checkpoint
        key = recomputes, sharded and self._casts
        if key not in self._traces:
            few, many = (self._traced(size, *key) for size in TRACED)
            self._traces[key] = few, many
        return MicroBatchTrace.between(*self._traces[key], samples)

    @cached_property
    def model(self) -> ModelShape:
        """Return the shapes and dtypes of the configured model."""
        model = meta_model(self._config, self._task)
        return describe(model, self._task.blocks_of(model))

    @property
    def configured_sharded(self) -> bool:
        """Return whether the configured strategy shards the model with FSDP2."""
        return self._config.parallel.name in (StrategyName.fsdp, StrategyName.hsdp)

    def _traced(self, samples: int, checkpoint: bool, cast: bool) -> MicroBatchTrace:
        config, task = self._config, self._task
        model = meta_model(config, task)
        compute = config.precision.name.compute_dtype if cast else None
        if checkpoint:
            checkpoint_blocks(task.blocks_of(model))
        name = StrategyName.fsdp if cast else StrategyName.single
        objective = in_precision(
            replace(config, parallel=replace(config.parallel, name=name)), task.objective
        )
        if compute is not None:
            objective = cast_inputs(objective, compute)
        longest = task.train.longest_samples(1)
        micro_batch = task.train.batch(longest * samples, torch.Generator().manual_seed(0))
        return trace(
            model, task.blocks_of, objective.loss_sum, micro_batch, samples, self._device, compute
        )

    def _update(self, shards: int) -> Update:
        if shards not in self._updates:
            shapes = [(p.local(shards), p.dtype) for p in self.model.trained]
            self._updates[shards] = update(
                lambda model: make_optimizer(model, self._config.optim), shapes, self._device
            )
        return self._updates[shards]


def overlap_limit(config: Config, task: Task, micro_batch_size: int) -> int | None:
    """Return the largest T that accum.overlap_micro_batches=auto may choose; None: no limit.

    T is limited by accum.overlap_memory_mb. Each further micro-batch keeps the activations that the
    backward of its blocks needs, and the head's gradients of parameters that an earlier part of the
    model uses too.

    Args:
        config: the configuration.
        task: the task of the configuration.
        micro_batch_size: samples per micro-batch.
    """
    memory_mb = config.accum.overlap_memory_mb
    if config.accum.overlap_micro_batches != AUTO or memory_mb is None:
        return None
    if not task.blocks_of(meta_model(config, task)):
        return None
    footprint = Footprint(config, task)
    waiting = footprint.micro_batch(micro_batch_size, footprint.configured_sharded).to_head
    return 1 + memory_mb * 2**20 // waiting
