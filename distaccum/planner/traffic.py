"""Predicts the collectives and bytes of one step from shapes.

They equal the forecast that the strategies make for a real model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from distaccum.planner.shapes import ROOT, ModelShape, ParameterShape, Setup

MIB = 2**20
OWN_BUCKET_BYTES = 25 * MIB  # bucket size of distaccum's own reduction, see grads/accumulate.py


@dataclass(frozen=True)
class CollectiveCost:
    """Describes the collectives of one kind in one step, as one rank sees them."""

    what: str  # what they carry, in words
    kind: str  # all_reduce, all_gather or reduce_scatter
    count: int
    # Of all whole messages: input of an all-reduce or reduce-scatter, output of an all-gather.
    num_bytes: int
    ranks: int  # number of ranks that take part in each collective

    @property
    def bytes_sent_per_rank(self) -> int:
        """Return the bytes that the network card of one rank sends under the ring algorithm.

        It receives as many. An all-gather or a reduce-scatter among R ranks sends (R - 1) / R of
        the message, an all-reduce twice that (Patarasuk and Yuan, "Bandwidth optimal all-reduce
        algorithms", 2009). Other algorithms (trees, NVLink SHARP) send other amounts.
        """
        passes = 2 if self.kind == "all_reduce" else 1
        return passes * self.num_bytes * (self.ranks - 1) // self.ranks


def gradient_sends(model: ModelShape, setup: Setup, num_micro_batches: int) -> tuple[CollectiveCost, ...]:
    """Return the collectives that carry parameters and gradients in one step.

    The step is any after the first, when DDP has rebuilt its buckets. Bytes are exact, and so is
    the count under FSDP2. Under DDP the count assumes that gradients arrive in the reverse order of
    the parameters; otherwise it can be off by a bucket or two. BatchNorm's statistics are not
    included.

    Args:
        model: the shapes of the model, from `describe`.
        setup: how the model is distributed.
        num_micro_batches: micro-batches per rank; if ranks differ, those of the rank with the most.
    """
    if setup.strategy == "single":
        return ()
    return _sharded(model, setup, num_micro_batches) if setup.sharded else _replicated(model, setup, num_micro_batches)


def control_sends(world_size: int, num_terms: int, rows: int = 1) -> tuple[CollectiveCost, ...]:
    """Return the small all-reduces by which ranks reach consensus in one step.

    Each rank contributes one float64 row: 4 numbers, and 2 for each term of the loss.

    Args:
        world_size: the number of ranks.
        num_terms: the number of terms of the loss.
        rows: all-reduces per step. It is 2 if the next window is not known in advance, or if ranks
            agree separately whether one ran out of memory.
    """
    num_bytes = 8 * world_size * (4 + 2 * num_terms)
    return (CollectiveCost("consensus (all-reduce)", "all_reduce", rows, rows * num_bytes, world_size),)


def by_kind(sends: Iterable[CollectiveCost]) -> dict[str, tuple[int, int]]:
    """Return the number of collectives and their bytes, by kind."""
    totals: dict[str, tuple[int, int]] = {}
    for entry in sends:
        count, num_bytes = totals.get(entry.kind, (0, 0))
        totals[entry.kind] = (count + entry.count, num_bytes + entry.num_bytes)
    return totals


def _sharded(model: ModelShape, setup: Setup, num_micro_batches: int) -> tuple[CollectiveCost, ...]:
    shards = setup.shards
    gathers, gathered = 0, 0
    scatters, scattered, reduced = 0, 0, 0
    for group, parameters in model.groups():
        # The root stays gathered from its forward to its backward. So do blocks that are not
        # resharded after their forward.
        twice = group != ROOT and setup.reshard_after_forward
        times = 1 if setup.sync == "gather_once" else num_micro_batches * (2 if twice else 1)
        gathers += times
        gathered += times * sum(p.padded(shards) * setup.gathered(p).itemsize for p in parameters)
        trained = [p for p in parameters if p.trained]
        scatters += bool(trained)
        scattered += sum(p.padded(shards) * setup.reduced(p).itemsize for p in trained)
        reduced += sum(p.shard(shards) * setup.reduced(p).itemsize for p in trained)
    per_micro_batch = num_micro_batches if setup.sync in ("every", "reduce_scatter") else 1
    between = num_micro_batches if setup.sync == "every" else 1
    sends = []
    if shards > 1 and gathers:
        sends.append(CollectiveCost("parameters (all-gather)", "all_gather", gathers, gathered, shards))
    if shards > 1 and scatters:
        entry = CollectiveCost(
            "gradients (reduce-scatter)",
            "reduce_scatter",
            scatters * per_micro_batch,
            scattered * per_micro_batch,
            shards,
        )
        sends.append(entry)
    if setup.strategy == "hsdp" and scatters:
        entry = CollectiveCost(
            "gradients (all-reduce between replicas)",
            "all_reduce",
            scatters * between,
            reduced * between,
            setup.replicas,
        )
        sends.append(entry)
    return tuple(sends)


def _replicated(model: ModelShape, setup: Setup, num_micro_batches: int) -> tuple[CollectiveCost, ...]:
    trained = model.trained
    if not trained:
        return ()
    synced = num_micro_batches if setup.sync == "every" else 1
    own_sums = setup.own_sums(model)
    if own_sums:
        sizes = [p.numel * setup.reduced(p).itemsize for p in reversed(trained)]
        num_buckets = _filled(sizes, OWN_BUCKET_BYTES)
    else:
        sizes = [p.numel * p.dtype.itemsize for p in trained]
        num_buckets = _ddp_buckets(trained, setup)
    num_bytes = sum(sizes) * synced
    sends = [CollectiveCost("gradients (all-reduce)", "all_reduce", num_buckets * synced, num_bytes, setup.world_size)]
    if setup.find_unused_parameters and not own_sums:  # one int32 per parameter
        num_bytes = 4 * len(trained) * synced
        sends.append(
            CollectiveCost("flags of used parameters (all-reduce)", "all_reduce", synced, num_bytes, setup.world_size)
        )
    return tuple(sends)


def _ddp_buckets(trained: Sequence[ParameterShape], setup: Setup) -> int:
    """Count the buckets that DDP makes of the parameters; each dtype has its own buckets."""
    # With find_unused_parameters DDP never rebuilds its buckets in the order of gradient arrival.
    ordered = trained if setup.find_unused_parameters else tuple(reversed(trained))
    # The cap holds for the first bucket too: only DDP's default makes that one smaller.
    cap = int(setup.bucket_mb * MIB)
    dtypes = dict.fromkeys(p.dtype for p in ordered)
    return sum(_filled([p.numel * p.dtype.itemsize for p in ordered if p.dtype is t], cap) for t in dtypes)


def _filled(sizes: Sequence[int], cap: int) -> int:
    """Count the buckets that messages fill; each bucket takes messages until it has `cap` bytes."""
    buckets, filled = 0, cap
    for size in sizes:
        if filled >= cap:
            buckets, filled = buckets + 1, 0
        filled += size
    return buckets
