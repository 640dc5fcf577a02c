"""Predicts the peak memory of a rank by simulating a window of traced micro-batches.

Nothing runs; a window takes about a millisecond. Only the first, the second and the last
micro-batch are simulated, since all others are like the second. Memory that libraries and kernels
allocate internally is not included.
"""

from __future__ import annotations

from distaccum.core.strategies import StrategyName
from distaccum.planner.segments import MicroBatchTrace, Segment, Update
from distaccum.planner.shapes import ModelShape, Setup
from distaccum.planner.sharded import ShardedMemory
from distaccum.planner.timeline import MemoryTimeline, Peak, ReplicatedMemory, words

MICRO_BATCHES_AT_HAND = 2  # the one being computed and the one that is prefetched


def peak(
    model: ModelShape,
    setup: Setup,
    update: Update,
    micro_batch: MicroBatchTrace,
    num_micro_batches: int,
    overlap_micro_batches: int = 1,
    device: str = "cpu",
) -> Peak:
    """Compute the peak of rank 0, which holds the most, in any window after the first.

    Args:
        model: the shapes of the model, from `describe`.
        setup: how the model is distributed.
        update: the optimizer's memory for rank 0's shards of the parameters.
        micro_batch: the trace of one micro-batch of the size in question. Under FSDP2 it was traced
            with parameters in the dtype in which they are gathered.
        num_micro_batches: micro-batches per rank in a window.
        overlap_micro_batches: how many of the last micro-batches are computed block by block; 1
            means none.
        device: the type of this rank's device.
    """
    timeline = MemoryTimeline()
    shards = sum(p.shard(setup.shards) * p.dtype.itemsize for p in model.parameters)
    timeline.alloc("weights", shards + model.buffer_bytes)
    timeline.alloc("optimizer", update.kept)
    timeline.alloc("micro-batches", MICRO_BATCHES_AT_HAND * micro_batch.micro_batch_bytes)
    if setup.strategy is StrategyName.ddp:
        timeline.alloc("buckets", sum(p.nbytes for p in model.trained))
    rank = (
        ShardedMemory(model, setup, timeline, device)
        if setup.sharded
        else ReplicatedMemory(model, setup, timeline)
    )
    tail = min(overlap_micro_batches, num_micro_batches) if overlap_micro_batches > 1 else 0
    plain = num_micro_batches - tail
    for number in sorted({0, 1, plain - 1} & set(range(plain))):
        last = number == num_micro_batches - 1
        for segment, ends in zip(micro_batch.segments, micro_batch.ends, strict=True):
            _run(rank, segment, ends, last=last)
        rank.end_micro_batch(last=last)
    if tail:
        _tail(rank, micro_batch, tail)
    rank.deliver()
    if device == "cpu":  # the norm squares one gradient after another, after widening a narrow one
        sizes = [(p.shard(setup.shards), p.dtype.itemsize) for p in model.trained]
        squares = max(
            (numel * (8 if itemsize < 4 else itemsize) for numel, itemsize in sizes), default=0
        )
        timeline.sample("the gradient norm", squares)
    timeline.sample("the update", update.transient)
    parts = {**timeline.parts, "activations": micro_batch.saved}
    return Peak(timeline.peak, timeline.moment, parts)


def _run(
    rank: ReplicatedMemory,
    segment: Segment,
    ends: int,
    *,
    last: bool,
    others: int = 0,
    manual: bool = False,
) -> None:
    """Simulate one segment of a micro-batch.

    Args:
        rank: the memory model of the rank, which is updated.
        segment: the segment to simulate.
        ends: bytes of this micro-batch that are alive at the end of the segment.
        last: whether this is the last micro-batch of the window.
        others: bytes of other micro-batches that are not finished.
        manual: whether gradients are returned by autograd, all of the segment at once, and added to
            `.grad` afterwards.
    """
    timeline, found, where = rank.timeline, 0, words(segment)
    timeline.alloc("micro-batch", others + segment.begins)
    rank.begin(segment)
    timeline.free("micro-batch")
    for number, most in enumerate(segment.peaks):
        timeline.sample(where, others + most + found)
        if number < len(segment.arrivals):
            size = rank.arrive(segment.arrivals[number])
            found += size if manual else 0
    timeline.alloc("micro-batch", others + ends)
    timeline.sample(where, found)
    rank.end(segment, last=last)
    timeline.free("micro-batch")


def _tail(rank: ReplicatedMemory, micro_batch: MicroBatchTrace, num_micro_batches: int) -> None:
    """Simulate the last micro-batches of a window, whose backwards run together block by block.

    First come the forward and the head's backward of each micro-batch. Then follow, for each block,
    the backwards of all of them.
    """
    segments = [*zip(micro_batch.segments, micro_batch.ends, strict=True)]
    cut = next(
        (i for i, (s, _) in enumerate(segments) if s.backward and s.group >= 0), len(segments)
    )
    manual = rank.setup.strategy is StrategyName.ddp
    for number in range(num_micro_batches):
        last = number == num_micro_batches - 1
        for segment, ends in segments[:cut]:
            others = number * micro_batch.to_head
            _run(rank, segment, ends, last=last, others=others, manual=manual and not last)
    for segment, ends in segments[cut:]:
        for number in range(num_micro_batches):
            last = number == num_micro_batches - 1
            others = (
                num_micro_batches - 1
            ) * segment.begins + num_micro_batches * micro_batch.handed_on
            _run(rank, segment, ends, last=last, others=others, manual=manual and not last)
    rank.end_micro_batch(last=True)
