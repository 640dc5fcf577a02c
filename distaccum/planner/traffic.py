"""Collectives and bytes of one step, from shapes: what the strategies forecast of a model that exists."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from distaccum.planner.shapes import ROOT, ModelShape, ParameterShape, Setup

MIB = 2**20
OWN_BUCKET_BYTES = 25 * MIB  # of distaccum's own reduction, see grads/accumulate.py


@dataclass(frozen=True)
class Sends:
    """Collectives of one kind in one step, as one rank sees them."""

    what: str  # in words
    kind: str  # all_reduce, all_gather or reduce_scatter
    count: int
    num_bytes: int  # of all messages, whole: the tensor reduced, the output gathered, the input scattered
    ranks: int  # that take part in each

    @property
    def card_bytes(self) -> int:
        """What one rank's network card sends under the ring algorithm (it receives as much).

        Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms" (2009): (R - 1) / R of the message for a gather or
        a scatter, twice that for an all-reduce. Other algorithms (trees, NVLink SHARP) send other amounts.
        """
        passes = 2 if self.kind == "all_reduce" else 1
        return passes * self.num_bytes * (self.ranks - 1) // self.ranks


def gradient_sends(model: ModelShape, setup: Setup, num_micros: int) -> tuple[Sends, ...]:
    """What carries parameters and gradients in one step, once DDP has arranged its buckets (after the first).

    Bytes are exact. So is the count under FSDP2; under DDP it takes gradients to arrive in the reverse order of the
    parameters, and can be off by a bucket or two where they do not. BatchNorm's statistics are not among it.

    Args:
        model: from `describe`.
        setup: how it is spread.
        num_micros: per rank; where ranks differ, on the one that has most.
    """
    if setup.strategy == "single":
        return ()
    return _sharded(model, setup, num_micros) if setup.sharded else _replicated(model, setup, num_micros)


def control_sends(world_size: int, num_terms: int, rows: int = 1) -> tuple[Sends, ...]:
    """The small all-reduce by which ranks agree: a float64 row a rank, of 4 numbers and 2 for each term of the loss.

    `rows` is 2 where the window after it is not known ahead, or a shortage of memory is agreed on apart.
    """
    num_bytes = 8 * world_size * (4 + 2 * num_terms)
    return (Sends("agreement of the ranks", "all_reduce", rows, rows * num_bytes, world_size),)


def by_kind(sends: Iterable[Sends]) -> dict[str, tuple[int, int]]:
    """Collectives and bytes by kind."""
    totals: dict[str, tuple[int, int]] = {}
    for entry in sends:
        count, num_bytes = totals.get(entry.kind, (0, 0))
        totals[entry.kind] = (count + entry.count, num_bytes + entry.num_bytes)
    return totals


def _sharded(model: ModelShape, setup: Setup, num_micros: int) -> tuple[Sends, ...]:
    shards = setup.shards
    gathers, gathered = 0, 0
    scatters, scattered, reduced = 0, 0, 0
    for group, parameters in model.groups():
        # The root is kept from its forward to its backward, blocks only where they are not resharded in between.
        twice = group != ROOT and setup.reshard_after_forward
        times = 1 if setup.sync == "keep" else num_micros * (2 if twice else 1)
        gathers += times
        gathered += times * sum(p.padded(shards) * setup.gathered(p).itemsize for p in parameters)
        trained = [p for p in parameters if p.trained]
        scatters += bool(trained)
        scattered += sum(p.padded(shards) * setup.reduced(p).itemsize for p in trained)
        reduced += sum(p.shard(shards) * setup.reduced(p).itemsize for p in trained)
    per_micro = num_micros if setup.sync in ("every", "shard") else 1
    between = num_micros if setup.sync == "every" else 1
    sends = []
    if shards > 1 and gathers:
        sends.append(Sends("parameters, gathered", "all_gather", gathers, gathered, shards))
    if shards > 1 and scatters:
        entry = Sends("gradients, to shards", "reduce_scatter", scatters * per_micro, scattered * per_micro, shards)
        sends.append(entry)
    if setup.strategy == "hsdp" and scatters:
        entry = Sends(
            "gradients, between replicas", "all_reduce", scatters * between, reduced * between, setup.replicas
        )
        sends.append(entry)
    return tuple(sends)


def _replicated(model: ModelShape, setup: Setup, num_micros: int) -> tuple[Sends, ...]:
    trained = model.trained
    if not trained:
        return ()
    synced = num_micros if setup.sync == "every" else 1
    own_sums = setup.own_sums(model)
    if own_sums:
        sizes = [p.numel * setup.reduced(p).itemsize for p in reversed(trained)]
        num_buckets = _filled(sizes, OWN_BUCKET_BYTES)
    else:
        sizes = [p.numel * p.dtype.itemsize for p in trained]
        num_buckets = _ddp_buckets(trained, setup)
    sends = [Sends("gradients", "all_reduce", num_buckets * synced, sum(sizes) * synced, setup.world_size)]
    if setup.find_unused_parameters and not own_sums:  # one int32 a parameter
        told = Sends("which were used", "all_reduce", synced, 4 * len(trained) * synced, setup.world_size)
        sends.append(told)
    return tuple(sends)


def _ddp_buckets(trained: Sequence[ParameterShape], setup: Setup) -> int:
    """Parameters in the order in which DDP fills its buckets, those of each dtype in buckets of their own."""
    # With find_unused_parameters DDP never learns the order of arrival.
    ordered = trained if setup.find_unused_parameters else tuple(reversed(trained))
    cap = int(setup.bucket_mb * MIB)  # of the first bucket too, since it is given and not DDP's default
    dtypes = dict.fromkeys(p.dtype for p in ordered)
    return sum(_filled([p.numel * p.dtype.itemsize for p in ordered if p.dtype is t], cap) for t in dtypes)


def _filled(sizes: Sequence[int], cap: int) -> int:
    """How many buckets so many messages fill: each takes messages until it has reached the cap."""
    buckets, filled = 0, cap
    for size in sizes:
        if filled >= cap:
            buckets, filled = buckets + 1, 0
        filled += size
    return buckets
