"""Simulates the memory of a rank during a window under FSDP2, in the order in which torch uses it.

The order of allocations and frees was read from fully_shard in torch 2.13: from its parameter
groups (unshard, wait_for_unshard, pre_backward, post_backward) and its collectives
(foreach_all_gather, foreach_reduce).
"""

from __future__ import annotations

from dataclasses import dataclass

from distaccum.core.strategies import StrategyName, Sync
from distaccum.core.traffic import GroupSizes
from distaccum.planner.segments import LOSS, Segment
from distaccum.planner.shapes import ROOT, ModelShape, ParameterShape, Setup, group_sizes
from distaccum.planner.timeline import MemoryTimeline, ReplicatedMemory, words


@dataclass(frozen=True)
class _Group:
    """Holds the bytes of one FSDP2 parameter group on rank 0."""

    sent: GroupSizes  # outputs and inputs of its collectives
    cast: int  # its shards in the dtype of the all-gather, where that is not their own dtype
    summed: int  # the unsharded gradients in the dtype of the reduction
    largest: int  # the largest unsharded gradient of one micro-batch
    sharded: int  # the output of the reduce-scatter in the parameters' own dtype
    casts: bool  # whether the parameters' own dtype is not that of the reduction

    @classmethod
    def of(cls, number: int, parameters: tuple[ParameterShape, ...], setup: Setup) -> _Group:
        """Compute the bytes of the group that holds these parameters."""
        shards, trained = setup.shards, [p for p in parameters if p.trained]
        foreign = [p for p in parameters if setup.gathered(p) is not p.dtype]
        return cls(
            sent=group_sizes(number, parameters, setup),
            cast=sum(p.shard(shards) * setup.gathered(p).itemsize for p in foreign),
            summed=sum(p.numel * setup.reduced(p).itemsize for p in trained),
            largest=max((p.numel * setup.gathered(p).itemsize for p in trained), default=0),
            sharded=sum(p.shard(shards) * p.dtype.itemsize for p in trained),
            casts=any(setup.reduced(p) is not p.dtype for p in trained),
        )


class ShardedMemory(ReplicatedMemory):
    """Simulates the memory of rank 0 under FSDP2 and HSDP."""

    def __init__(
        self, model: ModelShape, setup: Setup, timeline: MemoryTimeline, device: str
    ) -> None:
        """Start with the parameter shards only; nothing is gathered yet.

        Args:
            model: the shapes of the model.
            setup: how the model is distributed.
            timeline: where bytes are counted.
            device: the type of the rank's device.
        """
        super().__init__(model, setup, timeline)
        # gloo reduce-scatters by reducing a copy of the whole input.
        self._copies = device == "cpu" and setup.shards > 1
        self._groups = {
            number: _Group.of(number, parameters, setup) for number, parameters in model.groups()
        }
        self._keeps = setup.sync is Sync.gather_once
        self._reduces_each = setup.sync in (Sync.every, Sync.reduce_scatter)
        self._in_place = not self._reduces_each and all(
            setup.gathered(p) is setup.reduced(p) for p in model.trained
        )
        self._arrived: set[int] = set()  # parameters whose gradients are added to in place
        self._runner: list[int] = []  # blocks in the order of this micro-batch's forward

    def begin(self, segment: Segment) -> None:
        """Gather missing parameters, and in a backward also prefetch the block that comes next."""
        group = segment.group
        if group == LOSS:
            if not segment.backward:
                self.timeline.free("arrived")  # the root frees the newest all-gather buffer
            return
        self._gather(segment)
        if segment.backward:
            if group in self._runner:
                del self._runner[self._runner.index(group) :]
            self._prefetch()
        elif group != ROOT:
            self._runner.append(group)

    def arrive(self, number: int) -> int:
        """Record that a parameter's unsharded gradient has arrived, and return its bytes."""
        parameter = self.parameters[number]
        size = parameter.numel * self.setup.gathered(parameter).itemsize
        if number not in self._arrived:
            self.timeline.alloc("fresh", size, parameter.group)
        if self._in_place:
            self._arrived.add(number)
        return size

    def end(self, segment: Segment, *, last: bool) -> None:
        """Free the parameters of a block; after its backward, sum or reduce its gradients."""
        if segment.group >= 0:
            if segment.backward:
                self._post_backward(segment.group, words(segment), last)
            elif self.setup.reshard_after_forward and not self._keeps:
                self.timeline.free("whole", segment.group)

    def end_micro_batch(self, *, last: bool) -> None:
        """Reduce the gradients of the root, which is the last group, and end the micro-batch."""
        self._post_backward(ROOT, "the backward of the layers outside the blocks", last)
        self.timeline.free("message")
        self.timeline.free_all("output")
        self._runner.clear()
        super().end_micro_batch(last=last)

    def _gather(self, segment: Segment) -> None:
        number, timeline = segment.group, self.timeline
        if number not in self._groups or timeline.has("whole", number):
            return
        moment = f"the all-gather for {words(segment)}"
        self._start_gather(number, moment)
        if not segment.backward:
            timeline.free("arrived")
        # Copied out of the all-gather buffer.
        timeline.alloc("whole", self._groups[number].sent.gathered, number)
        timeline.sample(moment)
        buffer = timeline.free("ahead", number)
        if not segment.backward:
            timeline.alloc("arrived", buffer)  # kept until the next buffer has arrived

    def _prefetch(self) -> None:
        """Start to gather the block whose backward comes next."""
        for number in self._runner[-1:]:
            if number in self._groups and not self.timeline.has("whole", number):
                self._start_gather(number, f"the prefetch of block {number}")

    def _start_gather(self, number: int, moment: str) -> None:
        """Allocate the all-gather buffer of a group, unless it exists or nothing is gathered."""
        if self.setup.shards > 1 and not self.timeline.has("ahead", number):
            self.timeline.alloc("ahead", self._groups[number].sent.gathered, number)
            self.timeline.sample(moment, self._groups[number].cast)

    def _post_backward(self, number: int, moment: str, last: bool) -> None:
        timeline, group = self.timeline, self._groups.get(number)
        if group is None:
            return
        if last or not self._keeps:
            timeline.free("whole", number)
        if timeline.has("sum", number):
            timeline.free("fresh", number)  # added to the sum
        if not (last or self._reduces_each):
            fresh = timeline.free("fresh", number)
            if fresh:  # gradients of the first micro-batch, cast one by one if their dtype differs
                timeline.alloc("sum", fresh if self._in_place else group.summed, number)
                timeline.sample(moment, 0 if self._in_place else group.largest)
            return
        timeline.free("message")  # of the previous group
        timeline.alloc("message", group.sent.scattered)
        moment = f"the reduction after {moment}"
        timeline.sample(moment)
        timeline.free("fresh", number)
        timeline.free("sum", number)
        timeline.sample(moment, group.sent.reduced + self._copies * group.sent.scattered)
        if self.setup.sync is Sync.reduce_scatter and not last:
            if not timeline.has("partial", number):
                timeline.alloc("partial", group.sent.reduced, number)
        else:
            self._shard(number, group, moment)

    def _shard(self, number: int, group: _Group, moment: str) -> None:
        """Turn the output of a reduction into the gradient shard, or add it to that shard."""
        timeline, exists = self.timeline, self.timeline.has("gradient", number)
        timeline.alloc("output", group.sent.reduced, number)
        timeline.sample(moment, group.sharded if group.casts else 0)
        timeline.free("partial", number)
        becomes_gradient = not exists and not group.casts
        # HSDP keeps the output until the backward is over.
        if becomes_gradient or self.setup.strategy is not StrategyName.hsdp:
            timeline.free("output", number)
        if not exists:
            timeline.alloc("gradient", group.sharded, number)
