"""Predicts the collectives and bytes of one step from shapes.

They equal the forecast that the strategies make for a real model.
"""

from __future__ import annotations

from distaccum.core.strategies import StrategyName, Sync
from distaccum.core.traffic import Collectives, consensus, fill_buckets, replicated, sharded
from distaccum.grads.accumulate import BUCKET_BYTES
from distaccum.planner.shapes import ModelShape, Setup, group_sizes


def gradient_sends(
    model: ModelShape, setup: Setup, num_micro_batches: int
) -> tuple[Collectives, ...]:
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
    if setup.strategy is StrategyName.single:
        return ()
    if setup.sharded:
        groups = [group_sizes(group, parameters, setup) for group, parameters in model.groups()]
        replicas = setup.replicas if setup.strategy is StrategyName.hsdp else None
        return sharded(groups, setup.sync, num_micro_batches, setup.shards, replicas)
    reductions = num_micro_batches if setup.sync is Sync.every else 1
    if setup.own_sums(model):
        sizes = [p.numel * setup.reduced(p).itemsize for p in reversed(model.trained)]
        num_buckets, num_maps = len(fill_buckets(sizes, BUCKET_BYTES)), 0
    else:
        sizes = ddp_buckets(model, setup)
        num_buckets, num_maps = len(sizes), reductions * setup.find_unused_parameters
    num_flags = len(model.trained)
    return replicated(sum(sizes), [num_buckets] * reductions, num_flags, num_maps, setup.world_size)


def ddp_buckets(model: ModelShape, setup: Setup) -> list[int]:
    """Return the bytes of DDP's buckets in the order in which the backward completes them.

    Each bucket takes gradients of one dtype until it has reached `setup.bucket_mb`. That holds for
    the first bucket too: only DDP's default makes that one smaller.
    """
    # With find_unused_parameters DDP never rebuilds its buckets in the order of gradient arrival.
    rebuilt = not setup.find_unused_parameters
    ordered = model.trained[::-1] if rebuilt else model.trained
    cap = int(setup.bucket_mb * 2**20)
    buckets: list[int] = []
    for dtype in dict.fromkeys(p.dtype for p in ordered):
        sizes = [p.nbytes for p in ordered if p.dtype is dtype]
        buckets += [sum(sizes[i] for i in bucket) for bucket in fill_buckets(sizes, cap)]
    return buckets if rebuilt else buckets[::-1]


def control_sends(setup: Setup) -> tuple[Collectives, ...]:
    """Return the small all-reduces by which ranks reach consensus in one step.

    There is a second one if ranks agree separately whether one ran out of memory.
    """
    return (
        (consensus(setup.world_size, num_terms=1, rows=1 + setup.apart),)
        if setup.world_size > 1
        else ()
    )
