"""One process: nothing travels."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch import nn

from distaccum.grads.accumulate import GradientDtypes, GradientSums
from distaccum.parallel.base import Strategy, Sync
from distaccum.parallel.ledger import Traffic
from distaccum.parallel.world import World


class Single(Strategy):
    """A plain module on one process. Every policy is kept: there is nothing to send."""

    def __init__(self, model: nn.Module, world: World, sync: Sync, dtypes: GradientDtypes) -> None:
        """Recognise nothing, wrap nothing."""
        super().__init__(model, world, Sync.boundary if sync is Sync.auto else sync, dtypes)
        if not dtypes.are_own(model.parameters()):
            self.sums = GradientSums(model.parameters(), dtypes)

    def micro(self, *, first: bool, last: bool) -> AbstractContextManager[None]:
        """Nothing to set."""
        return nullcontext()

    def gradient_traffic(self, num_rounds: int) -> Traffic:
        """Nothing."""
        return Traffic()
