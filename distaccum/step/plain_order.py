"""Runs one micro-batch after the other, each with its forward and its backward."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

from distaccum._torch import backward
from distaccum.parallel.base import Strategy
from distaccum.step.micro_batches import MicroBatchRunner


def run(strategy: Strategy, runner: MicroBatchRunner) -> Callable[[], None]:
    """Compute a window except for its last backward, before which all losses are known.

    Returns:
        The last backward, to be called once. It completes the gradients and sends them.
    """
    rounds = runner.rounds
    for index in range(rounds - 1):
        one(strategy, runner, first=index == 0)

    runner.mark_sending()
    boundary = ExitStack()
    boundary.enter_context(strategy.micro_batch(first=rounds == 1, last=True))
    root, gradient = runner.forward_next()

    def last_backward() -> None:
        with boundary:
            backward((root,), (gradient,))
        strategy.after_micro_batch()

    return last_backward


def one(strategy: Strategy, runner: MicroBatchRunner, *, first: bool, last: bool = False) -> None:
    """Run forward and backward of the next micro-batch."""
    with strategy.micro_batch(first=first, last=last):
        root, gradient = runner.forward_next()
        backward((root,), (gradient,))
    strategy.after_micro_batch()
