"""One micro after the other: forward, backward, forward, backward, until the boundary."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

from distaccum._torch import backward
from distaccum.parallel.base import Strategy
from distaccum.step.micro_batches import Forwards


def run(strategy: Strategy, forwards: Forwards) -> Callable[[], None]:
    """Compute a window, all of it but its last backward; all losses are known before that begins.

    Returns:
        The last backward, to be called once: it completes the gradients and sends them.
    """
    rounds = forwards.rounds
    for index in range(rounds - 1):
        one(strategy, forwards, first=index == 0)

    forwards.mark_sending()
    boundary = ExitStack()
    boundary.enter_context(strategy.micro(first=rounds == 1, last=True))
    root, gradient = forwards.root()

    def last_backward() -> None:
        with boundary:
            backward(root, gradient)
        strategy.after_micro()

    return last_backward


def one(strategy: Strategy, forwards: Forwards, *, first: bool, last: bool = False) -> None:
    """Forward and backward of a micro, together."""
    with strategy.micro(first=first, last=last):
        root, gradient = forwards.root()
        backward(root, gradient)
    strategy.after_micro()
