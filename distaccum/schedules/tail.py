"""The last micros of a window block by block, so that a block's gradient travels while earlier blocks are computed.

In the plain order gradients are complete in the very last backward, which alone can hide their reduction. Here the
forwards of the last T micros are kept, and their backwards run block by block: that of the last block for all T micros,
then that of the block before it. So a block's reduction has up to T backwards to hide behind, for the activations of T
micros. Each parameter's gradients are added in the plain order, so that the result is the same to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from distaccum.parallel.base import Strategy
from distaccum.schedules import microbatch
from distaccum.schedules.base import Forwards
from distaccum.schedules.segments import Cuts, Segment, refused


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
        microbatch.one(strategy, forwards, first=index == 0)
    cuts = Cuts(blocks)
    micros: list[_Backward] = []
    with cuts.made():
        for index in range(rounds - overlap_micros, rounds):
            last = index == rounds - 1
            with strategy.tail_micro(first=index == 0, last=last):
                backward = _Backward(cuts.segments(forwards.loss()), by_hand=strategy.sends_at_once and not last)
                backward.step()  # the head's at once: logits are large
            micros.append(backward)

    def last_backwards() -> None:
        while (block := micros[-1].block) is not None:
            for backward in micros[:-1]:
                backward.step()
            with strategy.completing(_modules(strategy.model, blocks, block)):
                micros[-1].step()

    return last_backwards


class _Backward:
    """The backward of one micro, a segment at a time."""

    def __init__(self, segments: list[Segment], *, by_hand: bool) -> None:
        """Start at the end.

        Args:
            segments: in the order in which they were computed.
            by_hand: whether gradients are added here, past autograd's accumulation, in whose hooks DDP would send them.
        """
        self._segments = segments
        self._by_hand = by_hand
        self._gradient: Tensor | None = None  # of the next segment's end
        self._held: dict[int, Tensor] = {}  # the head's gradients of shared parameters

    @property
    def block(self) -> int | None:
        """With which block the next segment begins; None at the end."""
        return self._segments[-1].block if self._segments else None

    def step(self) -> None:
        """Run the backward of one segment."""
        segment = self._segments.pop()
        # In the plain order autograd adds the two before it adds them to the sum.
        hooks = [
            parameter.register_hook(partial(torch.add, self._held.pop(id(parameter))))
            for parameter in segment.parameters
            if id(parameter) in self._held
        ]
        try:
            if self._by_hand or segment.shared:
                self._gradient = self._apart(segment)
            else:
                torch.autograd.backward(segment.ends, self._gradient)
                self._gradient = None if segment.begins is None else segment.begins.grad
        finally:
            for hook in hooks:
                hook.remove()
        if self._segments and self._gradient is None:
            raise refused(f"the loss of a micro-batch does not depend on what comes before block {segment.block}")

    def _apart(self, segment: Segment) -> Tensor | None:
        """Take the gradients out of autograd: hold those of shared parameters, add the others."""
        starts = [] if segment.begins is None else [segment.begins]
        gradients = torch.autograd.grad(
            segment.ends, [*starts, *segment.parameters], self._gradient, allow_unused=True
        )  # fmt: skip
        shared = {id(parameter) for parameter in segment.shared}
        fresh: list[tuple[Tensor, Tensor]] = []
        for parameter, gradient in zip(segment.parameters, gradients[len(starts) :], strict=True):
            if gradient is not None and id(parameter) in shared:
                self._held[id(parameter)] = gradient
            elif gradient is not None:
                fresh.append((parameter, gradient))
        if self._by_hand:
            _add(fresh)
        else:
            for parameter, gradient in fresh:  # one by one: DDP arranges its buckets in the order of their hooks
                torch.autograd.backward(parameter, gradient)
        return gradients[0] if starts else None


@torch.no_grad()
def _add(fresh: list[tuple[Tensor, Tensor]]) -> None:
    """What autograd's accumulation does, without its hooks."""
    known = [(parameter.grad, gradient) for parameter, gradient in fresh if parameter.grad is not None]
    if known:
        torch._foreach_add_([total for total, _ in known], [gradient for _, gradient in known])
    for parameter, gradient in fresh:
        if parameter.grad is None:
            parameter.grad = gradient.clone()  # autograd may have given one tensor to two parameters


def _modules(model: nn.Module, blocks: Sequence[nn.Module], block: int) -> list[nn.Module]:
    """The modules whose gradients are complete with this block: its own; with the first, all that are in no other."""
    if block:
        return list(blocks[block].modules())
    others = {id(module) for other in blocks[1:] for module in other.modules()}
    return [module for module in model.modules() if id(module) not in others]
