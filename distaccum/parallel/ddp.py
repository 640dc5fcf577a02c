"""Accumulates gradients under DDP, which all-reduces each one once, with the last micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from distaccum import _torch
from distaccum.core.strategies import StrategyName, Sync
from distaccum.core.traffic import Traffic, replicated
from distaccum.errors import ConfigError
from distaccum.grads.accumulate import GradientDtypes, GradientSums
from distaccum.parallel.base import Strategy
from distaccum.parallel.world import World


class DDP(Strategy):
    """Accumulates gradients in a DistributedDataParallel module, ours or the user's.

    DDP accumulates and reduces in the parameters' dtype. This class does both itself if another
    dtype is requested, and for bf16 and fp16 parameters, whose sums need float32.
    """

    model: DistributedDataParallel
    sends_at_once = True

    def __init__(
        self,
        model: DistributedDataParallel,
        world: World,
        sync: Sync,
        dtypes: GradientDtypes,
        apart: bool,
    ) -> None:
        """Check that this DDP module can accumulate gradients, and prepare its reduction.

        Args:
            model: the DDP module.
            world: the ranks of its process group.
            sync: the sync policy; `auto` means `boundary`.
            dtypes: the dtypes in which gradients are summed.
            apart: whether micro-batches send nothing and all gradients are sent after the window.

        Raises:
            ConfigError: if the policy is not supported, or if DDP was made with an argument that
                makes accumulation wrong.
        """
        super().__init__(model, world, Sync.boundary if sync is Sync.auto else sync, dtypes)
        self.refuse(StrategyName.ddp, "every rank holds all parameters whole")
        obstacle = _torch.ddp_obstacle(model)
        if obstacle is not None:
            raise ConfigError(
                f"This DistributedDataParallel cannot accumulate gradients: {obstacle}. Wrap the "
                "model without it. For bf16 use autocast inside the objective, or FSDP2's "
                "MixedPrecisionPolicy."
            )
        apart = apart or not dtypes.are_own(model.parameters())
        self.first_window_differs = not apart  # DDP rebuilds its buckets after that window
        self.grad_scale = 1.0 if apart else float(world.size)  # DDP's own reduction divides by it
        self._know_reducer()
        if apart:
            if model.static_graph:
                raise ConfigError(
                    "static_graph=True needs DDP's own reduction, but here gradients are sent "
                    "after the window: they are summed in another dtype than the parameters', or "
                    "agree_on_oom is set. Wrap the model without static_graph."
                )
            self.sums = GradientSums(
                model.parameters(), dtypes, model.process_group, reduce_each=self.sync is Sync.every
            )  # fmt: skip

    def micro_batch(self, *, first: bool, last: bool) -> AbstractContextManager[None]:
        """Return a context in which DDP synchronizes only if this micro-batch must send gradients.

        DDP reads its flag in the forward. A micro-batch that must send gradients raises ConfigError
        on exit if its forward bypassed the DDP module.

        Args:
            first: whether this is the first micro-batch of the window.
            last: whether this is the last one.
        """
        self._windows_begun += first
        return _torch.ddp_synchronises(self.model, self.sums is None and self._synced(first, last))

    def owned(self) -> list[nn.Parameter] | None:
        """List the parameters that are reduced, which may differ from those that are trained now.

        DDP reduces those that were trained when it was made. Our own sums reduce those that were
        trained when this object was made.
        """
        return self._reduced if self.sums is None else self.sums.parameters

    def after_micro_batch(self) -> None:
        """Finish DDP's reduction, and add the gradients of one backward to the sums.

        Parameters that the backward did not reach contribute zeros to the reduction.
        """
        if self.sums is None:
            _torch.ddp_complete(self.model, self._reduced)
        super().after_micro_batch()

    def deliver(self) -> None:
        """Finish DDP's reduction and complete the gradients; call it once after the last backward.

        The last backward may have been run in parts.
        """
        if self.sums is None:
            _torch.ddp_complete(self.model, self._reduced)
        super().deliver()

    def tail_obstacle(self, blocks: Sequence[nn.Module]) -> str | None:
        """Return why DDP cannot compute the last micro-batches block by block, or None if it can.

        DDP itself must send each bucket, as soon as the gradients in it are complete.

        Args:
            blocks: the model's blocks, in their order.
        """
        if _torch.has_hooks(self.model.parameters()):
            return (
                "a parameter has hooks, which would miss the gradients that are added outside of "
                "autograd"
            )
        if self.model.find_unused_parameters or self.model.static_graph:
            return "find_unused_parameters and static_graph need the whole graph of a micro-batch"
        return (
            "sync='every' reduces in each micro-batch"
            if self.sync is Sync.every
            else super().tail_obstacle(blocks)
        )

    def abort(self) -> None:
        """Discard an unfinished window and replace DDP's reducer, which cannot be used again."""
        super().abort()
        _torch.reset_ddp(self.model)
        self._know_reducer()

    def gradient_traffic(self, num_rounds: int) -> Traffic:
        """Forecast the all-reduces of one window from the buckets that DDP has now.

        DDP rebuilds its buckets once, after its first synchronized backward, so the first window is
        forecast with the first buckets. Parameters that were frozen or unfrozen since DDP was made
        change nothing: DDP sends what it was made for.

        Args:
            num_rounds: micro-batches per rank, padding included.
        """
        if self.sums is not None:
            messages = self.sums.messages()
            buckets = [len(messages)] * (num_rounds if self.sync is Sync.every else 1)
            return Traffic.total(replicated(sum(messages), buckets, 0, 0, self.world.size))
        synced = sum(
            self._synced(first=i == 0, last=i == num_rounds - 1) for i in range(num_rounds)
        )
        buckets = [_torch.ddp_buckets(self.model)] * synced
        if self._windows_begun <= 1:
            buckets[:1] = [self._first_buckets]
        if self.model.static_graph:
            maps = 1 if self._windows_begun <= 1 else 0
        else:
            maps = synced if self.model.find_unused_parameters else 0
        num_bytes = sum(p.numel() * p.element_size() for p in self._reduced)
        return Traffic.total(
            replicated(num_bytes, buckets, len(self._reduced), maps, self.world.size)
        )

    @property
    def evaluation_model(self) -> nn.Module:
        """Return the module inside DDP.

        DDP's own forward would broadcast buffers, and ranks may evaluate different amounts of data.
        """
        inner: nn.Module = self.model.module
        return inner

    def _know_reducer(self) -> None:
        """Record the buckets and parameters of a new reducer."""
        self._windows_begun = 0
        self._first_buckets = _torch.ddp_buckets(self.model)
        self._reduced = _torch.ddp_parameters(self.model)

    def _synced(self, first: bool, last: bool) -> bool:
        # The first backward of a static graph must be synchronized. The result is still exact: this
        # makes gradients equal on all ranks, and the mean over ranks that the last backward takes
        # does not change equal numbers. It only adds up what has come since.
        warm_up = first and self.model.static_graph and self._windows_begun <= 1
        return last or warm_up or self.sync is Sync.every
