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
import torch.nn.functional as F
from torch import Tensor, nn

from distaccum.errors import ConfigError

LossSum = Tensor | Mapping[str, Tensor]  # [] floating point, one a term
Weight = int | float | Mapping[str, int] | Mapping[str, float]

SINGLE_TERM = "loss"  # the name of the term where an objective has only one


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


@dataclass(frozen=True)
class CausalLM:
    """Cross entropy of the next token, summed over the tokens whose label counts, in nats.

    The micro is a mapping with `input_ids` int64 [B, T] and `labels` int64 [B, T], or such a pair. The model takes
    `input_ids` and returns logits [B, T, V], or an object that has them as `.logits`.
    """

    shift: bool = True  # labels stand at their own positions, as in Hugging Face; False: they are the next tokens already
    ignore_index: int = -100

    def loss_sum(self, model: nn.Module, micro: Any) -> Tensor:
        """The sum [] of the tokens' cross entropies, float32 or wider."""
        input_ids, labels = _inputs_and_labels(micro, "input_ids")
        logits = _logits(model(input_ids))
        if self.shift:
            logits, labels = logits[:, :-1], labels[:, 1:]
        return F.cross_entropy(
            _wide(logits.flatten(0, 1)), labels.flatten(), ignore_index=self.ignore_index, reduction="sum"
        )

    def weight(self, micro: Any) -> int:
        """The number of labels that count."""
        labels = _inputs_and_labels(micro, "input_ids")[1]
        return int(((labels[:, 1:] if self.shift else labels) != self.ignore_index).sum())


@dataclass(frozen=True)
class Classification:
    """Cross entropy summed over samples. Micro: `inputs` [B, ...] and `labels` int64 [B]; model: logits [B, C]."""

    ignore_index: int = -100

    def loss_sum(self, model: nn.Module, micro: Any) -> Tensor:
        """The sum [] of the samples' cross entropies, float32 or wider."""
        inputs, labels = _inputs_and_labels(micro, "inputs")
        return F.cross_entropy(_wide(_logits(model(inputs))), labels, ignore_index=self.ignore_index, reduction="sum")

    def weight(self, micro: Any) -> int:
        """The number of labels that count."""
        return int((_inputs_and_labels(micro, "inputs")[1] != self.ignore_index).sum())


@dataclass(frozen=True)
class Regression:
    """Squared error summed over all numbers. Micro: `inputs` [B, ...] and `labels` of the model's output shape."""

    def loss_sum(self, model: nn.Module, micro: Any) -> Tensor:
        """The sum [] of squared errors, float32 or wider."""
        inputs, labels = _inputs_and_labels(micro, "inputs")
        outputs = _wide(_logits(model(inputs)))
        if outputs.shape != labels.shape:  # broadcasting would count other numbers than the weight does
            raise ConfigError(f"Regression: the model returned {list(outputs.shape)}, labels are {list(labels.shape)}.")
        return F.mse_loss(outputs, labels.to(outputs.dtype), reduction="sum")

    def weight(self, micro: Any) -> int:
        """The number of numbers."""
        return int(_inputs_and_labels(micro, "inputs")[1].numel())


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
        number = float(value)
        if not math.isfinite(number) or number < 0:
            raise ConfigError(
                f"The objective's weight for '{name}' is {number}. It says how much was counted in a micro-batch "
                "(tokens, samples) and must be finite and not negative: return a count such as (labels != -100).sum()."
            )
        checked[name] = number
    return checked


def sums_of(objective: SupportsObjective, model: nn.Module, micro: Any, terms: Sequence[str]) -> list[Tensor]:
    """Run the forward and return the loss sums [] in the order of `terms`.

    Raises:
        ConfigError: for a sum that is not a scalar, has no graph, or terms other than the weight's.
    """
    result = objective.loss_sum(model, micro)
    sums = dict(result) if isinstance(result, Mapping) else {SINGLE_TERM: result}
    if sorted(sums) != sorted(terms):
        raise ConfigError(
            f"The objective's loss_sum returned the terms {sorted(sums)}, its weight {sorted(terms)}. "
            "Return a tensor and a number, or two dicts with the same keys."
        )
    for name, value in sums.items():
        if not isinstance(value, Tensor) or value.ndim != 0:
            got = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ConfigError(
                f"The objective's loss_sum for '{name}' is of {got}. It must be one number, the sum over everything "
                "counted in the micro-batch: use reduction='sum', or end with .sum()."
            )
    if torch.is_grad_enabled() and not any(value.requires_grad for value in sums.values()):
        raise ConfigError(
            "The objective's loss_sum does not depend on any parameter that is trained (it has no graph). "
            "Compute it from the model's output, without .item() or torch.no_grad()."
        )
    return [sums[name] for name in terms]


@dataclass(frozen=True)
class Denominator:
    """The weights of a window over all micros and ranks. Nothing else in this package divides by a count."""

    weights: Mapping[str, float]

    @property
    def counts(self) -> bool:
        """Whether anything was counted at all; a window in which nothing was is skipped."""
        return any(weight > 0 for weight in self.weights.values())

    def divide(self, sums: Sequence[Tensor]) -> Tensor:
        """This micro-batch's share [] of the window's loss. A term with global weight 0 adds nothing (but its graph)."""
        shares = [s / w if w > 0 else s * 0.0 for s, w in zip(sums, self.weights.values(), strict=True)]
        return torch.stack(shares).sum() if len(shares) > 1 else shares[0]

    def means(self, sums: Sequence[float]) -> dict[str, float]:
        """The weighted mean of each term from its sum over all micros and ranks."""
        pairs = zip(self.weights.items(), sums, strict=True)
        return {name: value / weight if weight > 0 else 0.0 for (name, weight), value in pairs}


def _inputs_and_labels(micro: Any, inputs: str) -> tuple[Tensor, Tensor]:
    if isinstance(micro, Mapping) and inputs in micro and "labels" in micro:
        return micro[inputs], micro["labels"]
    if isinstance(micro, tuple | list) and len(micro) == 2:
        return micro[0], micro[1]
    got = f"a mapping with {sorted(micro)}" if isinstance(micro, Mapping) else type(micro).__name__
    raise ConfigError(
        f"This objective needs a micro-batch with '{inputs}' and 'labels', or a pair of them; got {got}. "
        "Rename the columns, or write an Objective(loss_sum, weight) of your own."
    )


def _logits(output: Any) -> Tensor:
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise ConfigError(f"The model returned {type(output).__name__}; expected logits, or an object with .logits.")
    return logits


def _wide(tensor: Tensor) -> Tensor:
    """Float32 at least: a sum over many tokens in bf16 loses the small ones."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor
