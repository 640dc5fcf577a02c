"""One process: nothing travels."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from torch import nn

from distaccum.grads.accumulate import GradientDtypes, GradientSums
from distaccum.parallel.base import Strategy, Sync
from distaccum.parallel.ledger import Traffic
from distaccum.parallel.world import World


class Single(Strategy):
    """A plain module on one process. Every policy is kept: there is nothing to send."""

    def __init__(
        self,
        model: nn.Module,
        world: World,
        sync: Sync,
        dtypes: GradientDtypes,
        others: Sequence[nn.Parameter] = (),
    ) -> None:
        """Wrap nothing. `others` are trained parameters outside of the model, such as a criterion's."""
        super().__init__(model, world, Sync.boundary if sync is Sync.auto else sync, dtypes)
        parameters = [*model.parameters(), *others]
        if not dtypes.are_own(parameters):
            self.sums = GradientSums(parameters, dtypes)

    def micro(self, *, first: bool, last: bool) -> AbstractContextManager[None]:
        """Nothing to set."""
        return nullcontext()

    def gradient_traffic(self, num_rounds: int) -> Traffic:
        """Nothing."""
        return Traffic()
