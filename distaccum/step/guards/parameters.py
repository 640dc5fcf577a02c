"""Checks that a window completes the gradient of every trained parameter of the optimizer."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch import nn
from torch.optim import Optimizer

from distaccum.errors import ConfigError, StateWarning
from distaccum.parallel.base import Strategy


class Parameters:
    """Holds the parameters of one accumulator: the optimizer's, and the others of the model."""

    def __init__(self, optimizer: Optimizer, strategy: Strategy) -> None:
        """Check the optimizer's parameters, and warn of trained ones that it does not have.

        Raises:
            ConfigError: for parameters whose gradients would not be reduced over ranks.
        """
        self._optimizer = optimizer
        self._strategy = strategy
        self.renew()
        self.updated()
        unread = sum(parameter.requires_grad for parameter in self._others)
        if unread and strategy.world.rank == 0:
            warnings.warn(
                f"{unread} trainable parameter(s) of the model are not in the optimizer. Their "
                "gradients are computed, reduced and discarded in each window. If nothing else "
                "trains them, call requires_grad_(False) before wrapping the model.",
                StateWarning,
                stacklevel=3,
            )

    def renew(self) -> None:
        """Record which gradients the strategy completes; a new reducer of DDP changes that."""
        owned = self._strategy.owned()
        self._owned = None if owned is None else frozenset(map(id, owned))
        own = set(map(id, parameters_of(self._optimizer)))
        self._others = [p for p in self._strategy.model.parameters() if id(p) not in own]

    def updated(self) -> list[nn.Parameter]:
        """List the optimizer's parameters, in its order.

        Raises:
            ConfigError: for trained ones whose gradients would not be reduced over ranks, such as
                those of a parameter group that was added later.
        """
        parameters = parameters_of(self._optimizer)
        if self._owned is not None and not self._owned.issuperset(map(id, parameters)):
            _refuse_unowned(self._strategy.model, parameters, self._owned)
        return parameters

    def clear(self) -> None:
        """Clear all gradients, also those that no update reads and that would keep growing."""
        self._optimizer.zero_grad()
        for parameter in self._others:
            parameter.grad = None


def outside(model: nn.Module, optimizer: Optimizer) -> list[nn.Parameter]:
    """List the trained parameters of the optimizer that the model does not have.

    Raises:
        ConfigError: if none of its parameters belongs to the model.
    """
    own = {id(parameter) for parameter in model.parameters()}
    parameters = parameters_of(optimizer)
    if not any(id(parameter) in own for parameter in parameters):
        raise ConfigError(
            f"None of the optimizer's {len(parameters)} parameter(s) belongs to the model, so the "
            "model would not be trained. Make the optimizer after wrapping the model (fully_shard "
            "makes new parameters), and over the model.parameters() of this model, not of a copy."
        )
    return [
        parameter
        for parameter in parameters
        if id(parameter) not in own and parameter.requires_grad
    ]


def _refuse_unowned(
    model: nn.Module, parameters: Sequence[nn.Parameter], owned: frozenset[int]
) -> None:
    """Raise ConfigError for trained parameters whose gradients are not reduced over ranks."""
    strange = [p for p in parameters if id(p) not in owned and p.requires_grad]
    if not strange:
        return
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    known = [names[id(p)] for p in strange if id(p) in names]
    if known:
        raise ConfigError(
            f"{len(known)} trainable parameter(s), e.g. {known[0]}, would get the gradients of "
            "this rank only: they were frozen or missing when the model was wrapped, or "
            "DistributedDataParallel ignores them. Unfreeze or add parameters first, then wrap the "
            "model, then make the accumulator."
        )
    raise ConfigError(
        f"{len(strange)} trained parameter(s) of the optimizer are not in the wrapped model, the "
        f"first of shape {list(strange[0].shape)}, so their gradients would not be reduced over "
        "ranks. Put what they belong to (a criterion, a temperature) into the module that is "
        "wrapped, and compute the loss in its forward, or leave them out of the optimizer."
    )


def parameters_of(optimizer: Optimizer) -> list[nn.Parameter]:
    """List all parameters of an optimizer."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
