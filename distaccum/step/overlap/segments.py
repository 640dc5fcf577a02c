"""Cuts the graph of a forward at the model's blocks, so that each block's backward runs alone."""

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
    """Holds what one micro-batch computed between two cuts, with its graph.

    The segments of a micro-batch follow each other. What comes after the last block is called the
    head.

    Attributes:
        block: index of the segment's first block. Segment 0 also contains everything before block
            0. The number of blocks denotes the head.
        ends: the segment's output, which the next segment takes; the loss [] or [terms] for the
            last segment.
        begins: the segment's input, a leaf with the values of the previous segment's `ends`, whose
            gradient is the gradient of those; None for the first segment.
        parameters: the leaves that the segment's graph reaches, without `begins`.
        shared: those of `parameters` that an earlier segment of this micro-batch reaches too, such
            as a tied embedding.
    """

    block: int
    ends: Tensor
    begins: Tensor | None
    parameters: list[Tensor]
    shared: list[Tensor]


class Cuts:
    """Cuts the graph of forwards before every block but the first, and after the last one.

    Values do not change.
    """

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        """Keep the blocks of a model.

        The model must call each block once, in this order, with what the block before returned.
        """
        self._blocks = blocks
        # The cuts of the current forward: block after the cut, tensor before it, leaf after it.
        self._made: list[tuple[int, Tensor, Tensor]] = []

    @contextmanager
    def made(self) -> Iterator[None]:
        """Cut the forwards that run inside; the hooks are removed on leaving."""
        # Before FSDP2's own hooks on a block, so that they see the backward of the whole block.
        hooks = [
            block.register_forward_pre_hook(
                partial(self._before, index), prepend=True, with_kwargs=True
            )
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
        """Return the segments of the forward since the last call, in the order of computation.

        Args:
            loss: what the forward returned, [] or [terms].

        Raises:
            ConfigError: for a model whose blocks are not a chain.
        """
        made, self._made = self._made, []
        owners: dict[
            Any, int
        ] = {}  # node of the graph -> number of the segment that reached it first
        parts = []
        for number, ends in enumerate([*(ends for _, ends, _ in made), loss]):
            block, _, begins = made[number - 1] if number else (0, None, None)
            leaves, shared = _explore(ends, number, owners)
            if any(leaf is other for leaf in leaves for _, _, other in made if other is not begins):
                raise refused("what an earlier block returned is also used after the next block")
            if shared and number < len(made):
                raise refused(
                    f"a block shares a parameter with what comes before it (segment {number})"
                )
            parts.append(
                Segment(
                    block, ends, begins, [leaf for leaf in leaves if leaf is not begins], shared
                )
            )
        return parts

    def _before(
        self, index: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Cut before block `index`, as a forward pre-hook."""
        places = dict(enumerate(args)) | kwargs
        changed = self._cut(index, places)
        if changed is None:
            return None
        return tuple(changed[i] for i in range(len(args))), {name: changed[name] for name in kwargs}

    def _behind(self, block: nn.Module, args: Any, output: Any) -> Any:
        """Cut after the last block, as a forward hook."""
        if isinstance(output, Tensor):
            changed = self._cut(len(self._blocks), {0: output})
            return None if changed is None else changed[0]
        if isinstance(output, tuple) and not hasattr(output, "_fields"):
            changed = self._cut(len(self._blocks), dict(enumerate(output)))
            return None if changed is None else tuple(changed.values())
        return None

    def _cut(self, index: int, places: Mapping[Any, Any]) -> dict[Any, Any] | None:
        """Replace the one tensor that has a graph by a leaf with its values.

        Args:
            index: of the block after the cut.
            places: the values that pass the cut, by position or name.

        Returns:
            The values with the replacement, or None if there is nothing to cut.
        """
        if not torch.is_grad_enabled():
            return None
        found = [
            place
            for place, value in places.items()
            if isinstance(value, Tensor) and value.requires_grad
        ]
        if len(found) > 1:
            raise refused(
                f"{len(found)} tensors with gradients go into or out of block {index}, but only "
                "one may"
            )
        if self._made and self._made[-1][0] >= index:
            raise refused(
                f"block {index} is called after block {self._made[-1][0]}, or more than once in a "
                "micro-batch"
            )
        if not found:  # everything before it is frozen
            return None
        before = places[found[0]]
        begins = before.detach().requires_grad_()
        self._made.append((index, before, begins))
        return {**places, found[0]: _Handed.apply(begins)}  # type: ignore[no-untyped-call]


class _Handed(torch.autograd.Function):
    """Returns a leaf as a tensor that a block may change in place."""

    @staticmethod
    def forward(ctx: Any, begins: Tensor) -> Tensor:
        return begins.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def _explore(
    root: Tensor, number: int, owners: dict[Any, int]
) -> tuple[list[Tensor], list[Tensor]]:
    """Find the leaves that a segment's graph accumulates gradients into.

    Args:
        root: the end of the segment.
        number: of the segment.
        owners: for each node of the graph that an earlier segment reached, the number of the first
            such segment. The nodes of this segment are added.

    Returns:
        All leaves, and those of them that an earlier segment reached too.
    """
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
            raise refused("something computed before a block is used after it, bypassing the block")
        owners[node] = number
        waiting.extend(following for following, _ in node.next_functions)
    return leaves, shared


def refused(reason: str) -> ConfigError:
    """Return the error for a model that cannot be computed block by block."""
    return ConfigError(
        f"overlap_micro_batches above 1 needs a model whose blocks are a chain, but here {reason}. "
        "Use overlap_micro_batches=1 (accum.overlap_micro_batches on the command line)."
    )
