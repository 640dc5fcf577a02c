"""Simulates the memory of a rank during a window, and records its peak.

This module covers ranks that hold whole parameters; FSDP2 is in sharded.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from distaccum.core.strategies import StrategyName, Sync
from distaccum.planner.segments import LOSS, Segment
from distaccum.planner.shapes import ROOT, ModelShape, Setup

# The part of the memory that each kind of bytes belongs to; other kinds belong to none.
PART_OF = {
    "weights": "weights",  # parameters (shards with their padding) and buffers
    "gradient": "gradients",  # as the optimizer receives them
    # Sums that are kept from one micro-batch to the next, in addition to gradients.
    "own sum": "accumulation",
    "sum": "accumulation",
    "partial": "accumulation",
    "optimizer": "optimizer",  # its state after the first update
    # FSDP2: whole parameters, and the all-gather buffers that they are copied out of.
    "whole": "gathered",
    "ahead": "gathered",
    "buckets": "buckets",  # DDP's own copy of the gradients
    "message": "messages",  # buffers that gradients are copied into during a reduction
}


@dataclass(frozen=True)
class Peak:
    """Describes the peak memory of a window, when it occurs, and what takes memory."""

    total: int  # bytes
    moment: str  # when it occurs, in words
    # The most bytes of each part at any time of the window; they are not all alive at the peak.
    parts: Mapping[str, int] = field(default_factory=dict, compare=False)


class MemoryTimeline:
    """Counts the bytes that are alive, by kind and number, and records their peak."""

    def __init__(self) -> None:
        """Start with no bytes."""
        self.total = 0  # bytes that are alive now
        self.peak, self.moment = 0, "nothing"
        self.parts = dict.fromkeys(PART_OF.values(), 0)  # the most bytes of each part so far
        self._alive = Counter[str]()  # bytes that are alive now, by part
        self._held: dict[tuple[str, int], int] = {}

    def has(self, kind: str, number: int = 0) -> bool:
        """Return whether bytes of this kind and number are alive."""
        return (kind, number) in self._held

    def alloc(self, kind: str, num_bytes: int, number: int = 0) -> None:
        """Add bytes to those of this kind and number."""
        self._held[kind, number] = self._held.get((kind, number), 0) + num_bytes
        self._change(kind, num_bytes)

    def free(self, kind: str, number: int = 0) -> int:
        """Free all bytes of this kind and number, and return how many they were."""
        num_bytes = self._held.pop((kind, number), 0)
        self._change(kind, -num_bytes)
        return num_bytes

    def free_all(self, kind: str) -> None:
        """Free all bytes of this kind."""
        for name in [name for name in self._held if name[0] == kind]:
            self.free(*name)

    def sample(self, moment: str, more: int = 0) -> None:
        """Update the peak with the bytes that are alive now.

        Args:
            moment: when this is, in words.
            more: further bytes that are alive at this moment only.
        """
        if self.total + more > self.peak:
            self.peak, self.moment = self.total + more, moment

    def _change(self, kind: str, num_bytes: int) -> None:
        self.total += num_bytes
        part = PART_OF.get(kind)
        if part is not None:
            self._alive[part] += num_bytes
            self.parts[part] = max(self.parts[part], self._alive[part])


class ReplicatedMemory:
    """Simulates the memory of a rank that holds whole parameters: single and DDP."""

    def __init__(self, model: ModelShape, setup: Setup, timeline: MemoryTimeline) -> None:
        """Start without gradients.

        Args:
            model: the shapes of the model.
            setup: how the model is distributed.
            timeline: where bytes are counted.
        """
        self.setup = setup
        self.timeline = timeline
        self.parameters = model.parameters
        self.trained = model.trained
        self._own_sums = setup.own_sums(model)
        self._sum_bytes = sum(
            p.shard(setup.shards) * setup.accumulated(p).itemsize for p in model.trained
        )

    def begin(self, segment: Segment) -> None:
        """Record that a segment of a micro-batch begins."""

    def arrive(self, number: int) -> int:
        """Record that a parameter's gradient of this micro-batch is complete, and return its bytes.

        The gradient is kept if it is the first one, and is added to the existing gradient
        otherwise.

        Args:
            number: the parameter's position in `model.parameters()`.
        """
        size = self.parameters[number].nbytes
        if not self.timeline.has("gradient", number):
            self.timeline.alloc("gradient", size, number)
        return size

    def end(self, segment: Segment, *, last: bool) -> None:
        """Record that a segment of a micro-batch has ended.

        Args:
            segment: the segment.
            last: whether it belongs to the window's last micro-batch.
        """

    def end_micro_batch(self, *, last: bool) -> None:
        """Record that the backward of a micro-batch is over.

        If distaccum keeps its own sums, the gradients are added to them. Under `every` they are
        reduced first.

        Args:
            last: whether it is the window's last micro-batch.
        """
        if self._own_sums:
            self.timeline.alloc("fresh", self._sum_bytes)
            self.timeline.sample("the accumulation of a micro-batch")
            self.timeline.free_all("gradient")
            if self.setup.sync is Sync.every:
                self._reduce()
            self.timeline.free("fresh")
            if not self.timeline.has("own sum"):
                self.timeline.alloc("own sum", self._sum_bytes)

    def deliver(self) -> None:
        """Turn distaccum's own sums into gradients at the end of the window.

        Unless the policy is `every`, the sums are reduced over ranks first.
        """
        if self._own_sums:
            reduced = 0
            if self.setup.sync is not Sync.every:
                self._reduce()
                reduced = self._sum_bytes if self.setup.strategy is StrategyName.ddp else 0
            gradients = sum(p.shard(self.setup.shards) * p.dtype.itemsize for p in self.trained)
            self.timeline.alloc("gradient", gradients, ROOT)
            self.timeline.sample("the reduction", reduced)
            self.timeline.free("own sum")

    def _reduce(self) -> None:
        """Reduce distaccum's own sums under DDP, whose messages are all in flight together.

        A message whose dtype is not that of its sum is copied before and after the reduction.
        """
        if self.setup.strategy is StrategyName.ddp:
            other = [
                p for p in self.trained if self.setup.reduced(p) is not self.setup.accumulated(p)
            ]
            sent = sum(p.numel * self.setup.reduced(p).itemsize for p in [*self.trained, *other])
            self.timeline.alloc("message", sent)
            self.timeline.sample(
                "the reduction", sum(p.numel * self.setup.accumulated(p).itemsize for p in other)
            )
            self.timeline.free("message")


def words(segment: Segment) -> str:
    """Describe a segment in words, for messages."""
    where = {LOSS: "the loss", ROOT: "the layers outside the blocks"}.get(
        segment.group, f"block {segment.group}"
    )
    return f"the {'backward' if segment.backward else 'forward'} of {where}"
