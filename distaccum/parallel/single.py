"""Accumulates gradients on one process, which sends nothing."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from torch import nn

from distaccum.core.strategies import Sync
from distaccum.core.traffic import Traffic
from distaccum.grads.accumulate import GradientDtypes, GradientSums
from distaccum.parallel.base import Strategy
from distaccum.parallel.world import World


class Single(Strategy):
    """Accumulates gradients in a plain module on one process.

    Every sync policy is accepted, because there is nothing to send.
    """

    def __init__(
        self,
        model: nn.Module,
        world: World,
        sync: Sync,
        dtypes: GradientDtypes,
        others: Sequence[nn.Parameter] = (),
    ) -> None:
        """Prepare the sums of a plain module's gradients; the module is not wrapped.

        Args:
            model: the module.
            world: one process.
            sync: any sync policy.
            dtypes: the dtypes in which gradients are summed.
            others: trained parameters outside of the model, such as those of a criterion.
        """
        super().__init__(model, world, Sync.boundary if sync is Sync.auto else sync, dtypes)
        parameters = [*model.parameters(), *others]
        if not dtypes.are_own(parameters):
            self.sums = GradientSums(parameters, dtypes)

    def micro_batch(self, *, first: bool, last: bool) -> AbstractContextManager[None]:
        """Return an empty context, because one process has no sync flags to set."""
        return nullcontext()

    def gradient_traffic(self, num_rounds: int) -> Traffic:
        """Return an empty forecast, because one process sends nothing."""
        return Traffic()
