"""Simulates the memory of a rank during a window, and records its peak.

This module covers ranks that hold whole parameters; FSDP2 is in sharded.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from distaccum.planner.shapes import ROOT, ModelShape, Setup
from distaccum.planner.trace import LOSS, Segment

Name = str | tuple[str, int]


@dataclass(frozen=True)
class Peak:
    """Describes the peak memory of a window, and when it occurs."""

    total: int  # bytes
    moment: str  # when it occurs, in words


class MemoryTimeline:
    """Counts the bytes that are alive, by name, and records their peak."""

    def __init__(self) -> None:
        """Start with no bytes."""
        self.peak = Peak(0, "nothing")
        self._held: dict[Name, int] = {}
        self._total = 0

    def __contains__(self, name: Name) -> bool:
        return name in self._held

    def alloc(self, name: Name, num_bytes: int) -> None:
        """Add bytes to those alive under a name."""
        self._held[name] = self._held.get(name, 0) + num_bytes
        self._total += num_bytes

    def free(self, name: Name) -> int:
        """Free all bytes under a name, and return how many they were."""
        num_bytes = self._held.pop(name, 0)
        self._total -= num_bytes
        return num_bytes

    def free_all(self, kind: str) -> None:
        """Free all bytes whose name is a pair that begins with `kind`."""
        for name in [name for name in self._held if name[0] == kind]:
            self.free(name)

    def rename(self, name: Name, to: Name) -> None:
        """Move all bytes under a name to another name."""
        self.alloc(to, self.free(name))

    def sample(self, moment: str, more: int = 0) -> None:
        """Update the peak with the bytes that are alive now.

        Args:
            moment: when this is, in words.
            more: further bytes that are alive at this moment only.
        """
        if self._total + more > self.peak.total:
            self.peak = Peak(self._total + more, moment)


class ReplicatedMemory:
    """Simulates the memory of a rank that holds all parameters: one process, or DDP."""

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
        self._sum_bytes = sum(p.shard(setup.shards) * setup.accumulated(p).itemsize for p in model.trained)
        self._gradient_bytes = sum(p.shard(setup.shards) * p.dtype.itemsize for p in model.trained)

    def begin(self, segment: Segment) -> None:
        """Record that a segment of a micro-batch begins."""

    def arrive(self, number: int) -> int:
        """Record that a parameter's gradient of this micro-batch is complete, and return its bytes.

        The gradient is kept if it is the first one, and is added to the existing gradient
        otherwise.

        Args:
            number: the parameter's position in `model.parameters()`.
        """
        size = self.parameters[number].numel * self.parameters[number].dtype.itemsize
        if ("gradient", number) not in self.timeline:
            self.timeline.alloc(("gradient", number), size)
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
            self.timeline.alloc("fresh sums", self._sum_bytes)
            self.timeline.sample("the accumulation of a micro-batch")
            self.timeline.free_all("gradient")
            if self.setup.sync == "every":
                self._messages()
            if "sums" in self.timeline:
                self.timeline.free("fresh sums")
            else:
                self.timeline.rename("fresh sums", "sums")

    def deliver(self) -> None:
        """Turn distaccum's own sums into gradients at the end of the window.

        Unless the policy is `every`, the sums are reduced over ranks first.
        """
        if self._own_sums:
            if self.setup.sync != "every":
                self._messages()
                reduced = self._sum_bytes if self.setup.strategy == "ddp" else 0
            else:
                reduced = 0
            self.timeline.alloc(("gradient", ROOT), self._gradient_bytes)
            self.timeline.sample("the reduction", reduced)
            self.timeline.free("sums")

    def _messages(self) -> None:
        """Sample the reduction of distaccum's own sums, whose messages are all in flight together.

        A message whose dtype is not that of its sum is copied before and after the reduction.
        """
        if self.setup.strategy == "ddp":
            other = [p for p in self.trained if self.setup.reduced(p) is not self.setup.accumulated(p)]
            sent = sum(p.numel * self.setup.reduced(p).itemsize for p in [*self.trained, *other])
            self.timeline.sample(
                "the reduction", sent + sum(p.numel * self.setup.accumulated(p).itemsize for p in other)
            )


def words(segment: Segment) -> str:
    """Describe a segment in words, for messages."""
    where = {LOSS: "the loss", ROOT: "the layers outside the blocks"}.get(segment.group, f"block {segment.group}")
    return f"the {'backward' if segment.backward else 'forward'} of {where}"
