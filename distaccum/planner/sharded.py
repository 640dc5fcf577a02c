"""Simulates the memory of a rank during a window under FSDP2, in the order in which torch uses it.

The order of allocations and frees was read from fully_shard in torch 2.13: from its parameter
groups (unshard, wait_for_unshard, pre_backward, post_backward) and its collectives
(foreach_all_gather, foreach_reduce).
"""

from __future__ import annotations

from dataclasses import dataclass

from distaccum.planner.shapes import ROOT, ModelShape, ParameterShape, Setup
from distaccum.planner.timeline import MemoryTimeline, ReplicatedMemory, words
from distaccum.planner.trace import LOSS, Segment


@dataclass(frozen=True)
class _Group:
    """Holds the bytes of one FSDP2 parameter group on rank 0."""

    gathered: int  # its unsharded parameters, with padding
    cast: int  # its shards in the dtype of the all-gather, where that is not their own dtype
    fresh: int  # the unsharded gradients of one micro-batch
    summed: int  # the unsharded gradients in the dtype of the reduction
    largest: int  # the largest gradient in `fresh`
    message: int  # the input of the reduce-scatter, with padding
    scattered: int  # the output of the reduce-scatter
    sharded: int  # the output of the reduce-scatter in the parameters' own dtype

    @classmethod
    def of(cls, parameters: tuple[ParameterShape, ...], setup: Setup) -> _Group:
        """Compute the bytes of the group that holds these parameters."""
        shards, trained = setup.shards, [p for p in parameters if p.trained]
        fresh = [p.numel * setup.gathered(p).itemsize for p in trained]
        return cls(
            gathered=sum(p.padded(shards) * setup.gathered(p).itemsize for p in parameters),
            cast=sum(
                p.shard(shards) * setup.gathered(p).itemsize for p in parameters if setup.gathered(p) is not p.dtype
            ),
            fresh=sum(fresh),
            summed=sum(p.numel * setup.reduced(p).itemsize for p in trained),
            largest=max(fresh, default=0),
            message=sum(p.padded(shards) * setup.reduced(p).itemsize for p in trained),
            scattered=sum(p.shard(shards) * setup.reduced(p).itemsize for p in trained),
            sharded=sum(p.shard(shards) * p.dtype.itemsize for p in trained),
        )


class ShardedMemory(ReplicatedMemory):
    """Simulates the memory of rank 0 under FSDP2 and HSDP."""

    def __init__(self, model: ModelShape, setup: Setup, timeline: MemoryTimeline, device: str) -> None:
        """Start with the parameter shards only; nothing is gathered yet.

        Args:
            model: the shapes of the model.
            setup: how the model is distributed.
            timeline: where bytes are counted.
            device: the type of the rank's device.
        """
        super().__init__(model, setup, timeline)
        self._copies = (
            device == "cpu" and setup.shards > 1
        )  # gloo reduce-scatters by reducing a copy of the whole input
        self._groups = {number: _Group.of(parameters, setup) for number, parameters in model.groups()}
        self._keeps = setup.sync == "gather_once"
        self._reduces_each = setup.sync in ("every", "reduce_scatter")
        self._in_place = not self._reduces_each and all(setup.gathered(p) is setup.reduced(p) for p in model.trained)
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
        if not segment.backward:
            if group != ROOT:
                self._runner.append(group)
        elif group in self._runner:
            del self._runner[self._runner.index(group) :]
            self._ahead()
        else:
            self._ahead()

    def arrive(self, number: int) -> int:
        """Record that a parameter's unsharded gradient has arrived, and return its bytes."""
        parameter = self.parameters[number]
        size = parameter.numel * self.setup.gathered(parameter).itemsize
        if number not in self._arrived:
            self.timeline.alloc(("sum" if self._in_place else "fresh", parameter.group), size)
        if self._in_place:
            self._arrived.add(number)
        return size

    def end(self, segment: Segment, *, last: bool) -> None:
        """Free the parameters of a block; after its backward, sum or reduce its gradients."""
        if segment.group >= 0:
            if segment.backward:
                self._post_backward(segment.group, words(segment), last)
            elif self.setup.reshard_after_forward and not self._keeps:
                self.timeline.free(("whole", segment.group))

    def end_micro_batch(self, *, last: bool) -> None:
        """Reduce the gradients of the root, which is the last group, and end the micro-batch."""
        if ROOT in self._groups:
            self._post_backward(ROOT, "the backward of the layers outside the blocks", last)
        self.timeline.free("message")
        self.timeline.free_all("output")
        self._runner.clear()
        super().end_micro_batch(last=last)

    def _gather(self, segment: Segment) -> None:
        number, timeline = segment.group, self.timeline
        if number not in self._groups or ("whole", number) in timeline:
            return
        size, moment = self._groups[number].gathered, f"the all-gather for {words(segment)}"
        if self.setup.shards > 1 and ("ahead", number) not in timeline:
            timeline.alloc(("ahead", number), size)
            timeline.sample(moment, self._groups[number].cast)
        if not segment.backward:
            timeline.free("arrived")
        timeline.alloc(("whole", number), size)  # copied out of the all-gather buffer
        timeline.sample(moment)
        if segment.backward:
            timeline.free(("ahead", number))
        elif self.setup.shards > 1:
            timeline.rename(("ahead", number), "arrived")  # kept until the next buffer has arrived

    def _ahead(self) -> None:
        """Prefetch the block whose backward comes next."""
        number = self._runner[-1] if self._runner else None
        if number in self._groups and ("whole", number) not in self.timeline and self.setup.shards > 1:
            assert number is not None
            if ("ahead", number) not in self.timeline:
                self.timeline.alloc(("ahead", number), self._groups[number].gathered)
                self.timeline.sample(f"the prefetch of block {number}", self._groups[number].cast)

    def _post_backward(self, number: int, moment: str, last: bool) -> None:
        timeline, group = self.timeline, self._groups.get(number)
        if group is None:
            return
        if last or not self._keeps:
            timeline.free(("whole", number))
        if ("sum", number) in timeline:
            timeline.free(("fresh", number))  # added to the sum
        if not (last or self._reduces_each):
            if ("fresh", number) in timeline:  # gradients of the first micro-batch, cast one by one
                timeline.free(("fresh", number))
                timeline.alloc(("sum", number), group.summed)
                timeline.sample(moment, group.largest)
            return
        timeline.free("message")  # of the previous group
        timeline.alloc("message", group.message)
        moment = f"the reduction after {moment}"
        timeline.sample(moment)
        timeline.free(("fresh", number))
        timeline.free(("sum", number))
        timeline.sample(moment, group.scattered + self._copies * group.message)
        if self.setup.sync == "reduce_scatter" and not last:
            if ("partial", number) not in timeline:
                timeline.alloc(("partial", number), group.scattered)
            return
        self._shard(number, group, moment)

    def _shard(self, number: int, group: _Group, moment: str) -> None:
        """Turn the output of a reduction into the gradient shard, or add it to that shard."""
        timeline, name = self.timeline, ("gradient", number)
        cast = any(self.setup.reduced(p) is not p.dtype for p in self.trained if p.group == number)
        exists = name in timeline
        timeline.alloc(("output", number), group.scattered)
        timeline.sample(moment, group.sharded if cast else 0)
        timeline.free(("partial", number))
        if cast and not exists:
            timeline.alloc(name, group.sharded)
        if self.setup.strategy != "hsdp":  # HSDP keeps the output until the backward is over
            timeline.free(("output", number))
        if not cast and not exists:
            timeline.free(("output", number))
            timeline.alloc(name, group.scattered)
