"""Runs the forwards of one window on one rank.

The order of forwards and backwards is decided elsewhere: in plain_order or in overlap.tail.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distaccum.core.loss import (
    SupportsObjective,
    checked_denominators,
    denominators_of,
    joined,
    sums_of,
)
from distaccum.core.rng import random_key
from distaccum.core.window import MicroBatches
from distaccum.data.device import one_ahead, to_device
from distaccum.errors import ConfigError
from distaccum.nn.one_sample import explained
from distaccum.parallel.base import Strategy
from distaccum.step.exchange import WindowTotals
from distaccum.step.randomness import seed_all
from distaccum.step.timing import Mark, mark, seconds_between


class MicroBatchRunner:
    """Runs the forwards of one window, one round after the other.

    A round is a micro-batch of this rank, or padding if it has none left.
    """

    def __init__(
        self,
        strategy: Strategy,
        objective: SupportsObjective,
        window: MicroBatches,
        totals: WindowTotals,
        padding: Any,
        parameters: Sequence[nn.Parameter],
        *,
        seed: int | None,
        num_windows: int,
        loss_scale: float,
    ) -> None:
        """Prepare the rounds of a window; nothing is computed yet.

        Args:
            strategy: how the model is distributed; its `grad_scale` multiplies the losses.
            objective: computes the loss sums.
            window: this rank's micro-batches.
            totals: the denominators of the whole window, and the number of rounds, which is the
                same on every rank.
            padding: any micro-batch, computed with gradient 0 in the rounds for which this rank has
                no micro-batch.
            parameters: the optimizer's, without gradients.
            seed: the training's seed of the randomness inside micro-batches; None: nothing is
                seeded.
            num_windows: the window's number if there is no plan that numbers it.
            loss_scale: a further factor that losses are multiplied by before their backward.
        """
        self.rounds = totals.rounds
        self.began = mark(strategy.world.device)
        self.last_micro_batch = padding  # the latest one that was read; padding for a later window
        self._strategy = strategy
        self._objective = objective
        self._window = window
        self._denominator = totals.denominator
        self._terms = list(totals.denominator.by_term)
        self._padding = padding
        self._parameters = parameters
        self._seed = seed
        self._step = num_windows if window.step is None else window.step
        self._factor = strategy.grad_scale * loss_scale
        self._device = strategy.world.device
        self._micro_batches = one_ahead(window, self._device)
        self._sums: list[Tensor] = []
        self.num_started = 0  # rounds whose forward has started
        self._unsent = 0  # rounds that send no gradients
        self._sending = self.began  # start of the rounds that send gradients
        # gradient of the window's loss with respect to a micro-batch's sums
        self._gradient: Tensor | None = None

    def forward_next(self) -> tuple[Tensor, Tensor]:
        """Run the next round's forward and return where its backward begins.

        Returns:
            The loss sums as one tensor, [] or [terms], and the gradient to start their backward
            with, already scaled.
        """
        self.num_started += 1
        return (
            self._micro_batch(self.num_started - 1)
            if self.num_started <= len(self._window)
            else self._nothing()
        )

    def mark_sending(self) -> None:
        """Note the time before the last micro-batches of the window, which send gradients."""
        self._unsent, self._sending = self.num_started, mark(self._device)

    def exposed_s(self, end: Mark) -> float | None:
        """Return how many seconds the window waited for communication.

        It is how much longer the micro-batches that send gradients took than the same number of the
        others. Communication that computation hides is not included, nor are FSDP2's all-gathers
        in the other micro-batches.

        Args:
            end: the end of the last micro-batch, which the device has already passed.

        Returns:
            Seconds, or None if there is no other micro-batch to compare with.
        """
        if not self._unsent:
            return None
        others = seconds_between(self.began, self._sending) / self._unsent
        return max(0.0, seconds_between(self._sending, end) - (self.rounds - self._unsent) * others)

    @property
    def sums(self) -> Tensor:
        """Return this rank's loss sums so far, without graph.

        They are [micro-batches, terms] float64 on the device.
        """
        if not self._sums:
            return torch.zeros(0, len(self._terms), dtype=torch.float64, device=self._device)
        return torch.stack(self._sums).double().view(-1, len(self._terms))

    def _micro_batch(self, index: int) -> tuple[Tensor, Tensor]:
        """Run the forward of this rank's micro-batch `index`."""
        world, window = self._strategy.world, self._window
        self.last_micro_batch, micro_batch = next(self._micro_batches, (None, None))
        _check(self._objective, window, index, self.last_micro_batch)
        if self._seed is not None:
            seed_all(
                random_key(self._seed, self._step, index * world.size + world.rank), self._device
            )
        try:
            with self._strategy.statistics.observing():
                own = sums_of(self._objective, self._strategy.called, micro_batch, self._terms)
        except ValueError as error:
            raise explained(error, index) from error.__cause__
        if index == 0 and any(parameter.grad is not None for parameter in self._parameters):
            raise ConfigError(
                "The objective called backward, so gradients would be added twice. Return the sum "
                "of the losses; the accumulator runs the backward."
            )
        self._sums += [value.detach() for value in own]
        if self._gradient is None:
            self._gradient = self._denominator.gradient(own, self._factor)
        return joined(own), self._gradient

    def _nothing(self) -> tuple[Tensor, Tensor]:
        """Run the forward of a padding round, whose gradient is 0."""
        with self._strategy.padding():
            own = sums_of(
                self._objective,
                self._strategy.called,
                to_device(self._padding, self._device),
                self._terms,
            )
        return joined(own), self._denominator.gradient(own, 0.0)


def _check(
    objective: SupportsObjective, window: MicroBatches, index: int, micro_batch: Any
) -> None:
    """Raise ConfigError if a streamed window differs from what was announced."""
    if micro_batch is None:
        raise ConfigError(
            f"The window was announced with {len(window)} micro-batches, but its stream ended "
            f"after {index}. Give the number of micro-batches that the stream has."
        )
    if window.denominators is not None:
        announced = checked_denominators(window.denominators[index])
        found = denominators_of(objective, micro_batch)
        if announced != found:
            raise ConfigError(
                f"Micro-batch {index} was announced with the denominator {announced}, but the "
                f"objective counts {found} in it. Make the data set's num_targets() return what "
                "the objective's denominator() returns, or None."
            )
