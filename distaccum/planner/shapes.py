"""A model and the way it is spread, as the predictions see them: sizes, dtypes, counts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from distaccum.core.loss import wide

ROOT = -1  # the group of what belongs to no block

Strategy = Literal["single", "ddp", "fsdp", "hsdp"]
Policy = Literal["every", "shard", "boundary", "keep"]


@dataclass(frozen=True)
class ParameterShape:
    """One parameter."""

    name: str
    shape: tuple[int, ...]  # of the whole
    dtype: torch.dtype
    trained: bool
    group: int  # the block it is sharded with, from 0, or ROOT

    @property
    def numel(self) -> int:
        """Numbers in the whole."""
        return math.prod(self.shape)

    def shard(self, shards: int) -> int:
        """Numbers on rank 0, which holds most: FSDP2 splits the first dimension, rounded up."""
        return math.prod(self.local(shards))

    def local(self, shards: int) -> tuple[int, ...]:
        """The shape of rank 0's shard."""
        return (-(-self.shape[0] // shards), *self.shape[1:]) if self.shape else ()

    def padded(self, shards: int) -> int:
        """Numbers in the whole with each rank's shard padded to the size of the first."""
        return self.shard(shards) * shards


@dataclass(frozen=True)
class ModelShape:
    """All parameters in the order of `model.parameters()`, tied ones once."""

    parameters: tuple[ParameterShape, ...]
    buffer_bytes: int  # whole on every rank, however parameters are spread

    @property
    def trained(self) -> tuple[ParameterShape, ...]:
        """Those that have gradients."""
        return tuple(p for p in self.parameters if p.trained)

    def groups(self) -> Iterator[tuple[int, tuple[ParameterShape, ...]]]:
        """FSDP2's groups that hold parameters: the root's first, then the blocks in their order."""
        for group in sorted({p.group for p in self.parameters}):
            yield group, tuple(p for p in self.parameters if p.group == group)


@dataclass(frozen=True)
class Setup:
    """How a model is spread and summed. A dtype of None is what distaccum chooses: see the methods."""

    strategy: Strategy
    sync: Policy  # not auto: what it was resolved to
    world_size: int
    replicas: int  # hsdp: groups of ranks that hold the whole model each; 1 elsewhere
    compute: torch.dtype | None  # fsdp, hsdp: in which parameters are gathered; None: as they are stored
    accumulate: torch.dtype | None  # in which gradients are summed over micros
    reduce: torch.dtype | None  # in which they are summed over ranks
    reshard_after_forward: bool  # fsdp, hsdp
    find_unused_parameters: bool  # ddp
    bucket_mb: float  # ddp
    apart: bool = False  # ddp: gradients travel after the window, since a shortage of memory is agreed on first

    @property
    def sharded(self) -> bool:
        """Whether FSDP2 holds the model."""
        return self.strategy in ("fsdp", "hsdp")

    @property
    def shards(self) -> int:
        """Into how many parts each parameter is split."""
        return self.world_size // (self.replicas if self.strategy == "hsdp" else 1) if self.sharded else 1

    def gathered(self, parameter: ParameterShape) -> torch.dtype:
        """In which a parameter is gathered and computed with."""
        return self.compute or parameter.dtype

    def accumulated(self, parameter: ParameterShape) -> torch.dtype:
        """In which sums over micros are, where distaccum makes them."""
        return self.accumulate or wide(parameter.dtype)

    def reduced(self, parameter: ParameterShape) -> torch.dtype:
        """In which a gradient is summed over ranks; under FSDP2 over the micros that it does not reduce, too."""
        return self.reduce or wide(self.gathered(parameter) if self.sharded else parameter.dtype)

    def own_sums(self, model: ModelShape) -> bool:
        """Whether distaccum keeps sums beside `.grad`, because those would be in another dtype than asked."""
        if self.sharded:
            return self.sync == "every" and any(
                not self.accumulated(p) is p.dtype is wide(p.dtype) for p in model.trained
            )
        apart = self.apart and self.strategy == "ddp"
        return apart or any(not p.dtype is self.accumulated(p) is self.reduced(p) for p in model.trained)


def describe(model: nn.Module, blocks: Sequence[nn.Module]) -> ModelShape:
    """The shapes of a model, on any device (meta included), before it is wrapped.

    Args:
        model: the whole.
        blocks: what `fully_shard` is applied to before the whole, in that order. A parameter belongs to the first that
            has it.
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
