"""What a parallel strategy does for one window, whichever it is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from enum import Enum

import torch
from torch import Tensor, nn

from distaccum.errors import ConfigError
from distaccum.grads.accumulate import WideGradients
from distaccum.parallel.ledger import Traffic
from distaccum.parallel.world import World


class Sync(Enum):
    """When gradients (and FSDP parameters) travel."""

    every = "every"  # with each micro; for measurement, and for the least memory under FSDP2
    shard = "shard"  # HSDP: reduce-scatter each micro, all-reduce once
    boundary = "boundary"  # once, with the last micro
    keep = "keep"  # FSDP2 and HSDP: parameters gathered once and gradients reduced once per window
    auto = "auto"


class Strategy(ABC):
    """How the gradients of a window become global sums in `.grad`. One object serves one model.

    The loss of each micro is multiplied by `grad_scale` before its backward: DDP and FSDP2 deliver means over ranks.
    """

    sharded = False  # whether each rank holds a shard of the gradients only, so that their norm takes a collective
    replicas = 1  # how many ranks hold the same shard

    def __init__(self, model: nn.Module, world: World, sync: Sync, reason: str = "") -> None:
        """Keep what was recognised; `reason` says why `auto` chose this policy."""
        self.model = model  # what objectives call
        self.world = world
        self.sync = sync
        self.reason = reason
        self.grad_scale = float(world.size)
        self.wide: WideGradients | None = None  # where this strategy's own accumulation would be too narrow

    @abstractmethod
    def micro(self, *, first: bool, last: bool) -> AbstractContextManager[None]:
        """Enter before the forward of a micro and leave after its backward. Sets the sync flags from full knowledge."""

    def after_micro(self) -> None:
        """Call after each backward: moves narrow gradients into float32."""
        if self.wide is not None:
            self.wide.absorb()

    def deliver(self) -> None:
        """Call once after the last backward. Afterwards `.grad` holds the sum over all micros and ranks (its shard)."""
        if self.wide is not None:
            self.wide.deliver()

    def gradients(self, parameters: Iterable[nn.Parameter]) -> list[Tensor]:
        """What this rank holds of the delivered gradients, as plain tensors that share their memory."""
        return [parameter.grad for parameter in parameters if parameter.grad is not None]

    def abort(self) -> None:
        """Forget everything that a window left unfinished. Call it on all ranks or leave the process."""
        if self.wide is not None:
            self.wide.clear()
        for parameter in self.model.parameters():
            parameter.grad = None

    @abstractmethod
    def forecast(self, num_rounds: int) -> Traffic:
        """What one window of so many micros per rank sends, without the control numbers."""

    @contextmanager
    def evaluating(self) -> Iterator[nn.Module]:
        """The model in evaluation mode, without gradients. All ranks enter, and run the same number of forwards."""
        model = self.evaluation_model
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        try:
            with torch.no_grad():
                yield model
        finally:
            for module, training in modes:
                module.training = training

    @property
    def evaluation_model(self) -> nn.Module:
        """What to call outside of training."""
        return self.model

    def refuse(self, kept: tuple[Sync, ...], reason: str) -> None:
        """Raise ConfigError unless this strategy keeps the policy."""
        if self.sync not in kept:
            raise ConfigError(
                f"sync='{self.sync.value}' cannot be kept by {type(self).__name__.lower()}: {reason}. "
                f"Use {' or '.join(repr(policy.value) for policy in kept)} (accum.sync on the command line)."
            )
