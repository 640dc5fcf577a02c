"""The forwards of one window on one rank. A schedule decides in which order they and their backwards are run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distaccum._torch import issued
from distaccum.core.loss import SupportsObjective, checked_weights, joined, sums_of, weights_of
from distaccum.core.rng import random_key
from distaccum.core.window import MicroBatches
from distaccum.data.device import halved, one_ahead, to_device
from distaccum.errors import ConfigError
from distaccum.nn.one_sample import explained
from distaccum.parallel.base import Strategy
from distaccum.step.consensus import Announced
from distaccum.step.randomness import seed_all
from distaccum.step.timing import Mark, mark, seconds_between


class Forwards:
    """One round after the other: a micro of this rank, or padding where it has none left."""

    def __init__(
        self,
        strategy: Strategy,
        objective: SupportsObjective,
        window: MicroBatches,
        announced: Announced,
        padding: Any,
        *,
        seed: int | None,
        num_windows: int,
        loss_scale: float,
    ) -> None:
        """Nothing is computed yet.

        Args:
            strategy: observes the forwards, and scales the losses as it wants them.
            objective: what is summed.
            window: this rank's micros.
            announced: the weights of the whole window, and the rounds of forward and backward that every rank makes.
            padding: any micro-batch, computed with weight 0 in the rounds that this rank has no micro for.
            seed: of the randomness inside micros; None leaves torch's generators alone.
            num_windows: the window's number where no plan gives it one.
            loss_scale: what losses are multiplied by before their backward, beside the strategy's own factor.
        """
        self.rounds = announced.rounds
        self.began = mark(strategy.world.device)
        self.last_micro = padding  # as it was read: padding for a later window
        self._strategy = strategy
        self._objective = objective
        self._window = window
        self._denominator = announced.denominator
        self._terms = list(announced.denominator.weights)
        self._padding = padding
        self._seed = seed
        self._step = num_windows if window.step is None else window.step
        self._factor = strategy.grad_scale * loss_scale
        self._device = strategy.world.device
        self._micros = one_ahead(window, self._device)
        self._sums: list[Tensor] = []
        self.done = 0  # rounds whose forward was begun
        self.sent_before: list[int] = []  # the newest of them, in each of the strategy's groups
        self._unsent = 0  # rounds that send nothing
        self._sending = self.began  # when the others began
        self._gradient: Tensor | None = None  # what every micro's backward begins with

    def root(self) -> tuple[Tensor, Tensor]:
        """Where the next round's backward begins and with what gradient, as the strategy wants it scaled."""
        self.done += 1
        self.sent_before = issued(self._strategy.groups)
        return self._micro(self.done - 1) if self.done <= len(self._window) else self._nothing()

    def give_up(self) -> None:
        """From here on all rounds are padding, of half a micro."""
        self._window, self._micros, self._sums = MicroBatches([], 0), iter(()), []
        self._padding = self.last_micro = halved(self.last_micro)

    def mark_sending(self) -> None:
        """Call before the micros that send gradients, the last ones of the window."""
        self._unsent, self._sending = self.done, mark(self._device)

    def exposed_s(self, end: Mark) -> float | None:
        """Seconds that the window waited for communication: how much longer its last micros took than as many others.

        What hides behind computation is not waited for and not counted, nor are FSDP2's gathers in the other micros.

        Args:
            end: of the last micro; passed on the device.

        Returns:
            None where there is no other micro to compare with.
        """
        if not self._unsent:
            return None
        others = seconds_between(self.began, self._sending) / self._unsent
        return max(0.0, seconds_between(self._sending, end) - (self.rounds - self._unsent) * others)

    @property
    def sums(self) -> Tensor:
        """The loss sums so far, [micros of this rank, terms] float64, on the device, without graph."""
        if not self._sums:
            return torch.zeros(0, len(self._terms), dtype=torch.float64, device=self._device)
        return torch.stack(self._sums).double().view(-1, len(self._terms))

    def _micro(self, index: int) -> tuple[Tensor, Tensor]:
        world, window = self._strategy.world, self._window
        self.last_micro, micro = next(self._micros, (None, None))
        _check(self._objective, window, index, self.last_micro)
        if self._seed is not None:
            seed_all(random_key(self._seed, self._step, index * world.size + world.rank), self._device)
        try:
            with self._strategy.observing():
                own = sums_of(self._objective, self._strategy.called, micro, self._terms)
        except ValueError as error:
            raise explained(error, index) from error.__cause__
        self._sums += [value.detach() for value in own]
        if self._gradient is None:
            self._gradient = self._denominator.gradient(own, self._factor)
        return joined(own), self._gradient

    def _nothing(self) -> tuple[Tensor, Tensor]:
        with self._strategy.padding():
            own = sums_of(self._objective, self._strategy.called, to_device(self._padding, self._device), self._terms)
        return joined(own), self._denominator.gradient(own, 0.0)


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
