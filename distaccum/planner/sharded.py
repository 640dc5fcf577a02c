"""What a rank holds along a window under FSDP2, in the order in which torch takes and frees it.

Read in torch 2.13, fully_shard: its files of groups (unshard, wait_for_unshard,
pre_backward, post_backward) and of collectives (foreach_all_gather, foreach_reduce).
"""

from __future__ import annotations

from dataclasses import dataclass

from distaccum.planner.holdings import Holdings, Whole, words
from distaccum.planner.shapes import ROOT, ModelShape, ParameterShape, Setup
from distaccum.planner.trace import LOSS, Segment


@dataclass(frozen=True)
class _Group:
    """The bytes of one of FSDP2's groups."""

    gathered: int  # its parameters, whole, padded
    cast: int  # the shards in the dtype in which they are gathered, where that is another one
    fresh: int  # the gradients of one micro
    summed: int  # in the dtype in which they are reduced
    largest: int  # the largest of the former
    message: int  # what is scattered, padded
    scattered: int  # what comes back
    sharded: int  # that in the parameters' own dtype

    @classmethod
    def of(cls, parameters: tuple[ParameterShape, ...], setup: Setup) -> _Group:
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


class Sharded(Whole):
    """FSDP2 and HSDP."""

    def __init__(self, model: ModelShape, setup: Setup, holdings: Holdings, device: str) -> None:
        """Hold nothing but shards yet."""
        super().__init__(model, setup, holdings)
        self._copies = device == "cpu" and setup.shards > 1  # gloo scatters by reducing a copy of all
        self._groups = {number: _Group.of(parameters, setup) for number, parameters in model.groups()}
        self._keeps = setup.sync == "keep"
        self._reduces_each = setup.sync in ("every", "shard")
        self._in_place = not self._reduces_each and all(setup.gathered(p) is setup.reduced(p) for p in model.trained)
        self._arrived: set[int] = set()  # parameters whose gradients are added to in place
        self._forwards: list[int] = []  # blocks in the order in which this micro went through them

    def begin(self, segment: Segment) -> None:
        """Gather what is not there, and in a backward the block before it, ahead of time."""
        group = segment.group
        if group == LOSS:
            if not segment.backward:
                self.holdings.give("arrived")  # the root lets go of the newest message
            return
        self._gather(segment)
        if not segment.backward:
            if group != ROOT:
                self._forwards.append(group)
        elif group in self._forwards:
            del self._forwards[self._forwards.index(group) :]
            self._ahead()
        else:
            self._ahead()

    def arrive(self, number: int) -> int:
        """Gradients are whole until they are reduced."""
        parameter = self.parameters[number]
        size = parameter.numel * self.setup.gathered(parameter).itemsize
        if number not in self._arrived:
            self.holdings.take(("sum" if self._in_place else "fresh", parameter.group), size)
        if self._in_place:
            self._arrived.add(number)
        return size

    def end(self, segment: Segment, *, last: bool) -> None:
        """A block gives up its parameters; after its backward, its gradients are summed or reduced."""
        if segment.group >= 0:
            if segment.backward:
                self._post_backward(segment.group, words(segment), last)
            elif self.setup.reshard_after_forward and not self._keeps:
                self.holdings.give(("whole", segment.group))

    def end_micro(self, *, last: bool) -> None:
        """The root is the last to reduce."""
        if ROOT in self._groups:
            self._post_backward(ROOT, "the backward of what is outside of the blocks", last)
        self.holdings.give("message")
        self.holdings.give_all("output")
        self._forwards.clear()
        super().end_micro(last=last)

    def _gather(self, segment: Segment) -> None:
        number, holdings = segment.group, self.holdings
        if number not in self._groups or ("whole", number) in holdings:
            return
        size, moment = self._groups[number].gathered, f"gathering for {words(segment)}"
        if self.setup.shards > 1 and ("ahead", number) not in holdings:
            holdings.take(("ahead", number), size)
            holdings.at(moment, self._groups[number].cast)
        if not segment.backward:
            holdings.give("arrived")
        holdings.take(("whole", number), size)  # copied out of the message
        holdings.at(moment)
        if segment.backward:
            holdings.give(("ahead", number))
        elif self.setup.shards > 1:
            holdings.move(("ahead", number), "arrived")  # kept until the next one has arrived

    def _ahead(self) -> None:
        """Ask for the block whose backward comes next."""
        number = self._forwards[-1] if self._forwards else None
        if number in self._groups and ("whole", number) not in self.holdings and self.setup.shards > 1:
            assert number is not None
            if ("ahead", number) not in self.holdings:
                self.holdings.take(("ahead", number), self._groups[number].gathered)
                self.holdings.at(f"gathering block {number} ahead", self._groups[number].cast)

    def _post_backward(self, number: int, moment: str, last: bool) -> None:
        holdings, group = self.holdings, self._groups.get(number)
        if group is None:
            return
        if last or not self._keeps:
            holdings.give(("whole", number))
        if ("sum", number) in holdings:
            holdings.give(("fresh", number))  # added
        if not (last or self._reduces_each):
            if ("fresh", number) in holdings:  # the first micro's, one after the other, in another dtype
                holdings.give(("fresh", number))
                holdings.take(("sum", number), group.summed)
                holdings.at(moment, group.largest)
            return
        holdings.give("message")  # of the group before it
        holdings.take("message", group.message)
        moment = f"the reduction after {moment}"
        holdings.at(moment)
        holdings.give(("fresh", number))
        holdings.give(("sum", number))
        holdings.at(moment, group.scattered + self._copies * group.message)
        if self.setup.sync == "shard" and not last:
            if ("partial", number) not in holdings:
                holdings.take(("partial", number), group.scattered)
            return
        self._shard(number, group, moment)

    def _shard(self, number: int, group: _Group, moment: str) -> None:
        """What came back becomes the gradient's shard, or is added to it."""
        holdings, name = self.holdings, ("gradient", number)
        cast = any(self.setup.reduced(p) is not p.dtype for p in self.trained if p.group == number)
        exists = name in holdings
        holdings.take(("output", number), group.scattered)
        holdings.at(moment, group.sharded if cast else 0)
        holdings.give(("partial", number))
        if cast and not exists:
            holdings.take(name, group.sharded)
        if self.setup.strategy != "hsdp":  # which keeps it until the backward is over
            holdings.give(("output", number))
        if not cast and not exists:
            holdings.give(("output", number))
            holdings.take(name, group.scattered)
