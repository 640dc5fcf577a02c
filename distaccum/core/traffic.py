"""Computes the collectives and bytes of one window from sizes.

Strategies call it with the sizes of a real model, and the planner with those of shapes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from distaccum.core.strategies import Sync


@dataclass(frozen=True)
class Collectives:
    """Describes the collectives of one kind in one window, as one rank sees them."""

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


@dataclass(frozen=True)
class Traffic:
    """Holds numbers of collectives and their bytes, by kind, as one rank sees them.

    Broadcasts are not included, because they are only used for setup. Bytes are those of the whole
    message: the tensor of an all-reduce, the output of an all-gather, the input of a
    reduce-scatter. The bytes that a network card sends depend on the algorithm and are not counted.
    """

    counts: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)

    @staticmethod
    def of(entries: Iterable[tuple[str, int]]) -> Traffic:
        """Add up (kind, bytes) pairs, one per collective."""
        return Traffic.total(Collectives("", kind, 1, size, 1) for kind, size in entries)

    @staticmethod
    def total(sends: Iterable[Collectives]) -> Traffic:
        """Add up collectives by kind."""
        traffic = Traffic()
        for one in sends:
            traffic.counts[one.kind] += one.count
            traffic.bytes[one.kind] += one.num_bytes
        return traffic

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.counts + other.counts, self.bytes + other.bytes)

    def __str__(self) -> str:
        return (
            ", ".join(f"{n} {kind} ({self.bytes[kind]:,} bytes)" for kind, n in self.counts.items())
            or "nothing"
        )


@dataclass(frozen=True)
class GroupSizes:
    """Holds the bytes of one FSDP2 parameter group, with padding."""

    gathered: int  # output of its all-gather
    scattered: int  # input of its reduce-scatter: the trained parameters only
    reduced: int  # one shard: its all-reduce between replicas (HSDP)
    reshards: bool  # whether it is gathered a second time for the backward


def sharded(
    groups: Sequence[GroupSizes],
    sync: Sync,
    num_micro_batches: int,
    shards: int,
    replicas: int | None,
) -> tuple[Collectives, ...]:
    """Return the collectives of one window under FSDP2, added up over its parameter groups.

    Parameters are gathered once or twice per micro-batch, or once per window with `gather_once`.
    Gradients are reduced as often as the policy says.

    Args:
        groups: the sizes of FSDP2's parameter groups.
        sync: the sync policy, not `auto`.
        num_micro_batches: micro-batches per rank, padding included.
        shards: the number of ranks that share one copy of the parameters.
        replicas: HSDP: the number of copies; None on a mesh without replicas.
    """
    gathers = [
        1 if sync is Sync.gather_once else num_micro_batches * (1 + g.reshards) for g in groups
    ]
    scatters = num_micro_batches if sync in (Sync.every, Sync.reduce_scatter) else 1
    reduces = num_micro_batches if sync is Sync.every else 1
    # What is sent, each message a number of times and its bytes, and among how many ranks.
    sends: list[tuple[str, str, list[tuple[int, int]], int | None]] = [
        (
            "parameters (all-gather)",
            "all_gather",
            [(times, group.gathered) for times, group in zip(gathers, groups, strict=True)],
            shards if shards > 1 else None,
        ),
        (
            "gradients (reduce-scatter)",
            "reduce_scatter",
            [(scatters, group.scattered) for group in groups],
            shards if shards > 1 else None,
        ),
        (
            "gradients (all-reduce between replicas)",
            "all_reduce",
            [(reduces, group.reduced) for group in groups],
            replicas,
        ),
    ]
    found = [
        Collectives(
            what,
            kind,
            sum(times for times, size in messages if size),  # empty ones are not sent
            sum(times * size for times, size in messages),
            ranks,
        )
        for what, kind, messages, ranks in sends
        if ranks is not None
    ]
    return tuple(one for one in found if one.count)


def replicated(
    num_bytes: int, buckets: Sequence[int], num_flags: int, num_maps: int, ranks: int
) -> tuple[Collectives, ...]:
    """Return the collectives of one window under DDP.

    Args:
        num_bytes: the bytes of all gradients.
        buckets: for each reduction of the window, the number of its all-reduces.
        num_flags: the number of reduced parameters.
        num_maps: how many times ranks tell each other which parameters they used, one int32 each.
        ranks: the number of ranks.
    """
    gradients = Collectives(
        "gradients (all-reduce)", "all_reduce", sum(buckets), len(buckets) * num_bytes, ranks
    )
    num_bytes = 4 * num_flags * num_maps
    flags = Collectives(
        "flags of used parameters (all-reduce)", "all_reduce", num_maps, num_bytes, ranks
    )
    return tuple(one for one in (gradients, flags) if one.count)


def consensus(world_size: int, num_terms: int, rows: int = 1) -> Collectives:
    """Return the small all-reduces by which ranks reach consensus in one step.

    Each rank contributes one float64 row: 4 numbers, and 2 for each term of the loss (see
    step/consensus.py).

    Args:
        world_size: the number of ranks.
        num_terms: the number of terms of the loss.
        rows: all-reduces per step. It is 2 if the next window is not known in advance, or if ranks
            agree separately whether one ran out of memory.
    """
    num_bytes = 8 * world_size * (4 + 2 * num_terms)
    return Collectives("consensus (all-reduce)", "all_reduce", rows, rows * num_bytes, world_size)


def fill_buckets(sizes: Sequence[int], cap: int) -> list[list[int]]:
    """Fill buckets with messages in their order, each until it holds at least `cap` bytes.

    Args:
        sizes: the bytes of each message.
        cap: the bytes from which on a bucket takes no further message.

    Returns:
        For each bucket the positions of its messages in `sizes`.
    """
    buckets: list[list[int]] = []
    filled = cap
    for position, size in enumerate(sizes):
        if filled >= cap:
            buckets.append([])
            filled = 0
        buckets[-1].append(position)
        filled += size
    return buckets
