"""Objectives: what is summed, what is counted, and the one place where a sum is divided by a count.

A loss is a sum over everything counted in a micro-batch; its weight is how much was counted. The window's loss is the
sum over all micros and ranks divided by the weight of all micros and ranks: never a mean of means.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from distaccum.errors import ConfigError

LossSum = Tensor | Mapping[str, Tensor]  # [] floating point, one a term
Weight = int | float | Mapping[str, int] | Mapping[str, float]

SINGLE_TERM = "loss"  # the name of the term where an objective has only one


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which a sum of many such numbers does not stall: float32, or `dtype` where that is wider."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def widened(tensor: Tensor) -> Tensor:
    """Return a tensor in the dtype that `wide` names; the tensor itself where it has that dtype already."""
    return tensor.to(wide(tensor.dtype))


class SupportsObjective(Protocol):
    """What an accumulator asks of an objective."""

    def loss_sum(self, model: nn.Module, micro: Any, /) -> LossSum:
        """The sum [] over everything counted in this micro-batch, or one sum a term. With a graph; not reduced."""
        ...

    def weight(self, micro: Any, /) -> Weight:
        """How much is counted in this micro-batch, from the batch alone: called on the host, before the forward."""
        ...


@dataclass(frozen=True)
class Objective:
    """An objective of two functions of your own. Several terms: both return dicts with the same keys."""

    loss_sum: Callable[[nn.Module, Any], LossSum]
    weight: Callable[[Any], Weight]


def weights_of(objective: SupportsObjective, micro: Any) -> dict[str, float]:
    """The weights of one micro-batch by term, checked.

    Raises:
        ConfigError: for a weight that is negative, not finite or not a number.
    """
    return checked_weights(objective.weight(micro))


def checked_weights(weight: Weight) -> dict[str, float]:
    """The same for a weight that is known without its micro-batch."""
    terms = weight if isinstance(weight, Mapping) else {SINGLE_TERM: weight}
    checked = {}
    for name, value in terms.items():
        try:
            number = float(value)
        except (TypeError, ValueError, RuntimeError):
            number = math.nan
        if not math.isfinite(number) or number < 0:
            raise ConfigError(
                f"The objective's weight for '{name}' is {_shown(value)}. It says how much was counted in a "
                "micro-batch (tokens, samples) and must be finite and not negative: return a count such as (labels != "
                "-100).sum()."
            )
        checked[name] = number
    return checked


def sums_of(objective: SupportsObjective, model: nn.Module, micro: Any, terms: Sequence[str]) -> list[Tensor]:
    """Run the forward and return the loss sums [] in the order of `terms`.

    Raises:
        ConfigError: for a sum that is not a scalar, has no graph, or terms other than the weight's.
    """
    result = objective.loss_sum(model, micro)
    several = not isinstance(result, Tensor) and isinstance(result, Mapping)  # the quick question first
    sums: dict[str, Any] = dict(result) if several else {SINGLE_TERM: result}
    if sums.keys() != set(terms):
        raise ConfigError(
            f"The objective's loss_sum returned the terms {sorted(sums)}, its weight {sorted(terms)}. "
            "Return a tensor and a number, or two dicts with the same keys."
        )
    has_graph = not torch.is_grad_enabled()
    for name, value in sums.items():
        if not isinstance(value, Tensor) or value.ndim:
            logs = " Return only the sum: report the count from weight(), and log other values yourself."
            raise ConfigError(
                f"The objective's loss_sum for '{name}' is {_shown(value)}. It must be one number, the sum over "
                "everything counted in the micro-batch: use reduction='sum', or end with .sum()."
                f"{logs if isinstance(value, tuple) else ''}"
            )
        if value.itemsize < 4:
            # What is divided by is rounded to the dtype of the sum, and so is the whole gradient.
            raise ConfigError(
                f"The objective's loss_sum for '{name}' has dtype {value.dtype}; dividing it by the count is off by up "
                "to 0.4%, and every gradient with it. Sum in float32: losses.float().sum(), or give logits.float() to "
                "the loss."
            )
        has_graph = has_graph or value.requires_grad
    if not has_graph:
        raise ConfigError(
            "The objective's loss_sum does not depend on any parameter that is trained (it has no graph). "
            "Compute it from the model's output, without .item() or torch.no_grad()."
        )
    return [sums[name] for name in terms]


def _shown(value: object) -> str:
    if isinstance(value, Tensor) and value.ndim:
        return f"a tensor of shape {list(value.shape)}"
    return (
        repr(value) if value is None or isinstance(value, int | float | str | Tensor) else f"a {type(value).__name__}"
    )


@dataclass(frozen=True)
class Denominator:
    """The weights of a window over all micros and ranks. Nothing else in this package divides by a count."""

    weights: Mapping[str, float]

    @property
    def counts(self) -> bool:
        """Whether anything was counted at all; a window in which nothing was is skipped."""
        return any(weight > 0 for weight in self.weights.values())

    def gradient(self, sums: Sequence[Tensor], factor: float) -> Tensor:
        """Of the window's loss, times a factor, with respect to `joined(sums)`; 0 for a term with global weight 0."""
        # The division is the chain rule's first step: here it needs no graph.
        weights = self.weights.values()
        return joined([torch.full_like(s, factor / w if w > 0 else 0.0) for s, w in zip(sums, weights, strict=True)])

    def means(self, sums: Sequence[float]) -> dict[str, float]:
        """The weighted mean of each term from its sum over all micros and ranks."""
        pairs = zip(self.weights.items(), sums, strict=True)
        return {name: value / weight if weight > 0 else 0.0 for (name, weight), value in pairs}


def joined(terms: Sequence[Tensor]) -> Tensor:
    """One tensor of all terms: [] of one, [terms] of several."""
    return terms[0] if len(terms) == 1 else torch.stack(tuple(terms))
