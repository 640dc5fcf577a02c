"""Predicts the memory of one rank from shapes, part by part.

The rank is rank 0, which holds the most: its shards are never shorter than those of other ranks.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import accumulate

from distaccum.planner.shapes import ROOT, ModelShape, Setup


@dataclass(frozen=True)
class OptimizerStates:
    """Describes the state that an optimizer keeps for each trained parameter."""

    per_parameter: int  # number of tensors of the parameter's own shape and dtype
    step_bytes: int  # bytes of its count of updates


def states_of(optimizer: str, momentum: float) -> OptimizerStates:
    """Return the state that one of torch's optimizers keeps for each parameter.

    AdamW keeps two moments and a float32 count of updates. SGD keeps a momentum buffer unless the
    momentum is 0.

    Args:
        optimizer: "adamw" or "sgd".
        momentum: the momentum of SGD; not read for AdamW.

    Raises:
        ValueError: for any other optimizer.
    """
    if optimizer == "adamw":
        return OptimizerStates(2, 4)
    if optimizer == "sgd":
        return OptimizerStates(1 if momentum else 0, 0)
    raise ValueError(f"the state of the optimizer {optimizer!r} is unknown; use 'adamw' or 'sgd'")


@dataclass(frozen=True)
class Memory:
    """Holds the predicted bytes of each part of one rank's memory.

    Memory of the allocator, of libraries and of the data loader is not included.
    """

    weights: int  # parameters (shards with their padding) and buffers
    gradients: int  # as the optimizer receives them
    accumulation: int  # sums kept from one micro-batch to the next, in addition to `gradients`
    optimizer: int  # optimizer state after the first update
    gathered: int  # fsdp, hsdp: whole parameters and their all-gather buffers, at their peak
    buckets: int  # ddp: DDP's own copy of the gradients
    messages: int  # buffers that gradients are copied into during a reduction
    activations: int  # saved for the backward of one micro-batch

    @property
    def total(self) -> int:
        """Return the sum of all parts: an upper bound, since they are never all alive at once."""
        return sum(asdict(self).values())


def memory(
    model: ModelShape, setup: Setup, states: OptimizerStates, num_micro_batches: int, activations: int = 0
) -> Memory:
    """Compute the memory of one rank, part by part.

    Args:
        model: the shapes of the model, from `describe`.
        setup: how the model is distributed.
        states: the state of the optimizer, from `states_of`.
        num_micro_batches: micro-batches per rank in a window; 1 means no accumulation.
        activations: bytes saved for the backward of one micro-batch, from `trace`.
    """
    shards = setup.shards
    local = {p.name: p.shard(shards) for p in model.parameters}
    own_sums = setup.own_sums(model)
    gradients = sum(local[p.name] * p.dtype.itemsize for p in model.trained)
    return Memory(
        weights=weight_bytes(model, setup),
        gradients=gradients,
        accumulation=_accumulation(model, setup, num_micro_batches, own_sums),
        optimizer=sum(
            states.per_parameter * local[p.name] * p.dtype.itemsize + states.step_bytes for p in model.trained
        ),
        gathered=_gathered(model, setup) if setup.sharded else 0,
        buckets=gradients if setup.strategy == "ddp" else 0,
        messages=_messages(model, setup, own_sums),
        activations=activations,
    )


def weight_bytes(model: ModelShape, setup: Setup) -> int:
    """Return the bytes of parameters (shards with their padding) and buffers on rank 0."""
    return sum(p.shard(setup.shards) * p.dtype.itemsize for p in model.parameters) + model.buffer_bytes


def _accumulation(model: ModelShape, setup: Setup, num_micro_batches: int, own_sums: bool) -> int:
    shards = setup.shards
    if own_sums:
        return sum(p.shard(shards) * setup.accumulated(p).itemsize for p in model.trained)
    if not setup.sharded or num_micro_batches == 1 or setup.sync == "every":
        return 0
    if setup.sync == "reduce_scatter":  # reduced within a replica, not yet between replicas
        return sum(p.shard(shards) * setup.reduced(p).itemsize for p in model.trained)
    return sum(p.numel * setup.reduced(p).itemsize for p in model.trained)  # unsharded


def _messages(model: ModelShape, setup: Setup, own_sums: bool) -> int:
    if setup.sharded:  # the input of the largest reduce-scatter
        shards = setup.shards
        groups = (parameters for _, parameters in model.groups())
        sizes = (sum(p.padded(shards) * setup.reduced(p).itemsize for p in group if p.trained) for group in groups)
        return max(sizes, default=0)
    if setup.strategy == "single" or not own_sums:
        return 0
    # All messages are in flight together. A sum is copied once more beforehand if its dtype is not
    # the dtype of the reduction.
    copies = {p: 1 if setup.reduced(p) is setup.accumulated(p) else 2 for p in model.trained}
    return sum(copies[p] * p.numel * setup.reduced(p).itemsize for p in model.trained)


def _gathered(model: ModelShape, setup: Setup) -> int:
    """Compute the peak bytes of the parameters that FSDP2 has gathered.

    FSDP2 keeps the root's parameters from its forward to its backward, and the parameters of a
    block only while that block is computed. A group exists twice while it is copied out of the
    all-gather buffer. In the backward that buffer belongs to the block that is prefetched, which
    needs no more.
    """
    sizes = {
        group: sum(p.padded(setup.shards) * setup.gathered(p).itemsize for p in parameters)
        for group, parameters in model.groups()
    }
    root, twice = sizes.pop(ROOT, 0), setup.shards > 1
    blocks = list(sizes.values())
    if setup.sync == "gather_once" or not setup.reshard_after_forward:
        held = list(accumulate([root, *blocks]))
        return max(total + last * twice for total, last in zip(held, [root, *blocks], strict=True))
    return max(root * (1 + twice), root + max(blocks, default=0) * (1 + twice))
