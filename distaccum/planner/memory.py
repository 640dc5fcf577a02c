"""Bytes on one rank, from shapes: of the rank that holds most (rank 0, whose shards are never the shorter ones)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import accumulate

from distaccum.planner.shapes import ROOT, ModelShape, Setup


@dataclass(frozen=True)
class OptimizerStates:
    """What an optimizer holds for each trained parameter."""

    per_parameter: int  # tensors of the parameter's own shape and dtype
    step_bytes: int  # its count of updates


def states_of(optimizer: str, momentum: float) -> OptimizerStates:
    """Of torch's optimizers: AdamW has two moments and a float32 count, SGD a momentum unless it is 0."""
    if optimizer == "adamw":
        return OptimizerStates(2, 4)
    if optimizer == "sgd":
        return OptimizerStates(1 if momentum else 0, 0)
    raise ValueError(f"no numbers are known for the optimizer {optimizer!r}")


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank. What the allocator, the libraries and the data loader take comes on top."""

    weights: int  # parameters (shards with their padding) and buffers
    gradients: int  # as the optimizer receives them
    accumulation: int  # sums that live from one micro to the next, beside `gradients`
    optimizer: int  # state after the first update
    gathered: int  # fsdp, hsdp: whole parameters, with the buffers they come in, at their high point
    buckets: int  # ddp: its own copy of the gradients
    messages: int  # what a reduction copies gradients into; only during it
    activations: int  # saved for the backward of one micro

    @property
    def total(self) -> int:
        """The sum: no less than these parts take at any moment, since not all of them live at once."""
        return sum(asdict(self).values())


def memory(model: ModelShape, setup: Setup, states: OptimizerStates, num_micros: int, activations: int = 0) -> Memory:
    """The memory of one rank.

    Args:
        model: from `describe`.
        setup: how it is spread.
        states: of the optimizer.
        num_micros: per rank in a window; 1 is a window without accumulation.
        activations: bytes saved for the backward of one micro, from `trace`.
    """
    shards = setup.shards
    local = {p.name: p.shard(shards) for p in model.parameters}
    own_sums = setup.own_sums(model)
    gradients = sum(local[p.name] * p.dtype.itemsize for p in model.trained)
    return Memory(
        weights=weight_bytes(model, setup),
        gradients=gradients,
        accumulation=_accumulation(model, setup, num_micros, own_sums),
        optimizer=sum(
            states.per_parameter * local[p.name] * p.dtype.itemsize + states.step_bytes for p in model.trained
        ),
        gathered=_gathered(model, setup) if setup.sharded else 0,
        buckets=gradients if setup.strategy == "ddp" else 0,
        messages=_messages(model, setup, own_sums),
        activations=activations,
    )


def weight_bytes(model: ModelShape, setup: Setup) -> int:
    """Parameters (shards with their padding) and buffers."""
    return sum(p.shard(setup.shards) * p.dtype.itemsize for p in model.parameters) + model.buffer_bytes


def _accumulation(model: ModelShape, setup: Setup, num_micros: int, own_sums: bool) -> int:
    shards = setup.shards
    if own_sums:
        return sum(p.shard(shards) * setup.accumulated(p).itemsize for p in model.trained)
    if not setup.sharded or num_micros == 1 or setup.sync == "every":
        return 0
    if setup.sync == "shard":  # reduced within the shards' group, not yet between replicas
        return sum(p.shard(shards) * setup.reduced(p).itemsize for p in model.trained)
    return sum(p.numel * setup.reduced(p).itemsize for p in model.trained)  # whole on every rank


def _messages(model: ModelShape, setup: Setup, own_sums: bool) -> int:
    if setup.sharded:  # the input of one reduce-scatter
        shards = setup.shards
        groups = (parameters for _, parameters in model.groups())
        sizes = (sum(p.padded(shards) * setup.reduced(p).itemsize for p in group if p.trained) for group in groups)
        return max(sizes, default=0)
    if setup.strategy == "single" or not own_sums:
        return 0
    # All are under way together, and were copied once before where their dtype is not that of the sums.
    copies = {p: 1 if setup.reduced(p) is setup.accumulated(p) else 2 for p in model.trained}
    return sum(copies[p] * p.numel * setup.reduced(p).itemsize for p in model.trained)


def _gathered(model: ModelShape, setup: Setup) -> int:
    """FSDP2 keeps the root's parameters from its forward to its backward, and a block's for its own turn only.

    A group is there twice while it is copied out of the all-gather's buffer. In the backward that buffer belongs to the
    block that is gathered ahead, which takes no more than that.
    """
    sizes = {
        group: sum(p.padded(setup.shards) * setup.gathered(p).itemsize for p in parameters)
        for group, parameters in model.groups()
    }
    root, twice = sizes.pop(ROOT, 0), setup.shards > 1
    blocks = list(sizes.values())
    if setup.sync == "keep" or not setup.reshard_after_forward:
        held = list(accumulate([root, *blocks]))
        return max(total + last * twice for total, last in zip(held, [root, *blocks], strict=True))
    return max(root * (1 + twice), root + max(blocks, default=0) * (1 + twice))
