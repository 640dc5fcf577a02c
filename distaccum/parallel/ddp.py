"""DistributedDataParallel: each gradient is all-reduced once, with the last micro."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from distaccum import _torch
from distaccum.errors import ConfigError
from distaccum.grads.accumulate import GradientDtypes, GradientSums
from distaccum.parallel.base import Strategy, Sync
from distaccum.parallel.ledger import Traffic
from distaccum.parallel.world import World


class DDP(Strategy):
    """A DistributedDataParallel module, ours or the user's.

    DDP accumulates and reduces in the parameters' dtype. Where another is asked for, and for bf16 and fp16 parameters,
    which need float32, both are done here.
    """

    model: DistributedDataParallel
    sends_at_once = True

    def __init__(
        self, model: DistributedDataParallel, world: World, sync: Sync, dtypes: GradientDtypes, apart: bool
    ) -> None:
        """Refuse what torch's DDP cannot accumulate; `apart`: no micro sends anything, all travels after the window."""
        super().__init__(model, world, Sync.boundary if sync is Sync.auto else sync, dtypes)
        self.refuse((Sync.boundary, Sync.every), "its parameters are whole on every rank")
        obstacle = _torch.ddp_obstacle(model)
        if obstacle is not None:
            raise ConfigError(
                f"This DistributedDataParallel cannot accumulate gradients: {obstacle}. Wrap the model without it; "
                "for bf16 use autocast inside the objective, or FSDP2's MixedPrecisionPolicy."
            )
        apart = apart or not dtypes.are_own(model.parameters())
        self.first_window_differs = not apart  # it arranges its buckets anew
        self._know_reducer()
        if apart:
            if model.static_graph:
                raise ConfigError(
                    "static_graph=True needs DDP's own reduction, and here gradients travel after the window: they are "
                    "summed in another dtype than the parameters', or agree_on_oom is set. Wrap without static_graph."
                )
            self.grad_scale = 1.0  # this reduction delivers sums, not DDP's means
            self.sums = GradientSums(
                model.parameters(), dtypes, model.process_group, reduce_each=self.sync is Sync.every
            )  # fmt: skip

    def micro(self, *, first: bool, last: bool) -> AbstractContextManager[None]:
        """Let DDP synchronise with the boundary only, where a forward past DDP is refused. It reads the flag there."""
        self._windows_begun += first
        return _torch.ddp_synchronises(self.model, self.sums is None and self._synced(first, last))

    def owned(self) -> list[nn.Parameter] | None:
        """List what DDP's reducer was made for: parameters thawed or added since are not among them."""
        return self._reduced if self.sums is None else self.sums.parameters

    def after_micro(self) -> None:
        """As for all strategies; parameters that the backward did not reach add zeros to what was sent."""
        if self.sums is None:
            _torch.ddp_complete(self.model, self._reduced)
        super().after_micro()

    def deliver(self) -> None:
        """As for all strategies; the last backward may have been run in parts."""
        if self.sums is None:
            _torch.ddp_complete(self.model, self._reduced)
        super().deliver()

    def tail_obstacle(self, blocks: Sequence[nn.Module]) -> str | None:
        """DDP must send each bucket itself, as soon as its gradients are complete."""
        if _torch.has_hooks(self.model.parameters()):
            return "a parameter has hooks, which would miss the gradients that are added past autograd"
        if self.model.find_unused_parameters or self.model.static_graph:
            return "find_unused_parameters and static_graph look through the whole graph of a micro-batch"
        return "sync='every' sends with each micro-batch" if self.sync is Sync.every else super().tail_obstacle(blocks)

    def abort(self) -> None:
        """A reducer whose backward was interrupted is replaced."""
        super().abort()
        _torch.reset_ddp(self.model)
        self._know_reducer()

    def gradient_traffic(self, num_rounds: int) -> Traffic:
        """Buckets as DDP has them now; it arranges them anew once, after its first synchronised backward.

        What was frozen or thawed since DDP was made changes nothing: it sends what it was made for.
        """
        if self.sums is not None:
            reductions = num_rounds if self.sync is Sync.every else 1
            return Traffic.of([("all_reduce", size) for size in self.sums.messages()] * reductions)
        synced = sum(self._synced(first=i == 0, last=i == num_rounds - 1) for i in range(num_rounds))
        num_bytes = sum(p.numel() * p.element_size() for p in self._reduced)
        layouts = [_torch.ddp_buckets(self.model)] * synced
        if self._windows_begun <= 1:
            layouts[:1] = [self._first_buckets]
        entries = [e for n in layouts for e in [("all_reduce", 0)] * (n - 1) + [("all_reduce", num_bytes)]]
        if self.model.static_graph:
            told = 1 if self._windows_begun <= 1 else 0
        else:
            told = synced if self.model.find_unused_parameters else 0
        used = ("all_reduce", 4 * len(self._reduced))  # which parameters were used, int32
        return Traffic.of(entries + [used] * told)

    @property
    def evaluation_model(self) -> nn.Module:
        """The module inside: DDP's forward would broadcast buffers, and ranks may evaluate different amounts."""
        inner: nn.Module = self.model.module
        return inner

    def _know_reducer(self) -> None:
        """Note what a new reducer begins with."""
        self._windows_begun = 0
        self._first_buckets = _torch.ddp_buckets(self.model)
        self._reduced = _torch.ddp_parameters(self.model)

    def _synced(self, first: bool, last: bool) -> bool:
        # The first backward of a static graph must be synchronised. That is exact as well: the mean over ranks of what
        # is the same on all ranks is itself, so only what was added since is summed later.
        warm_up = first and self.model.static_graph and self._windows_begun <= 1
        return last or warm_up or self.sync is Sync.every
