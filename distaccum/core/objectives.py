"""Ready-made objectives: causal language models, classification, regression. They return sums and counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distaccum.core.loss import LossSum, Objective, SupportsObjective, widened
from distaccum.errors import ConfigError


@dataclass(frozen=True)
class CausalLM:
    """Cross entropy of the next token, summed over the tokens whose label counts, in nats.

    The micro is a mapping with `input_ids` int64 [B, T] and `labels` int64 [B, T], or such a pair. The model takes
    `input_ids` and returns logits [B, T, V], or an object that has them as `.logits`.
    """

    shift: bool = (
        True  # labels stand at their own positions, as in Hugging Face; False: they are the next tokens already
    )
    ignore_index: int = -100

    def loss_sum(self, model: nn.Module, micro: Any) -> Tensor:
        """The sum [] of the tokens' cross entropies, float32 or wider."""
        input_ids, labels = _inputs_and_labels(micro, "input_ids")
        logits = _logits(model(input_ids))
        if self.shift:
            logits, labels = logits[:, :-1], labels[:, 1:]
        return F.cross_entropy(
            widened(logits.flatten(0, 1)), labels.flatten(), ignore_index=self.ignore_index, reduction="sum"
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
        return F.cross_entropy(widened(_logits(model(inputs))), labels, ignore_index=self.ignore_index, reduction="sum")

    def weight(self, micro: Any) -> int:
        """The number of labels that count."""
        return int((_inputs_and_labels(micro, "inputs")[1] != self.ignore_index).sum())


@dataclass(frozen=True)
class ClassificationAccuracy:
    """For held-out samples: the loss of `Classification`, and the share of samples whose largest logit is the label."""

    ignore_index: int = -100

    def loss_sum(self, model: nn.Module, micro: Any) -> dict[str, Tensor]:
        """Sums [] over samples: cross entropy and the number that are right. The latter has no gradient."""
        inputs, labels = _inputs_and_labels(micro, "inputs")
        logits = widened(_logits(model(inputs)))
        loss = F.cross_entropy(logits, labels, ignore_index=self.ignore_index, reduction="sum")
        return {"loss": loss, "accuracy": (logits.argmax(dim=1) == labels).sum().to(loss.dtype)}

    def weight(self, micro: Any) -> dict[str, int]:
        """The number of labels that count, for both."""
        count = int((_inputs_and_labels(micro, "inputs")[1] != self.ignore_index).sum())
        return {"loss": count, "accuracy": count}


@dataclass(frozen=True)
class Regression:
    """Squared error summed over all numbers. Micro: `inputs` [B, ...] and `labels` of the model's output shape."""

    def loss_sum(self, model: nn.Module, micro: Any) -> Tensor:
        """The sum [] of squared errors, float32 or wider."""
        inputs, labels = _inputs_and_labels(micro, "inputs")
        outputs = widened(_logits(model(inputs)))
        if outputs.shape != labels.shape:  # broadcasting would count other numbers than the weight does
            raise ConfigError(f"Regression: the model returned {list(outputs.shape)}, labels are {list(labels.shape)}.")
        return F.mse_loss(outputs, labels.to(outputs.dtype), reduction="sum")

    def weight(self, micro: Any) -> int:
        """The number of numbers."""
        return int(_inputs_and_labels(micro, "inputs")[1].numel())


def autocast(objective: SupportsObjective, dtype: torch.dtype) -> Objective:
    """An objective whose forward computes matrix products in bfloat16 or float16, for parameters in float32.

    Float16 also needs `Accumulator(..., loss_scale=LossScale())`. FSDP2 casts by its own MixedPrecisionPolicy instead.
    """

    def loss_sum(model: nn.Module, micro: Any) -> LossSum:
        with torch.autocast(next(model.parameters()).device.type, dtype):
            return objective.loss_sum(model, micro)

    return Objective(loss_sum, objective.weight)


def cast_inputs(objective: SupportsObjective, dtype: torch.dtype) -> Objective:
    """An objective that gives the model its floating-point inputs in a dtype; micros are mappings of tensors."""

    def loss_sum(model: nn.Module, micro: Mapping[str, Tensor]) -> LossSum:
        cast = {name: value.to(dtype) if value.is_floating_point() else value for name, value in micro.items()}
        return objective.loss_sum(model, cast)

    return Objective(loss_sum, objective.weight)


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
