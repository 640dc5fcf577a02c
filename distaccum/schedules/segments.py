"""A forward whose graph is cut at the model's blocks, so that the backward of each block can be run on its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from distaccum.errors import ConfigError


@dataclass(frozen=True)
class Segment:
    """What one micro computed between two cuts, with its graph."""

    block: (
        int  # of the block that it begins with, the first one with all that comes before it; behind the last: the head
    )
    ends: Tensor  # what it hands on; the loss [] at the end of the last one
    begins: Tensor | None  # a leaf with the numbers that it was handed; its gradient is that of the `ends` before it
    parameters: list[Tensor]  # the leaves that its graph reaches
    shared: list[Tensor]  # those of them that an earlier segment of this micro reaches too, such as a tied embedding


class Cuts:
    """Cuts forwards in front of every block but the first, and behind the last one. Values stay as they are."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        """Serve a model whose blocks are called once each, in this order, each with what the one before returned."""
        self._blocks = blocks
        self._made: list[tuple[int, Tensor, Tensor]] = []

    @contextmanager
    def made(self) -> Iterator[None]:
        """Enter around forwards. Nothing stays on the model."""
        # In front of what FSDP2 does at a block, so that its hooks see the backward of the block as a whole.
        hooks = [
            block.register_forward_pre_hook(partial(self._before, index), prepend=True, with_kwargs=True)
            for index, block in enumerate(self._blocks)
            if index > 0
        ]
        hooks.append(self._blocks[-1].register_forward_hook(self._behind))
        try:
            yield
        finally:
            self._made = []
            for hook in hooks:
                hook.remove()

    def segments(self, loss: Tensor) -> list[Segment]:
        """The forward since the last call in parts, in the order in which they were computed.

        Raises:
            ConfigError: for a model whose blocks are no chain.
        """
        made, self._made = self._made, []
        starts = [None, *(begins for _, _, begins in made)]
        leaves = [leaves_of(ends) for ends in [*(ends for _, ends, _ in made), loss]]
        cut = {id(begins) for _, _, begins in made}
        seen: dict[int, int] = {}
        parts = []
        for number, (reached, begins) in enumerate(zip(leaves, starts, strict=True)):
            if any(id(leaf) in cut and leaf is not begins for leaf in reached):
                raise refused("what an earlier block computed is used behind the next one too")
            parameters = [leaf for leaf in reached if leaf is not begins]
            shared = [leaf for leaf in parameters if id(leaf) in seen]
            if shared and number < len(made):
                raise refused(f"blocks {seen[id(shared[0])]} and {number} share a parameter")
            seen |= {id(leaf): number for leaf in parameters}
            ends = loss if number == len(made) else made[number][1]
            parts.append(Segment(0 if begins is None else made[number - 1][0], ends, begins, parameters, shared))
        return parts

    def _before(self, index: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        places = dict(enumerate(args)) | kwargs
        changed = self._cut(index, places)
        if changed is None:
            return None
        return tuple(changed[i] for i in range(len(args))), {name: changed[name] for name in kwargs}

    def _behind(self, block: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            changed = self._cut(len(self._blocks), {0: output})
            return None if changed is None else changed[0]
        if isinstance(output, tuple) and not hasattr(output, "_fields"):
            changed = self._cut(len(self._blocks), dict(enumerate(output)))
            return None if changed is None else tuple(changed.values())
        return None

    def _cut(self, index: int, places: Mapping[Any, Any]) -> dict[Any, Any] | None:
        """The same with a leaf in place of the one tensor that has a graph; None where nothing is to be cut."""
        if not torch.is_grad_enabled():
            return None
        found = [place for place, value in places.items() if isinstance(value, Tensor) and value.requires_grad]
        if len(found) > 1:
            raise refused(f"{len(found)} tensors with gradients go into or out of block {index}, where one is expected")
        if self._made and self._made[-1][0] >= index:
            raise refused(
                f"block {index} is called after block {self._made[-1][0]}, or more than once in a micro-batch"
            )
        if not found:  # everything before it is frozen
            return None
        before = places[found[0]]
        begins = before.detach().requires_grad_()
        self._made.append((index, before, begins))
        return {**places, found[0]: begins}


def leaves_of(root: Tensor) -> list[Tensor]:
    """The leaf tensors that a graph accumulates gradients into."""
    waiting, seen, found = [root.grad_fn], set(), []
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "torch::autograd::AccumulateGrad":
            found.append(node.variable)  # type: ignore[attr-defined]
        waiting.extend(following for following, _ in node.next_functions)
    return found


def refused(reason: str) -> ConfigError:
    """The error for a model that cannot be computed block by block."""
    return ConfigError(
        f"overlap_micros above 1 needs a model whose blocks are a chain, and here {reason}. Use overlap_micros=1 "
        "(accum.overlap_micros on the command line)."
    )
