"""Defines what every parallel strategy does for one window."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from distaccum.core.strategies import POLICIES, StrategyName, Sync
from distaccum.core.traffic import Traffic
from distaccum.errors import ConfigError
from distaccum.grads.accumulate import GradientDtypes, GradientSums
from distaccum.nn.batchnorm import collectives, pooled_statistics
from distaccum.nn.buffers import untouched
from distaccum.parallel.world import World


class Strategy(ABC):
    """Turns the gradients of a window into global sums in `.grad`; one object serves one model.

    The loss of each micro-batch must be multiplied by `grad_scale` before its backward, because
    DDP's own reduction delivers means over ranks.
    """

    # whether each rank holds only a shard of the gradients, so that their norm needs a collective
    sharded = False
    replicas = 1  # number of ranks that hold the same shard
    # whether the first window adds gradients in another floating-point order than later windows
    first_window_differs = False
    # whether a gradient is sent as soon as autograd first accumulates into it
    sends_at_once = False

    def __init__(
        self, model: nn.Module, world: World, sync: Sync, dtypes: GradientDtypes, reason: str = ""
    ) -> None:
        """Store the model and the settings of this strategy.

        Args:
            model: the module that was detected: plain, DDP or FSDP2.
            world: the ranks that train it.
            sync: the sync policy.
            dtypes: the dtypes in which gradients are summed.
            reason: why `auto` chose this policy; empty where no reason is given.
        """
        self.model = model  # the detected module, without wrappers such as torch.compile's
        self.called: nn.Module = model  # the module that objectives call: the model or its wrapper
        self.world = world
        self.sync = sync
        self.dtypes = dtypes
        self.reason = reason
        self.grad_scale = 1.0
        # Our own sums, where the module's accumulation does not have the requested dtype.
        self.sums: GradientSums | None = None
        # The running statistics of BatchNorm layers in the modes pooled and sync, if there are any.
        self.statistics = pooled_statistics(model, world.group)
        # Whether micro-batches before the last one communicate too, so that all ranks need them.
        self.communicates = world.group is not None and (
            sync is Sync.every or bool(collectives(model))
        )

    @abstractmethod
    def micro_batch(self, *, first: bool, last: bool) -> AbstractContextManager[None]:
        """Return a context to enter before a micro-batch's forward and leave after its backward.

        It sets the sync flags for exactly this micro-batch, from the policy, `first` and `last`.

        Args:
            first: whether this is the first micro-batch of the window.
            last: whether this is the last one, with which gradients are completed.
        """

    def tail_obstacle(self, blocks: Sequence[nn.Module]) -> str | None:
        """Return why the last micro-batches cannot be computed block by block, or None if they can.

        Computing them block by block (`overlap_micro_batches`) sends a block's gradients while
        earlier blocks are still being computed.

        Args:
            blocks: the model's blocks, in their order.
        """
        if self.world.group is None:
            return "a single process sends nothing"
        if self.sums is not None:
            return (
                "gradients are sent after the window (they are summed in another dtype than the "
                "parameters', or agree_on_oom is set)"
            )
        if collectives(self.model):
            return "BatchNorm layers in mode 'sync' keep the statistics of one forward at a time"
        return (
            f"{len(blocks)} block(s) were found in the model, but two are needed"
            if len(blocks) < 2
            else None
        )

    def tail_micro_batch(self, *, first: bool, last: bool) -> AbstractContextManager[None]:
        """Return the context for a micro-batch whose backward is run block by block.

        It replaces `micro_batch`, and is entered around the forward and the backward of the head.

        Args:
            first: whether this is the first micro-batch of the window.
            last: whether this is the last one.
        """
        return self.micro_batch(first=first, last=last)

    @contextmanager
    def completing(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        """Return a context for the backward that completes the gradients of these modules.

        From then on these gradients may be sent.
        """
        yield

    @contextmanager
    def padding(self) -> Iterator[None]:
        """Return a context for the forward of a padding round, which leaves all buffers unchanged.

        A rank computes padding in a round for which it has no micro-batch but another rank has one.
        """
        with untouched(self.model), self.statistics.padding():
            yield

    def after_micro_batch(self) -> None:
        """Add the gradients of one backward to the sums; call it after each backward.

        It does nothing where autograd's own accumulation already has the requested dtype.
        """
        if self.sums is not None:
            self.sums.absorb()

    def deliver(self) -> None:
        """Complete the gradients; call it once after the last backward.

        Afterwards `.grad` holds the sum over all micro-batches and ranks, or this rank's shard of
        it.
        """
        if self.sums is not None:
            self.sums.deliver()

    def owned(self) -> list[nn.Parameter] | None:
        """List the parameters whose gradients `deliver` completes; None means every parameter."""
        return None if self.sums is None else self.sums.parameters

    def gradients(self, parameters: Iterable[nn.Parameter]) -> list[Tensor]:
        """Return this rank's delivered gradients as plain tensors that share memory with `.grad`.

        A trained parameter that no micro-batch of the window has used gets a gradient of zeros,
        with every strategy and on any number of ranks. Weight decay and momentum then move it like
        all others.

        Args:
            parameters: the parameters to read.

        Raises:
            ConfigError: for a frozen parameter with a gradient: it was trained when the model was
                wrapped or the accumulator was made.
        """
        found = []
        for parameter in parameters:
            if parameter.grad is None:
                if not parameter.requires_grad:
                    continue
                parameter.grad = torch.zeros_like(parameter)
            elif not parameter.requires_grad:
                raise ConfigError(
                    f"A parameter of shape {list(parameter.shape)} got a gradient although it is "
                    "frozen: it was trained when the model was wrapped or the accumulator was "
                    "made. Freeze parameters before that, or wrap the model and make the "
                    "accumulator again."
                )
            found.append(parameter.grad)
        return found

    def abort(self) -> None:
        """Discard everything that an unfinished window has left behind.

        Call it on all ranks, or exit the process.
        """
        if self.sums is not None:
            self.sums.clear()
        self.statistics.forget()
        for parameter in self.model.parameters():
            parameter.grad = None

    def forecast(self, num_rounds: int) -> Traffic:
        """Forecast the traffic of one window, without the small collective by which ranks agree.

        Args:
            num_rounds: micro-batches per rank, padding included.
        """
        traffic = self.gradient_traffic(num_rounds)
        if self.world.group is not None:
            pooled = [self.statistics.num_bytes] if self.statistics.num_bytes else []
            sizes = collectives(self.model) * num_rounds + pooled
            traffic += Traffic.of(("all_reduce", size) for size in sizes)
        return traffic

    @abstractmethod
    def gradient_traffic(self, num_rounds: int) -> Traffic:
        """Forecast the part of a window's traffic that carries gradients and parameters.

        Args:
            num_rounds: micro-batches per rank, padding included.
        """

    @contextmanager
    def evaluating(self) -> Iterator[nn.Module]:
        """Return a context for evaluation, which yields the model in evaluation mode.

        Gradients are off inside. All ranks must enter it, and must run the same number of forwards.
        On exit every module gets its former mode back.
        """
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
        """Return the module to call outside of training."""
        return self.model

    def refuse(self, name: StrategyName, reason: str) -> None:
        """Raise ConfigError unless this strategy supports its sync policy.

        Args:
            name: the name of this strategy.
            reason: why it does not support the other policies, for the message.
        """
        kept = POLICIES[name]
        if self.sync not in kept:
            raise ConfigError(
                f"sync='{self.sync.value}' is not supported by {name.value}: {reason}. Use "
                f"{' or '.join(repr(policy.value) for policy in kept)} (accum.sync on the command "
                "line)."
            )
