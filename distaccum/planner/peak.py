"""The most that a rank's tensors take at once: a window walked through on a traced micro and on shapes.

Nothing runs; a window takes about a millisecond. Of many micros only the first, one more and the last are walked
through, since the others are like the second. What libraries and kernels take within themselves comes on top.
"""

from __future__ import annotations

from distaccum.planner.holdings import Holdings, Peak, Whole, words
from distaccum.planner.memory import weight_bytes
from distaccum.planner.shapes import ModelShape, Setup
from distaccum.planner.sharded import Sharded
from distaccum.planner.trace import MicroTrace, Segment
from distaccum.planner.update import Update

MICROS_AT_HAND = 2  # the one at work, and the one that is read ahead


def peak(
    model: ModelShape,
    setup: Setup,
    update: Update,
    micro: MicroTrace,
    num_micros: int,
    overlap_micros: int = 1,
    device: str = "cpu",
) -> Peak:
    """The peak of rank 0, which holds most, in any window after the first.

    Args:
        model: from `describe`.
        setup: how it is spread.
        update: of what this rank's shards of the parameters are.
        micro: the traced micro, of the size in question; under FSDP2 with parameters as they are gathered.
        num_micros: per rank in a window.
        overlap_micros: how many of them, the last ones, are computed block by block.
        device: the type of this rank's device.
    """
    holdings = Holdings()
    holdings.take("weights", weight_bytes(model, setup))
    holdings.take("optimizer", update.kept)
    holdings.take("micros", MICROS_AT_HAND * micro.micro_bytes)
    if setup.strategy == "ddp":
        holdings.take("buckets", sum(p.numel * p.dtype.itemsize for p in model.trained))
    rank = Sharded(model, setup, holdings, device) if setup.sharded else Whole(model, setup, holdings)
    tail = min(overlap_micros, num_micros) if overlap_micros > 1 else 0
    plain = num_micros - tail
    for number in sorted({0, 1, plain - 1} & set(range(plain))):
        last = number == num_micros - 1
        for segment, ends in zip(micro.segments, micro.ends, strict=True):
            _run(rank, segment, ends, last=last)
        rank.end_micro(last=last)
    if tail:
        _tail(rank, micro, tail)
    rank.deliver()
    if device == "cpu":  # squares, of wider copies of narrow gradients, one gradient after the other
        sizes = [(p.shard(setup.shards), p.dtype.itemsize) for p in model.trained]
        squares = max((numel * (8 if itemsize < 4 else itemsize) for numel, itemsize in sizes), default=0)
        holdings.at("the norm of the gradients", squares)
    holdings.at("the update", update.transient)
    return holdings.peak


def _run(rank: Whole, segment: Segment, ends: int, *, last: bool, others: int = 0, by_hand: bool = False) -> None:
    """Walk through a part of a micro.

    Args:
        rank: what it holds.
        segment: the part.
        ends: bytes of this micro that are alive when it is over.
        last: whether its gradients are the window's last ones.
        others: bytes of other micros that are not done.
        by_hand: whether gradients are taken out of autograd, all of the part at once, and added afterwards.
    """
    holdings, found, where = rank.holdings, 0, words(segment)
    holdings.take("micro", others + segment.begins)
    rank.begin(segment)
    holdings.give("micro")
    for number, most in enumerate(segment.peaks):
        holdings.at(where, others + most + found)
        if number < len(segment.arrivals):
            size = rank.arrive(segment.arrivals[number])
            found += size if by_hand else 0
    holdings.take("micro", others + ends)
    holdings.at(where, found)
    rank.end(segment, last=last)
    holdings.give("micro")


def _tail(rank: Whole, micro: MicroTrace, num_micros: int) -> None:
    """So many forwards with their heads' backwards, then block by block the backwards of all of them."""
    segments = [*zip(micro.segments, micro.ends, strict=True)]
    cut = next((i for i, (s, _) in enumerate(segments) if s.backward and s.group >= 0), len(segments))
    by_hand = rank.setup.strategy == "ddp"
    for number in range(num_micros):
        last = number == num_micros - 1
        for segment, ends in segments[:cut]:
            others = number * micro.to_head
            _run(rank, segment, ends, last=last, others=others, by_hand=by_hand and not last)
    for segment, ends in segments[cut:]:
        for number in range(num_micros):
            last = number == num_micros - 1
            others = (num_micros - 1) * segment.begins + num_micros * micro.handed_on
            _run(rank, segment, ends, last=last, others=others, by_hand=by_hand and not last)
    rank.end_micro(last=True)
