"""What a parallel strategy does for one window, whichever it is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from enum import Enum

import torch
from torch import Tensor, nn

from distaccum.errors import ConfigError
from distaccum.grads.accumulate import GradientDtypes, GradientSums
from distaccum.nn.batchnorm import PooledStatistics, collectives, pooled_statistics
from distaccum.nn.buffers import untouched
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
    first_window_differs = False  # whether later windows add the same numbers in another order than the first one
    sends_at_once = False  # whether a gradient travels as soon as autograd has accumulated into it once

    def __init__(
        self, model: nn.Module, world: World, sync: Sync, dtypes: GradientDtypes, reason: str = ""
    ) -> None:  # fmt: skip
        """Keep what was recognised; `reason` says why `auto` chose this policy."""
        self.model = model  # as it was recognised
        self.called: nn.Module = model  # what objectives call: the model, or what was put around it
        self.world = world
        self.sync = sync
        self.dtypes = dtypes
        self.reason = reason
        self.grad_scale = float(world.size)
        self.sums: GradientSums | None = None  # where this strategy's own accumulation is in another dtype than asked
        # BatchNorm's, where ranks merge them
        self.statistics: PooledStatistics | None = pooled_statistics(model, world.group)
        # In which the micros communicate, those that are not the last one too.
        communicates = sync is Sync.every or collectives(model)
        self.groups = [world.group] if world.group is not None and communicates else []

    @abstractmethod
    def micro(self, *, first: bool, last: bool) -> AbstractContextManager[None]:
        """Enter before the forward of a micro and leave after its backward. Sets the sync flags from full knowledge."""

    def tail_obstacle(self, blocks: Sequence[nn.Module]) -> str | None:
        """Why the last micros of a window cannot be computed along these blocks; None where they can."""
        if self.world.group is None:
            return "nothing travels on one process"
        if self.sums is not None:
            return "gradients travel after the window (sums in another dtype than the parameters', or agree_on_oom)"
        if collectives(self.model):
            return "synchronised BatchNorm knows the moments of one forward at a time"
        return f"{len(blocks)} block(s) were found in the model, and it takes two" if len(blocks) < 2 else None

    def tail_micro(self, *, first: bool, last: bool) -> AbstractContextManager[None]:
        """Instead of `micro`, around the forward of a micro whose backward is run block by block, and its head's."""
        return self.micro(first=first, last=last)

    @contextmanager
    def completing(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        """Enter around the backward that completes the gradients of these modules: now they may travel."""
        yield

    def observing(self) -> AbstractContextManager[None]:
        """Enter around the forward of a micro that counts: BatchNorm's running statistics are taken there."""
        return nullcontext() if self.statistics is None else self.statistics.observing()

    @contextmanager
    def padding(self) -> Iterator[None]:
        """Enter around the forward of a round that this rank has no micro for: it leaves no trace in any buffer."""
        with untouched(self.model), nullcontext() if self.statistics is None else self.statistics.padding():
            yield

    def send_statistics(self) -> None:
        """Call once between the last forward and the last backward, which hides it."""
        if self.statistics is not None:
            self.statistics.send(self.world.group, self.world.device)

    def keep_statistics(self, keep: bool) -> None:
        """Call at the boundary: write the window's running statistics, or forget them where it is skipped."""
        if self.statistics is not None:
            if keep:
                self.statistics.commit()
            else:
                self.statistics.forget()

    def after_micro(self) -> None:
        """Call after each backward: moves its gradients into sums of the dtype that was asked for."""
        if self.sums is not None:
            self.sums.absorb()

    def deliver(self) -> None:
        """Call once after the last backward. Afterwards `.grad` holds the sum over all micros and ranks (its shard)."""
        if self.sums is not None:
            self.sums.deliver()

    def owned(self) -> list[nn.Parameter] | None:
        """List the parameters whose gradients `deliver` completes; None where it completes every parameter's."""
        return None if self.sums is None else self.sums.parameters

    def gradients(self, parameters: Iterable[nn.Parameter]) -> list[Tensor]:
        """Return what this rank holds of the delivered gradients, as plain tensors that share their memory.

        A trained parameter that no micro-batch of the window has used gets a gradient of zeros, with every strategy and
        on any number of ranks: weight decay and momentum move it as they move all others.

        Raises:
            ConfigError: for a parameter that was frozen or trained when the model was wrapped, and is not any more.
        """
        found = []
        for parameter in parameters:
            if parameter.grad is None:
                if not parameter.requires_grad:
                    continue
                parameter.grad = torch.zeros_like(parameter)
            elif not parameter.requires_grad:
                raise ConfigError(
                    f"A parameter of shape {list(parameter.shape)} got a gradient although it is frozen: it was "
                    "trained when the model was wrapped or the accumulator made. Freeze parameters before, or make "
                    "both anew."
                )
            found.append(parameter.grad)
        return found

    def abort(self) -> None:
        """Forget everything that a window left unfinished. Call it on all ranks or leave the process."""
        if self.sums is not None:
            self.sums.clear()
        self.keep_statistics(False)
        for parameter in self.model.parameters():
            parameter.grad = None

    def forecast(self, num_rounds: int) -> Traffic:
        """What one window of so many micros per rank sends, without the control numbers."""
        traffic = self.gradient_traffic(num_rounds)
        if self.statistics is not None and self.world.group is not None:
            pooled = [self.statistics.num_bytes] if self.statistics.num_bytes else []
            sizes = collectives(self.model) * num_rounds + pooled
            traffic += Traffic.of(("all_reduce", size) for size in sizes)
        return traffic

    @abstractmethod
    def gradient_traffic(self, num_rounds: int) -> Traffic:
        """The part of it that carries gradients and parameters."""

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
