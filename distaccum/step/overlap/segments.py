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

    block: int  # that it begins with, the first one with all that comes before it; one behind the last: the head
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
        owners: dict[Any, int] = {}  # in which segment each node of the graph was met first
        parts = []
        for number, ends in enumerate([*(ends for _, ends, _ in made), loss]):
            block, _, begins = made[number - 1] if number else (0, None, None)
            leaves, shared = _explore(ends, number, owners)
            if any(leaf is other for leaf in leaves for _, _, other in made if other is not begins):
                raise refused("what an earlier block returned is used behind the next one too")
            if shared and number < len(made):
                raise refused(f"a block shares a parameter with what comes before it, in segment {number}")
            parts.append(Segment(block, ends, begins, [leaf for leaf in leaves if leaf is not begins], shared))
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
        return {**places, found[0]: _Handed.apply(begins)}  # type: ignore[no-untyped-call]


class _Handed(torch.autograd.Function):
    """A leaf as something that a block may change in place."""

    @staticmethod
    def forward(ctx: Any, begins: Tensor) -> Tensor:
        return begins.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def _explore(root: Tensor, number: int, owners: dict[Any, int]) -> tuple[list[Tensor], list[Tensor]]:
    """The leaves that a segment's graph accumulates gradients into, and those that an earlier segment has met."""
    waiting = [root.grad_fn]
    leaves, shared = [], []
    while waiting:
        node = waiting.pop()
        owner = owners.get(node, number + 1)
        if node is None or owner == number:
            continue
        if node.name() == "torch::autograd::AccumulateGrad":
            leaves.append(node.variable)  # type: ignore[attr-defined]
            if owner < number:
                shared.append(node.variable)  # type: ignore[attr-defined]
        elif owner < number:
            raise refused("something computed before a block is used behind it, around the block")
        owners[node] = number
        waiting.extend(following for following, _ in node.next_functions)
    return leaves, shared


def refused(reason: str) -> ConfigError:
    """The error for a model that cannot be computed block by block."""
    return ConfigError(
        f"overlap_micros above 1 needs a model whose blocks are a chain, and here {reason}. Use overlap_micros=1 "
        "(accum.overlap_micros on the command line)."
    )
