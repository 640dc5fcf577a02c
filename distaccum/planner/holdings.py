"""What a rank holds along a window, and the most of it. Whole parameters here, FSDP2's in sharded.py."""

from __future__ import annotations

from dataclasses import dataclass

from distaccum.planner.shapes import ROOT, ModelShape, Setup
from distaccum.planner.trace import LOSS, Segment

Name = str | tuple[str, int]


@dataclass(frozen=True)
class Peak:
    """The most that is alive at once, and where."""

    total: int  # bytes
    moment: str


class Holdings:
    """Bytes that are alive, by name, and the most there was."""

    def __init__(self) -> None:
        """Nothing yet."""
        self.peak = Peak(0, "nothing")
        self._held: dict[Name, int] = {}
        self._total = 0

    def __contains__(self, name: Name) -> bool:
        return name in self._held

    def take(self, name: Name, num_bytes: int) -> None:
        """More of it."""
        self._held[name] = self._held.get(name, 0) + num_bytes
        self._total += num_bytes

    def give(self, name: Name) -> int:
        """All of it is freed: how much it was."""
        num_bytes = self._held.pop(name, 0)
        self._total -= num_bytes
        return num_bytes

    def give_all(self, kind: str) -> None:
        """All that is named so, with whatever number."""
        for name in [name for name in self._held if name[0] == kind]:
            self.give(name)

    def move(self, name: Name, to: Name) -> None:
        """It goes on under another name."""
        self.take(to, self.give(name))

    def at(self, moment: str, more: int = 0) -> None:
        """Look at what is alive, and so much more that is gone again afterwards."""
        if self._total + more > self.peak.total:
            self.peak = Peak(self._total + more, moment)


class Whole:
    """Each rank has all parameters: one process, or DDP."""

    def __init__(self, model: ModelShape, setup: Setup, holdings: Holdings) -> None:
        """Hold no gradients yet."""
        self.setup = setup
        self.holdings = holdings
        self.parameters = model.parameters
        self.trained = model.trained
        self._own_sums = setup.own_sums(model)
        self._sum_bytes = sum(p.shard(setup.shards) * setup.accumulated(p).itemsize for p in model.trained)
        self._gradient_bytes = sum(p.shard(setup.shards) * p.dtype.itemsize for p in model.trained)

    def begin(self, segment: Segment) -> None:
        """A part of a micro is about to run."""

    def arrive(self, number: int) -> int:
        """A parameter's gradient in this micro is complete: it stays, or is added to what is there. Its bytes."""
        size = self.parameters[number].numel * self.parameters[number].dtype.itemsize
        if ("gradient", number) not in self.holdings:
            self.holdings.take(("gradient", number), size)
        return size

    def end(self, segment: Segment, *, last: bool) -> None:
        """A part of a micro has run."""

    def end_micro(self, *, last: bool) -> None:
        """Its backward is over. Where distaccum sums, gradients become sums, reduced first if each micro's are."""
        if self._own_sums:
            self.holdings.take("fresh sums", self._sum_bytes)
            self.holdings.at("the sums of a micro")
            self.holdings.give_all("gradient")
            if self.setup.sync == "every":
                self._messages()
            if "sums" in self.holdings:
                self.holdings.give("fresh sums")
            else:
                self.holdings.move("fresh sums", "sums")

    def deliver(self) -> None:
        """Sums become gradients; before, they are reduced if that is the window's."""
        if self._own_sums:
            if self.setup.sync != "every":
                self._messages()
                reduced = self._sum_bytes if self.setup.strategy == "ddp" else 0
            else:
                reduced = 0
            self.holdings.take(("gradient", ROOT), self._gradient_bytes)
            self.holdings.at("the reduction", reduced)
            self.holdings.give("sums")

    def _messages(self) -> None:
        """All are under way together; where their dtype is not that of the sums, they are copied before and after."""
        if self.setup.strategy == "ddp":
            other = [p for p in self.trained if self.setup.reduced(p) is not self.setup.accumulated(p)]
            sent = sum(p.numel * self.setup.reduced(p).itemsize for p in [*self.trained, *other])
            self.holdings.at("the reduction", sent + sum(p.numel * self.setup.accumulated(p).itemsize for p in other))


def words(segment: Segment) -> str:
    """Where that is."""
    where = {LOSS: "the loss", ROOT: "what is outside of the blocks"}.get(segment.group, f"block {segment.group}")
    return f"the {'backward' if segment.backward else 'forward'} of {where}"
