"""Provides objectives for causal language models, classification and regression.

They return sums and counts, never means.
"""

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
    """Sums the cross entropy of the next token, in nats, over the tokens whose label counts.

    A micro-batch is a mapping with `input_ids` int64 [B, T] and `labels` int64 [B, T], or the pair
    (input_ids, labels). The model takes `input_ids` and returns logits [B, T, V], or an object that
    has them as `.logits`.
    """

    # True: each label is at the position of its own token, as in Hugging Face.
    # False: each label is at the position of the token before it.
    shift: bool = True
    ignore_index: int = -100  # the label of tokens that do not count

    def loss_sum(self, model: nn.Module, micro_batch: Any) -> Tensor:
        """Return the sum [] of the tokens' cross entropies, in float32 or wider."""
        input_ids, labels = _inputs_and_labels(micro_batch, "input_ids")
        logits = _logits(model(input_ids))
        if self.shift:
            logits, labels = logits[:, :-1], labels[:, 1:]
        return F.cross_entropy(
            widened(logits.flatten(0, 1)),
            labels.flatten(),
            ignore_index=self.ignore_index,
            reduction="sum",
        )

    def denominator(self, micro_batch: Any) -> int:
        """Return the number of labels that count."""
        labels = _class_numbers(_inputs_and_labels(micro_batch, "input_ids")[1])
        return int(((labels[:, 1:] if self.shift else labels) != self.ignore_index).sum())


@dataclass(frozen=True)
class Classification:
    """Sums the cross entropy, in nats, over the samples whose label counts.

    A micro-batch is a mapping with `inputs` [B, ...] and `labels` int64 [B], or the pair (inputs,
    labels). The model takes `inputs` and returns logits [B, C], or an object that has them as
    `.logits`.
    """

    ignore_index: int = -100  # the label of samples that do not count

    def loss_sum(self, model: nn.Module, micro_batch: Any) -> Tensor:
        """Return the sum [] of the samples' cross entropies, in float32 or wider."""
        inputs, labels = _inputs_and_labels(micro_batch, "inputs")
        return F.cross_entropy(
            widened(_logits(model(inputs))), labels, ignore_index=self.ignore_index, reduction="sum"
        )

    def denominator(self, micro_batch: Any) -> int:
        """Return the number of labels that count."""
        return int(
            (
                _class_numbers(_inputs_and_labels(micro_batch, "inputs")[1]) != self.ignore_index
            ).sum()
        )


@dataclass(frozen=True)
class ClassificationAccuracy:
    """Sums the cross entropy, in nats, and the correct predictions over validation samples.

    A prediction is the class with the largest logit. A micro-batch is a mapping with `inputs`
    [B, ...] and `labels` int64 [B], or the pair (inputs, labels). The model takes `inputs` and
    returns logits [B, C], or an object that has them as `.logits`.
    """

    ignore_index: int = -100  # the label of samples that do not count

    def loss_sum(self, model: nn.Module, micro_batch: Any) -> dict[str, Tensor]:
        """Return the sum [] of cross entropies and the number [] of correct predictions.

        The latter has no gradient.
        """
        inputs, labels = _inputs_and_labels(micro_batch, "inputs")
        logits = widened(_logits(model(inputs)))
        loss = F.cross_entropy(logits, labels, ignore_index=self.ignore_index, reduction="sum")
        return {"loss": loss, "accuracy": (logits.argmax(dim=1) == labels).sum().to(loss.dtype)}

    def denominator(self, micro_batch: Any) -> dict[str, int]:
        """Return the number of labels that count, for each of the two terms."""
        count = int(
            (
                _class_numbers(_inputs_and_labels(micro_batch, "inputs")[1]) != self.ignore_index
            ).sum()
        )
        return {"loss": count, "accuracy": count}


@dataclass(frozen=True)
class Regression:
    """Sums the squared error over all elements of the output.

    A micro-batch is a mapping with `inputs` [B, ...] and `labels`, or the pair (inputs, labels).
    The model takes `inputs` and returns a tensor of the shape of `labels`, or an object that has it
    as `.logits`.
    """

    def loss_sum(self, model: nn.Module, micro_batch: Any) -> Tensor:
        """Return the sum [] of squared errors, in float32 or wider."""
        inputs, labels = _inputs_and_labels(micro_batch, "inputs")
        outputs = widened(_logits(model(inputs)))
        # broadcasting would sum more elements than the denominator counts
        if outputs.shape != labels.shape:
            raise ConfigError(
                "Regression needs labels of the shape of the model's output, but the model "
                f"returned {list(outputs.shape)} and the labels are {list(labels.shape)}. Reshape "
                "one of them."
            )
        return F.mse_loss(outputs, labels.to(outputs.dtype), reduction="sum")

    def denominator(self, micro_batch: Any) -> int:
        """Return the number of elements of the labels."""
        return int(_inputs_and_labels(micro_batch, "inputs")[1].numel())


def autocast(objective: SupportsObjective, dtype: torch.dtype) -> Objective:
    """Return an objective whose forward runs inside torch.autocast.

    Matrix products are computed in bfloat16 or float16 while parameters stay in float32. Float16
    also needs `Accumulator(..., loss_scale=LossScale())`. With FSDP2 use its MixedPrecisionPolicy
    instead.

    Args:
        objective: the objective to run.
        dtype: torch.bfloat16 or torch.float16.
    """

    def loss_sum(model: nn.Module, micro_batch: Any) -> LossSum:
        with torch.autocast(next(model.parameters()).device.type, dtype):
            return objective.loss_sum(model, micro_batch)

    return Objective(loss_sum, objective.denominator)


def cast_inputs(objective: SupportsObjective, dtype: torch.dtype) -> Objective:
    """Return an objective that converts floating-point inputs to a dtype before the forward.

    Micro-batches must be mappings of tensors.
    """

    def loss_sum(model: nn.Module, micro_batch: Mapping[str, Tensor]) -> LossSum:
        cast = {
            name: value.to(dtype) if value.is_floating_point() else value
            for name, value in micro_batch.items()
        }
        return objective.loss_sum(model, cast)

    return Objective(loss_sum, objective.denominator)


def _inputs_and_labels(micro_batch: Any, inputs: str) -> tuple[Tensor, Tensor]:
    """Return the inputs, found under the name `inputs`, and the labels of a micro-batch."""
    if isinstance(micro_batch, Mapping) and inputs in micro_batch and "labels" in micro_batch:
        return micro_batch[inputs], micro_batch["labels"]
    if isinstance(micro_batch, tuple | list) and len(micro_batch) == 2:
        return micro_batch[0], micro_batch[1]
    got = (
        f"a mapping with {sorted(micro_batch)}"
        if isinstance(micro_batch, Mapping)
        else type(micro_batch).__name__
    )
    raise ConfigError(
        f"This objective needs a micro-batch with '{inputs}' and 'labels', or a pair of them; got "
        f"{got}. Rename the columns, or write an Objective(loss_sum, denominator) of your own."
    )


def _class_numbers(labels: Tensor) -> Tensor:
    """Return the labels, which must be integers.

    Raises:
        ConfigError: for floating-point labels, which cross entropy would take for probabilities.
    """
    if labels.is_floating_point():
        raise ConfigError(
            f"Labels have dtype {labels.dtype}, but this objective needs the numbers of classes or "
            "tokens (int64). Convert them with labels.long(), or use da.Regression() for numbers."
        )
    return labels


def _logits(output: Any) -> Tensor:
    """Return the logits that a model returned, as a tensor or as the attribute of an object."""
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise ConfigError(
            f"The model returned a {type(output).__name__}. This objective needs logits, or an "
            "object with .logits."
        )
    return logits
