"""Defines objectives, and the only place where a loss sum is divided by a count.

A loss is a sum over everything that is counted in a micro-batch (tokens, samples). Its denominator
is how much was counted. The loss of a window is the sum over all micro-batches and ranks, divided
by the denominator over all micro-batches and ranks. It is never a mean of means.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from distaccum.errors import ConfigError

LossSum = Tensor | Mapping[str, Tensor]  # a floating-point scalar [], or one per term
# how much was counted, or one number per term
Amount = int | float | Mapping[str, int] | Mapping[str, float]

SINGLE_TERM = "loss"  # the name of the term if an objective has only one


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which to sum many numbers of a dtype: float32 or wider.

    A long sum in bfloat16 or float16 stalls, because small numbers no longer change a large sum.
    """
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def widened(tensor: Tensor) -> Tensor:
    """Convert a bfloat16 or float16 tensor to float32, and return any other tensor unchanged."""
    return tensor.to(wide(tensor.dtype))


class SupportsObjective(Protocol):
    """Defines the two methods that an accumulator needs of an objective."""

    def loss_sum(self, model: nn.Module, micro_batch: Any, /) -> LossSum:
        """Return the loss [] summed over everything counted in this micro-batch, with its graph.

        An objective with several terms returns a dict of one sum per term. The sums are those of
        this rank only.
        """
        ...

    def denominator(self, micro_batch: Any, /) -> Amount:
        """Return how much is counted in this micro-batch, computed from the batch alone.

        It is called on the host, before the forward. An objective with several terms returns a dict
        of one number per term.
        """
        ...


@dataclass(frozen=True)
class Objective:
    """Makes an objective of two functions of your own.

    With several terms, both functions return dicts with the same keys.
    """

    # (model, micro-batch) -> loss summed over everything counted
    loss_sum: Callable[[nn.Module, Any], LossSum]
    denominator: Callable[[Any], Amount]  # (micro-batch) -> how much was counted


def denominators_of(objective: SupportsObjective, micro_batch: Any) -> dict[str, float]:
    """Return the checked denominators of one micro-batch, by term.

    Raises:
        ConfigError: for a denominator that is negative, not finite or not a number.
    """
    return checked_denominators(objective.denominator(micro_batch))


def checked_denominators(denominator: Amount) -> dict[str, float]:
    """Check a denominator and return it as a dict of floats, by term.

    Raises:
        ConfigError: for a denominator that is negative, not finite or not a number.
    """
    terms = denominator if isinstance(denominator, Mapping) else {SINGLE_TERM: denominator}
    checked = {}
    for name, value in terms.items():
        try:
            number = float(value)
        except (TypeError, ValueError, RuntimeError):
            number = math.nan
        if not math.isfinite(number) or number < 0:
            raise ConfigError(
                f"The objective's denominator for '{name}' is {_shown(value)}. It says how much "
                "was counted in a micro-batch (tokens, samples) and must be finite and not "
                "negative. Return a count such as (labels != -100).sum()."
            )
        checked[name] = number
    return checked


def sums_of(
    objective: SupportsObjective, model: nn.Module, micro_batch: Any, terms: Sequence[str]
) -> list[Tensor]:
    """Run the forward of one micro-batch and return its loss sums [] in the order of `terms`.

    Raises:
        ConfigError: for a sum that is not a scalar, has 16 bits or has no graph, and for terms that
            differ from the denominator's.
    """
    result = objective.loss_sum(model, micro_batch)
    # the cheap check comes first
    several = not isinstance(result, Tensor) and isinstance(result, Mapping)
    sums: dict[str, Any] = dict(result) if several else {SINGLE_TERM: result}
    if sums.keys() != set(terms):
        raise ConfigError(
            f"The objective's loss_sum returned the terms {sorted(sums)}, but its denominator "
            f"{sorted(terms)}. Return a tensor and a number, or two dicts with the same keys."
        )
    has_graph = not torch.is_grad_enabled()
    for name, value in sums.items():
        if not isinstance(value, Tensor) or value.ndim:
            logs = (
                " Return only the sum: report the count from denominator(), and log other values "
                "yourself."
            )
            raise ConfigError(
                f"The objective's loss_sum for '{name}' is {_shown(value)}. It must be one number, "
                "the sum over everything counted in the micro-batch: use reduction='sum', or end "
                f"with .sum().{logs if isinstance(value, tuple) else ''}"
            )
        if value.itemsize < 4:
            # 1 / denominator is rounded to the dtype of the sum, and with it every gradient.
            raise ConfigError(
                f"The objective's loss_sum for '{name}' has dtype {value.dtype}, in which the "
                "division by the count has an error of up to 0.4%, and every gradient with it. Sum "
                "in float32: losses.float().sum(), or give logits.float() to the loss."
            )
        has_graph = has_graph or value.requires_grad
    if not has_graph:
        raise ConfigError(
            "The objective's loss_sum does not depend on any trained parameter (it has no graph). "
            "Compute it from the model's output, without .item() or torch.no_grad()."
        )
    return [sums[name] for name in terms]


def _shown(value: object) -> str:
    """Describe what an objective returned, for an error message."""
    if isinstance(value, Tensor) and value.ndim:
        return f"a tensor of shape {list(value.shape)}"
    return (
        repr(value)
        if value is None or isinstance(value, int | float | str | Tensor)
        else f"a {type(value).__name__}"
    )


@dataclass(frozen=True)
class Denominator:
    """Holds the denominators of a window and divides by them.

    No other code in this package divides by a count.
    """

    by_term: Mapping[str, float]  # each summed over all micro-batches and ranks of the window

    @property
    def counts(self) -> bool:
        """Return whether anything was counted; a window in which nothing was counted is skipped."""
        return any(denominator > 0 for denominator in self.by_term.values())

    def gradient(self, sums: Sequence[Tensor], factor: float) -> Tensor:
        """Return the gradient of the window's loss with respect to one micro-batch's loss sums.

        A term whose global denominator is 0 gets 0.

        Args:
            sums: the micro-batch's loss sum [] of each term.
            factor: what the gradient is multiplied by.

        Returns:
            The gradient with respect to `joined(sums)`: [] for one term, [terms] for several.
        """
        # The division is the first step of the chain rule. Done here, it needs no graph.
        pairs = zip(sums, self.by_term.values(), strict=True)
        return joined([torch.full_like(s, factor / d if d > 0 else 0.0) for s, d in pairs])

    def means(self, sums: Sequence[float]) -> dict[str, float]:
        """Divide each term's sum over all micro-batches and ranks by its denominator.

        A term whose denominator is 0 gets 0.
        """
        pairs = zip(self.by_term.items(), sums, strict=True)
        return {
            name: value / denominator if denominator > 0 else 0.0
            for (name, denominator), value in pairs
        }


def joined(terms: Sequence[Tensor]) -> Tensor:
    """Join scalars into one tensor: [] for one scalar, [terms] for several."""
    return terms[0] if len(terms) == 1 else torch.stack(tuple(terms))
