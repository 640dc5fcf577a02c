"""Computes the last micro-batches of a window block by block.

So a block's gradient is reduced while earlier blocks are computed. In the plain order, gradients
become complete only in the very last backward, which alone can hide their reduction. Here the
graphs of the last T micro-batches are kept, and their backwards run block by block: first the last
block for all T micro-batches, then the block before it, and so on. Up to T backwards can hide a
block's reduction, at the cost of the activations of T micro-batches. Each parameter's gradients are
added in the plain order, so results are bitwise equal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from distaccum._torch import backward
from distaccum.parallel.base import Strategy
from distaccum.step import plain_order
from distaccum.step.micro_batches import MicroBatchRunner
from distaccum.step.overlap.segments import Cuts, Segment, refused


def run(
    strategy: Strategy,
    runner: MicroBatchRunner,
    blocks: Sequence[nn.Module],
    overlap_micro_batches: int,
) -> Callable[[], None]:
    """Compute a window except for the last T micro-batches' backwards through the blocks.

    Args:
        strategy: sets what each part of a backward sends.
        runner: runs the forwards of the window.
        blocks: the model's blocks, in order.
        overlap_micro_batches: T, at most the rounds of the window.

    Returns:
        The remaining backwards, to be called once. They complete the gradients block by block and
        send each when it is complete.
    """
    rounds = runner.rounds
    for index in range(rounds - overlap_micro_batches):
        plain_order.one(strategy, runner, first=index == 0)
    runner.mark_sending()
    cuts = Cuts(blocks)
    micro_batches: list[_Backward] = []
    with cuts.made():
        for index in range(rounds - overlap_micro_batches, rounds):
            last = index == rounds - 1
            with strategy.tail_micro_batch(first=index == 0, last=last):
                root, gradient = runner.forward_next()
                backward = _Backward(
                    cuts.segments(root), gradient, manually=strategy.sends_at_once and not last
                )
                if backward.block == len(blocks):
                    backward.step()  # the head first, which frees its large logits
            micro_batches.append(backward)
            if backward.blocks != micro_batches[0].blocks:
                raise refused("one micro-batch leaves out blocks that another one computes")

    def last_backwards() -> None:
        *others, final = micro_batches
        behind = len(blocks)
        while (block := final.block) is not None:
            for backward in others:
                backward.step()
            with strategy.completing(_modules(strategy.model, blocks, block, behind)):
                final.step()
            behind = block

    return last_backwards


class _Backward:
    """Runs the backward of one micro-batch, one segment at a time."""

    def __init__(self, segments: list[Segment], gradient: Tensor, *, manually: bool) -> None:
        """Start with the last segment.

        Args:
            segments: in the order in which they were computed.
            gradient: what the backward of the last segment starts with.
            manually: whether gradients are added to `.grad` here instead of by autograd, in whose
                accumulation hooks DDP would send them.
        """
        self._segments = segments
        self._manually = manually
        self._gradient: Tensor | None = gradient  # with respect to the next segment's `ends`
        # By parameter: the head's gradient, if an earlier segment uses the parameter too.
        self._held: dict[Tensor, Tensor] = {}

    @property
    def blocks(self) -> list[int]:
        """Return the first block of each remaining segment."""
        return [segment.block for segment in self._segments]

    @property
    def block(self) -> int | None:
        """Return the first block of the next segment, or None if none is left."""
        return self._segments[-1].block if self._segments else None

    def step(self) -> None:
        """Run the backward of one segment."""
        segment = self._segments.pop()
        # Autograd would add a shared parameter's gradients in this order: the held one first.
        held = [parameter for parameter in segment.parameters if parameter in self._held]
        ends = [segment.ends, *(parameter.view_as(parameter) for parameter in held)]
        gradients = [
            self._gradient,
            *(self._held.pop(parameter).to(parameter.dtype) for parameter in held),
        ]
        if self._manually or segment.shared:
            self._gradient = self._apart(segment, ends, gradients)
        else:
            backward(ends, gradients)
            self._gradient = None if segment.begins is None else segment.begins.grad
        if self._segments and self._gradient is None:
            raise refused(
                "the loss of a micro-batch does not depend on what comes before block "
                f"{segment.block}"
            )

    def _apart(
        self, segment: Segment, ends: list[Tensor], gradients: list[Tensor | None]
    ) -> Tensor | None:
        """Run the backward of a segment without autograd's accumulation.

        Gradients of shared parameters are held, and the others are added to `.grad`.

        Returns:
            The gradient with respect to the segment's `begins`, or None if there is none.
        """
        starts = [] if segment.begins is None else [segment.begins]
        found = torch.autograd.grad(
            ends, [*starts, *segment.parameters], gradients, allow_unused=True
        )
        pairs = zip(segment.parameters, found[len(starts) :], strict=True)
        fresh = {parameter: gradient for parameter, gradient in pairs if gradient is not None}
        for parameter in segment.shared:
            if parameter in fresh:
                self._held[parameter] = fresh.pop(parameter)
        if self._manually:
            _add(fresh)
        else:  # one by one, since DDP orders its buckets by the order of these hooks
            for parameter, gradient in fresh.items():
                backward((parameter,), (gradient,))
        return found[0] if starts else None


@torch.no_grad()
def _add(fresh: Mapping[Tensor, Tensor]) -> None:
    """Add gradients to `.grad` as autograd's accumulation does, but without its hooks."""
    known = [
        (total, gradient)
        for parameter, gradient in fresh.items()
        if (total := parameter.grad) is not None
    ]
    if known:
        torch._foreach_add_([total for total, _ in known], [gradient for _, gradient in known])
    for parameter, gradient in fresh.items():
        if parameter.grad is None:
            # autograd may have given one tensor to two parameters
            parameter.grad = gradient.clone()


def _modules(
    model: nn.Module, blocks: Sequence[nn.Module], block: int, behind: int
) -> list[nn.Module]:
    """Return the modules whose gradients the backward of a segment completes.

    They are the modules in the blocks from `block` to the one before `behind`. With block 0 they
    are all modules that are left, also those in no block.
    """
    if block:
        return [module for part in blocks[block:behind] for module in part.modules()]
    done = {id(module) for part in blocks[behind:] for module in part.modules()}
    return [module for module in model.modules() if id(module) not in done]
