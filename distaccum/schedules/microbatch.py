"""One micro after the other: forward, backward, forward, backward, until the boundary."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distaccum.agreement import Announced
from distaccum.clock import Mark, mark
from distaccum.data.window import MicroBatches, one_ahead, to_device
from distaccum.errors import ConfigError
from distaccum.loss import SupportsObjective, checked_weights, sums_of, weights_of
from distaccum.parallel.base import Strategy
from distaccum.plan import random_key


@dataclass(frozen=True)
class Computed:
    """A window of which everything is done but the last backward."""

    sums: Tensor  # [micros of this rank, terms] float64, on the device: the loss sums, without graph
    last_backward: Callable[[], None]  # completes the gradients and sends them; to be called once
    marks: list[Mark]  # the beginning of each micro
    last_micro: Any  # as it was read: padding for a later window


def run(
    strategy: Strategy,
    objective: SupportsObjective,
    window: MicroBatches,
    announced: Announced,
    padding: Any,
    *,
    seed: int | None,
    num_windows: int,
    loss_scale: float,
) -> Computed:
    """Compute a window on this rank; all losses are known before its last backward begins.

    Args:
        strategy: sets the sync flags of each micro.
        objective: what is summed.
        window: this rank's micros.
        announced: the weights of the whole window, and the rounds of forward and backward that every rank makes.
        padding: any micro-batch, computed with weight 0 in the rounds that this rank has no micro for.
        seed: of the randomness inside micros; None leaves torch's generators alone.
        num_windows: the window's number where no plan gives it one.
        loss_scale: what losses are multiplied by before their backward, beside the strategy's own factor.
    """
    step = num_windows if window.step is None else window.step
    denominator, rounds = announced.denominator, announced.rounds
    device = strategy.world.device
    terms = list(denominator.weights)
    micros = one_ahead(window, device)
    sums: list[Tensor] = []
    marks: list[Mark] = []
    last_micro = padding

    def forward(index: int) -> Tensor:
        """This round's share [] of the window's loss, as the strategy wants it scaled."""
        nonlocal last_micro
        marks.append(mark(device))
        if index >= len(window):
            with strategy.padding():
                own = sums_of(objective, strategy.model, to_device(padding, device), terms)
            return denominator.divide(own) * 0.0
        last_micro, micro = next(micros, (None, None))
        _check(objective, window, index, last_micro)
        if seed is not None:
            torch.manual_seed(random_key(seed, step, index * strategy.world.size + strategy.world.rank))
        with strategy.observing():
            own = sums_of(objective, strategy.model, micro, terms)
        sums.append(torch.stack([value.detach().double() for value in own]))
        return denominator.divide(own) * (strategy.grad_scale * loss_scale)

    for index in range(rounds - 1):
        with strategy.micro(first=index == 0, last=False):
            forward(index).backward()
        strategy.after_micro()

    boundary = ExitStack()
    boundary.enter_context(strategy.micro(first=rounds == 1, last=True))
    loss = forward(rounds - 1)

    def last_backward() -> None:
        with boundary:
            loss.backward()
        strategy.after_micro()

    table = torch.stack(sums) if sums else torch.zeros(0, len(terms), dtype=torch.float64, device=device)
    return Computed(table, last_backward, marks, last_micro)


def _check(objective: SupportsObjective, window: MicroBatches, index: int, micro: Any) -> None:
    """A window that is streamed must be what it was announced to be."""
    if micro is None:
        raise ConfigError(f"The window was announced with {len(window)} micro-batches and has only {index}.")
    if window.weights is not None:
        told, found = checked_weights(window.weights[index]), weights_of(objective, micro)
        if told != found:
            raise ConfigError(
                f"Micro-batch {index} was announced with the weight {told} and the objective counts {found} in it. "
                "The data set's counted() must say what the objective's weight() says, or None."
            )
