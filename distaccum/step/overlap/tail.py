"""The last micros of a window block by block, so that a block's gradient travels while earlier blocks are computed.

In the plain order gradients are complete in the very last backward, which alone can hide their reduction. Here the
forwards of the last T micros are kept, and their backwards run block by block: that of the last block for all T micros,
then that of the block before it. So a block's reduction has up to T backwards to hide behind, for the activations of T
micros. Each parameter's gradients are added in the plain order, so that the result is the same to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from distaccum.parallel.base import Strategy
from distaccum.step import plain_order
from distaccum.step.micro_batches import Forwards
from distaccum.step.overlap.segments import Cuts, Segment, refused


def run(strategy: Strategy, forwards: Forwards, blocks: Sequence[nn.Module], overlap_micros: int) -> Callable[[], None]:
    """Compute a window, the last micros' backwards through the blocks excepted.

    Args:
        strategy: says how a part of a backward must be run, and what completes gradients.
        forwards: of the window.
        blocks: the model's, in their order.
        overlap_micros: T, at most the rounds of the window.

    Returns:
        What is left: completes the gradients, block by block, and sends each as it is complete.
    """
    rounds = forwards.rounds
    for index in range(rounds - overlap_micros):
        plain_order.one(strategy, forwards, first=index == 0)
    forwards.mark_sending()
    cuts = Cuts(blocks)
    micros: list[_Backward] = []
    with cuts.made():
        for index in range(rounds - overlap_micros, rounds):
            last = index == rounds - 1
            with strategy.tail_micro(first=index == 0, last=last):
                root, gradient = forwards.root()
                backward = _Backward(cuts.segments(root), gradient, by_hand=strategy.sends_at_once and not last)
                if backward.block == len(blocks):
                    backward.step()  # the head's at once: logits are large
            micros.append(backward)
            if backward.blocks != micros[0].blocks:
                raise refused("a micro-batch leaves out blocks that another one computes")

    def last_backwards() -> None:
        *others, final = micros
        behind = len(blocks)
        while (block := final.block) is not None:
            for backward in others:
                backward.step()
            with strategy.completing(_modules(strategy.model, blocks, block, behind)):
                final.step()
            behind = block

    return last_backwards


class _Backward:
    """The backward of one micro, a segment at a time."""

    def __init__(self, segments: list[Segment], gradient: Tensor, *, by_hand: bool) -> None:
        """Start at the end.

        Args:
            segments: in the order in which they were computed.
            gradient: what the backward of the last one begins with.
            by_hand: whether gradients are added here, past autograd's accumulation, in whose hooks DDP would send them.
        """
        self._segments = segments
        self._by_hand = by_hand
        self._gradient: Tensor | None = gradient  # of the next segment's end
        self._held: dict[Tensor, Tensor] = {}  # by parameter: the head's gradient, where an earlier segment uses it too

    @property
    def blocks(self) -> list[int]:
        """With which blocks the segments that are left begin."""
        return [segment.block for segment in self._segments]

    @property
    def block(self) -> int | None:
        """With which block the next segment begins; None when all is done."""
        return self._segments[-1].block if self._segments else None

    def step(self) -> None:
        """Run the backward of one segment."""
        segment = self._segments.pop()
        # What was held comes first, as autograd would have had it: then it adds this segment's to it.
        held = [parameter for parameter in segment.parameters if parameter in self._held]
        ends = [segment.ends, *(parameter.view_as(parameter) for parameter in held)]
        gradients = [self._gradient, *(self._held.pop(parameter).to(parameter.dtype) for parameter in held)]
        if self._by_hand or segment.shared:
            self._gradient = self._apart(segment, ends, gradients)
        else:
            torch.autograd.backward(ends, gradients)
            self._gradient = None if segment.begins is None else segment.begins.grad
        if self._segments and self._gradient is None:
            raise refused(f"the loss of a micro-batch does not depend on what comes before block {segment.block}")

    def _apart(self, segment: Segment, ends: list[Tensor], gradients: list[Tensor | None]) -> Tensor | None:
        """Take the gradients out of autograd: hold those of shared parameters, add the others."""
        starts = [] if segment.begins is None else [segment.begins]
        found = torch.autograd.grad(ends, [*starts, *segment.parameters], gradients, allow_unused=True)
        pairs = zip(segment.parameters, found[len(starts) :], strict=True)
        fresh = {parameter: gradient for parameter, gradient in pairs if gradient is not None}
        for parameter in segment.shared:
            if parameter in fresh:
                self._held[parameter] = fresh.pop(parameter)
        if self._by_hand:
            _add(fresh)
        else:  # one by one: DDP arranges its buckets in the order of their hooks
            for parameter, gradient in fresh.items():
                torch.autograd.backward(parameter, gradient)
        return found[0] if starts else None


@torch.no_grad()
def _add(fresh: Mapping[Tensor, Tensor]) -> None:
    """What autograd's accumulation does, without its hooks."""
    known = [(total, gradient) for parameter, gradient in fresh.items() if (total := parameter.grad) is not None]
    if known:
        torch._foreach_add_([total for total, _ in known], [gradient for _, gradient in known])
    for parameter, gradient in fresh.items():
        if parameter.grad is None:
            parameter.grad = gradient.clone()  # autograd may have given one tensor to two parameters


def _modules(model: nn.Module, blocks: Sequence[nn.Module], block: int, behind: int) -> list[nn.Module]:
    """The modules whose gradients are complete with this block: those from it to the one before `behind`.

    With the first block, all that are left: also those in no block.
    """
    if block:
        return [module for part in blocks[block:behind] for module in part.modules()]
    done = {id(module) for part in blocks[behind:] for module in part.modules()}
    return [module for module in model.modules() if id(module) not in done]
