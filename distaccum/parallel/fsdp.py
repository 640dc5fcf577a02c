"""Accumulates under FSDP2, where each rank holds shards of parameters and gradients.

HSDP is FSDP2 on a 2-D mesh; it has no class of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from distaccum import _torch
from distaccum.core.strategies import StrategyName, Sync
from distaccum.core.traffic import GroupSizes, Traffic, sharded
from distaccum.errors import ConfigError
from distaccum.grads.accumulate import GradientDtypes, GradientSums
from distaccum.parallel.base import Strategy
from distaccum.parallel.sharded_checks import checked_mesh, refuse_other_dtypes
from distaccum.parallel.world import World


def shard_again(model: nn.Module) -> None:
    """Shard parameters that a forward without backward, such as an evaluation's, left gathered.

    Raises:
        ConfigError: for parameters that were frozen or unfrozen meanwhile, which FSDP2 would
            forget.
    """
    if names := _torch.changed_while_gathered(model):
        raise ConfigError(
            f"{len(names)} parameter(s), such as {names[0]}, were frozen or unfrozen while FSDP2 "
            "held the model gathered, as it does after an evaluation. FSDP2 forgets that when it "
            "shards the model again. Call requires_grad_() before the evaluation, or after it and "
            "after reshard() of each FSDP2 module."
        )
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


class FSDP(Strategy):
    """Accumulates gradients in a module to which `fully_shard` was applied."""

    sharded = True

    def __init__(self, model: nn.Module, world: World, sync: Sync, dtypes: GradientDtypes) -> None:
        """Refuse modules whose gradients would silently be wrong.

        The module is set to deliver sums over ranks. The flags of the sync policy are set later,
        per micro-batch.

        Args:
            model: the FSDP2 module.
            world: the ranks over which it is sharded.
            sync: the sync policy; `auto` means `boundary`.
            dtypes: the dtypes in which gradients are summed.

        Raises:
            ConfigError: for an unsupported policy, and for dtypes that differ from the module's.
        """
        reason = (
            "least memory of the policies that reduce once per window" if sync is Sync.auto else ""
        )
        sync = Sync.boundary if sync is Sync.auto else sync
        super().__init__(model, world, sync, dtypes, reason)
        assert isinstance(model, FSDPModule)
        self._module: FSDPModule = model
        self.communicates = True
        mesh = checked_mesh(model, world)  # 1-D, or 2-D (replicate, shard) for HSDP
        self._replicated = mesh.ndim == 2
        self._shards = mesh.size(-1)
        self.replicas = mesh.size(0) if self._replicated else 1
        name = StrategyName.hsdp if self._replicated else StrategyName.fsdp
        self.refuse(name, "a 1-D mesh has no replicas, so there is no all-reduce to postpone")
        refuse_other_dtypes(model, sync, dtypes)
        for module in model.modules():
            # Sums over ranks in place of means: the loss is divided.
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        # Ranks may use different parameters in a window, but all must reduce the same ones. With a
        # postponed all-reduce, a partial sum must not be added to that of another parameter.
        _torch.reduce_unused_parameters(model)
        if sync is Sync.every and not GradientDtypes(dtypes.accumulate).are_own(model.parameters()):
            # FSDP2 would add up the reduced shards of micro-batches in the parameter's dtype.
            self.sums = GradientSums(model.parameters(), dtypes)
        if sync is Sync.gather_once:
            model.set_reshard_after_forward(False)

    def micro_batch(self, *, first: bool, last: bool) -> AbstractContextManager[None]:
        """Set the flags that FSDP2 reads in this micro-batch's backward; return an empty context.

        The flags stay until the next micro-batch sets its own.

        Args:
            first: whether this is the first micro-batch of the window.
            last: whether this is the last one.
        """
        # An earlier forward without a backward (evaluation) would change what is gathered
        if first:
            shard_again(self.model)
            _torch.forget_forwards(self.model)
        # The order matters: this call also sets the all-reduce flag.
        self._module.set_requires_gradient_sync(
            last or self.sync in (Sync.every, Sync.reduce_scatter)
        )
        if self.sync is Sync.reduce_scatter:
            self._module.set_requires_all_reduce(last)
        if self.sync is Sync.gather_once:
            self._module.set_reshard_after_backward(last)
        self._module.set_is_last_backward(True)
        return nullcontext()

    def tail_obstacle(self, blocks: Sequence[nn.Module]) -> str | None:
        """Return why FSDP2 cannot compute the last micro-batches block by block, or None if it can.

        Parameters must stay gathered while each block is computed for several micro-batches.

        Args:
            blocks: the model's blocks, in their order.
        """
        if self.sync is not Sync.gather_once:
            return (
                f"sync='{self.sync.value}' gathers parameters for each micro-batch; "
                "sync='gather_once' does not"
            )
        if _torch.shared_group(self.model, blocks):
            return "two blocks are in one parameter group of FSDP2"
        return super().tail_obstacle(blocks)

    def tail_micro_batch(self, *, first: bool, last: bool) -> AbstractContextManager[None]:
        """Set FSDP2's flags for a micro-batch whose backward is run block by block.

        No gradient is reduced before `completing`. Only the very last backward waits for pending
        reductions.

        Args:
            first: whether this is the first micro-batch of the window.
            last: whether this is the last one.
        """
        entered = self.micro_batch(first=first, last=False)
        self._module.set_is_last_backward(False)
        return entered

    @contextmanager
    def completing(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        """Return a context for the backward in which modules reduce gradients and free parameters.

        The backward of the root's group is the last one.
        """
        parts = [module for module in modules if isinstance(module, FSDPModule)]
        self._module.set_is_last_backward(self._module in parts)
        for reduces in (True, False):
            for part in parts:
                part.set_requires_gradient_sync(reduces, recurse=False)
                part.set_reshard_after_backward(reduces, recurse=False)
            if reduces:
                yield

    def owned(self) -> list[nn.Parameter]:
        """List the sharded parameters, the only ones that FSDP2 reduces."""
        return [
            parameter for parameter in self.model.parameters() if isinstance(parameter, DTensor)
        ]

    def gradients(self, parameters: Iterable[nn.Parameter]) -> list[Tensor]:
        """Return the local shards of the delivered gradients, without padding."""
        return [
            gradient.to_local()
            for gradient in super().gradients(parameters)
            if isinstance(gradient, DTensor)
        ]

    def abort(self) -> None:
        """Discard an unfinished window, including what FSDP2 keeps outside of the parameters.

        That is unsharded sums, HSDP's partial sums, and a forward or backward that did not finish.
        """
        super().abort()
        _torch.clear_sharded_gradients(self.model)

    def gradient_traffic(self, num_rounds: int) -> Traffic:
        """Forecast the collectives of one window from FSDP2's parameter groups.

        Args:
            num_rounds: micro-batches per rank, padding included.
        """
        groups = [
            GroupSizes(group.gather_bytes, group.scatter_bytes, group.reduce_bytes, group.reshards)
            for group in _torch.sharded_groups(self.model)
        ]
        replicas = self.replicas if self._replicated else None
        return Traffic.total(sharded(groups, self.sync, num_rounds, self._shards, replicas))

    @contextmanager
    def evaluating(self) -> Iterator[nn.Module]:
        """Return a context for evaluation; on exit parameters are sharded again, with every policy.

        It yields the model in evaluation mode, and gradients are off inside. All ranks must enter
        it, and must run the same number of forwards.
        """
        with super().evaluating() as model:
            yield model
        shard_again(self.model)
