"""Describes the sizes and dtypes of a model, and how it is distributed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from distaccum.core.loss import wide
from distaccum.core.strategies import StrategyName, Sync
from distaccum.core.traffic import GroupSizes

ROOT = -1  # the group of all parameters that belong to no block


@dataclass(frozen=True)
class ParameterShape:
    """Describes one parameter."""

    name: str
    shape: tuple[int, ...]  # of the unsharded parameter
    dtype: torch.dtype
    trained: bool
    group: int  # index of the block that it is sharded with, or ROOT

    @property
    def numel(self) -> int:
        """Return the number of elements of the unsharded parameter."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Return the bytes of the unsharded parameter."""
        return self.numel * self.dtype.itemsize

    def shard(self, shards: int) -> int:
        """Return the number of elements on rank 0, which holds the most.

        FSDP2 splits the first dimension and rounds up.

        Args:
            shards: how many ranks the parameter is split over.
        """
        return math.prod(self.local(shards))

    def local(self, shards: int) -> tuple[int, ...]:
        """Return the shape of rank 0's shard if the parameter is split over `shards` ranks."""
        return (-(-self.shape[0] // shards), *self.shape[1:]) if self.shape else ()

    def padded(self, shards: int) -> int:
        """Return the number of elements of all shards, each padded to the size of rank 0's."""
        return self.shard(shards) * shards


@dataclass(frozen=True)
class ModelShape:
    """Describes all parameters of a model in the order of `model.parameters()`, tied ones once."""

    parameters: tuple[ParameterShape, ...]
    buffer_bytes: int  # of all buffers, which every rank holds entirely under any strategy

    @property
    def trained(self) -> tuple[ParameterShape, ...]:
        """Return the parameters that have gradients."""
        return tuple(p for p in self.parameters if p.trained)

    def groups(self) -> Iterator[tuple[int, tuple[ParameterShape, ...]]]:
        """Yield FSDP2's non-empty parameter groups: the root's first, then the blocks' in order."""
        for group in sorted({p.group for p in self.parameters}):
            yield group, tuple(p for p in self.parameters if p.group == group)


@dataclass(frozen=True)
class Setup:
    """Describes how a model is distributed and how its gradients are summed.

    A dtype of None leaves the choice to distaccum: the methods return the dtype that it chooses.
    """

    strategy: StrategyName  # never `auto`
    sync: Sync  # never `auto`
    world_size: int
    replicas: int  # hsdp: number of groups of ranks that each hold the whole model; 1 elsewhere
    compute: torch.dtype | None  # fsdp, hsdp: dtype of gathered parameters; None: their own
    accumulate: torch.dtype | None  # dtype of gradient sums over micro-batches
    reduce: torch.dtype | None  # dtype of gradient sums over ranks
    reshard_after_forward: bool  # fsdp, hsdp
    find_unused_parameters: bool  # ddp
    bucket_mb: float  # ddp
    # ddp: gradients are sent after the window, once ranks agree that none ran out of memory.
    apart: bool = False

    def __str__(self) -> str:
        return f"{self.strategy} {self.sync}"

    @property
    def sharded(self) -> bool:
        """Return whether FSDP2 shards the model (fsdp, hsdp)."""
        return self.strategy in (StrategyName.fsdp, StrategyName.hsdp)

    @property
    def shards(self) -> int:
        """Return the number of shards that each parameter is split into."""
        return self.world_size // self.replicas if self.sharded else 1

    def gathered(self, parameter: ParameterShape) -> torch.dtype:
        """Return the dtype in which a parameter is gathered and computed with."""
        return self.compute or parameter.dtype

    def accumulated(self, parameter: ParameterShape) -> torch.dtype:
        """Return the dtype of the gradient sums over micro-batches that distaccum keeps itself."""
        return self.accumulate or wide(parameter.dtype)

    def reduced(self, parameter: ParameterShape) -> torch.dtype:
        """Return the dtype in which a gradient is summed over ranks.

        Under FSDP2 it is also the dtype of sums over micro-batches that are not reduced at once.
        """
        return self.reduce or wide(self.gathered(parameter) if self.sharded else parameter.dtype)

    def own_sums(self, model: ModelShape) -> bool:
        """Return whether distaccum keeps its own gradient sums in addition to `.grad`.

        It does so when the sums in `.grad` would not have the configured dtype, and under DDP when
        gradients are sent after the window (`apart`).
        """
        if self.sharded:
            return self.sync is Sync.every and any(
                not self.accumulated(p) is p.dtype is wide(p.dtype) for p in model.trained
            )
        apart = self.apart and self.strategy is StrategyName.ddp
        return apart or any(
            not p.dtype is self.accumulated(p) is self.reduced(p) for p in model.trained
        )


def describe(model: nn.Module, blocks: Sequence[nn.Module]) -> ModelShape:
    """Return the shapes of a model before it is wrapped; it may be on any device, including meta.

    Args:
        model: the whole model.
        blocks: the modules that `fully_shard` is applied to before the whole model, in this order.
            A parameter belongs to the first block that contains it.
    """
    group_of: dict[int, int] = {}
    for index, block in enumerate(blocks):
        for parameter in block.parameters():
            group_of.setdefault(id(parameter), index)
    parameters = tuple(
        ParameterShape(name, tuple(p.shape), p.dtype, p.requires_grad, group_of.get(id(p), ROOT))
        for name, p in model.named_parameters()
    )
    return ModelShape(parameters, sum(buffer.nbytes for buffer in model.buffers()))


def group_sizes(group: int, parameters: Sequence[ParameterShape], setup: Setup) -> GroupSizes:
    """Return the bytes that FSDP2 gathers and reduces for one of its parameter groups.

    Args:
        group: the number of the group. The root stays gathered from its forward to its backward.
        parameters: the parameters of the group.
        setup: how the model is distributed.
    """
    trained = [p for p in parameters if p.trained]
    return GroupSizes(
        gathered=sum(p.padded(setup.shards) * setup.gathered(p).itemsize for p in parameters),
        scattered=sum(p.padded(setup.shards) * setup.reduced(p).itemsize for p in trained),
        reduced=sum(p.shard(setup.shards) * setup.reduced(p).itemsize for p in trained),
        reshards=group != ROOT and setup.reshard_after_forward,
    )
