"""Reads the heads of transformers.

What a head's mean is taken over is counted from the model's inputs alone; what it returns is the
mean loss, and perhaps an auxiliary loss with a factor.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distaccum.core.loss import widened
from distaccum.errors import ConfigError

IGNORED = -100  # the label that torch's and transformers' cross entropies leave out


class MeanOver(Enum):
    """Names what a head averages over.

    Attributes:
        shifted_tokens: labels from the second position on that are not -100 (causal language
            models).
        tokens: labels that are not -100, of any shape: masked language models, token
            classification, sequence to sequence, and classification with one label per sample.
        samples: the first dimension of the labels; for question answering, the samples whose
            positions are in range.
        numbers: all numbers in the labels (regression, multi-label).
    """

    shifted_tokens = "shifted_tokens"
    tokens = "tokens"
    samples = "samples"
    numbers = "numbers"


def counted(name: MeanOver, micro_batch: Mapping[str, Any]) -> Tensor:
    """Return the denominator of a head's mean over this micro-batch, int64 [].

    It is on the device of the labels.
    """
    if is_question_answering(micro_batch):
        return in_range(micro_batch, "start_positions").sum()
    labels: Tensor = micro_batch["labels"]
    if name is MeanOver.shifted_tokens:
        return (labels[..., 1:] != IGNORED).sum()
    if name is MeanOver.tokens:
        return (labels != IGNORED).sum()
    number = len(labels) if name is MeanOver.samples else labels.numel()
    return torch.full((), number, dtype=torch.int64, device=labels.device)


def countable(name: MeanOver, labels: Tensor | None) -> bool:
    """Return whether `counted` can count labels of this shape and dtype.

    Args:
        name: what the head averages over.
        labels: the labels; None: question answering.
    """
    if labels is None:
        return name is MeanOver.samples
    if labels.is_floating_point():
        return name in (MeanOver.samples, MeanOver.numbers)
    return labels.ndim > 1 or name is not MeanOver.shifted_tokens


def countless(name: MeanOver, micro_batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return the micro-batch with all labels replaced by 0 if none of them counts.

    A mean over nothing would be NaN, and so would its gradient. The decision is made on the device,
    so the host does not wait for it.
    """
    empty = counted(name, micro_batch) == 0
    return {
        **micro_batch,
        **{key: micro_batch[key].masked_fill(empty, 0) for key in label_names(micro_batch)},
    }


def check_micro_batch(name: MeanOver, micro_batch: Any) -> None:
    """Refuse a micro-batch whose mean has another denominator than `counted` returns.

    Raises:
        ConfigError: if the micro-batch is not a mapping of model inputs, has no labels that can be
            counted, or contains a denominator of its own.
    """
    if not isinstance(micro_batch, Mapping):
        raise ConfigError(
            "HuggingFace needs micro-batches that are mappings of model inputs, got "
            f"{type(micro_batch).__name__}. The model is called as model(**micro_batch), so use a "
            "collator that returns a dict."
        )
    for foreign in ("num_items_in_batch", "shift_labels"):
        if foreign in micro_batch:
            raise ConfigError(
                f"HuggingFace: the micro-batch contains {foreign!r}, with which the head no longer "
                "returns the mean over its own labels. Leave it out: distaccum divides by the "
                "global count, once."
            )
    if is_question_answering(micro_batch):
        starts, ends = (
            int(in_range(micro_batch, f"{end}_positions").sum()) for end in ("start", "end")
        )
        if starts != ends:
            raise ConfigError(
                f"HuggingFace: {starts} start_positions and {ends} end_positions of this "
                "micro-batch lie within the sequence. The head returns the mean of two means with "
                "these two denominators, which cannot be separated. Put both positions of a sample "
                "without an answer out of range, or write an Objective with two terms over "
                ".start_logits and .end_logits."
            )
        return
    labels = micro_batch.get("labels")
    if not isinstance(labels, Tensor) or labels.ndim == 0:
        raise ConfigError(
            f"HuggingFace: the micro-batch has {sorted(micro_batch)}, but no tensor 'labels' [B, "
            "...] (nor start_positions and end_positions). Without labels a head returns no loss. "
            "Let the collator return them under these names."
        )
    if not countable(name, labels):
        raise ConfigError(
            f"HuggingFace(mean_over={name.value!r}) cannot count labels of shape "
            f"{list(labels.shape)} and {labels.dtype}. Use HuggingFace.find(model, micro_batch), "
            "which measures what the head averages over."
        )
    if (
        name is MeanOver.samples
        and not labels.is_floating_point()
        and bool((labels == IGNORED).any())
    ):
        raise ConfigError(
            f"HuggingFace(mean_over='samples'): {int((labels == IGNORED).sum())} of "
            f"{labels.numel()} labels are -100, which cross entropy leaves out of its mean. Use "
            "mean_over='tokens', which leaves them out too."
        )


def is_question_answering(micro_batch: Mapping[str, Any]) -> bool:
    """Return whether the labels of a micro-batch are positions in the sequence."""
    return "start_positions" in micro_batch and "end_positions" in micro_batch


def label_names(micro_batch: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of the inputs from which the loss is computed."""
    return (
        ("start_positions", "end_positions") if is_question_answering(micro_batch) else ("labels",)
    )


def in_range(micro_batch: Mapping[str, Any], name: str) -> Tensor:
    """Return which positions count, bool [B].

    Heads clamp positions to [0, T] and ignore T, so a negative position counts as position 0.
    """
    inputs = (
        micro_batch["input_ids"] if "input_ids" in micro_batch else micro_batch["inputs_embeds"]
    )
    counts: Tensor = micro_batch[name] < inputs.shape[1]
    return counts


def mean_and_aux(output: Any) -> tuple[Tensor, Tensor | None]:
    """Return the mean loss [] of a model's output, and its auxiliary loss [] or None.

    Both are float32 or wider.

    Raises:
        ConfigError: if the output has no scalar loss, or further losses whose denominators are not
            known.
    """
    fields = (
        output if isinstance(output, Mapping) else vars(output) if hasattr(output, "loss") else {}
    )
    loss = (
        fields.get("loss")
        if fields
        else output[0]
        if isinstance(output, tuple) and output
        else None
    )
    if not isinstance(loss, Tensor) or loss.ndim != 0:
        got = (
            f"a loss of shape {list(loss.shape)}"
            if isinstance(loss, Tensor)
            else f"no loss in {type(output).__name__}"
        )
        raise ConfigError(
            f"HuggingFace: the model returned {got}. It must return its mean as one number .loss. "
            "For other models, write an Objective(loss_sum, denominator) over .logits."
        )
    others = [
        name
        for name, value in fields.items()
        if name.endswith("_loss") and isinstance(value, Tensor)
    ]
    if others not in ([], ["aux_loss"]):
        raise ConfigError(
            f"HuggingFace: the model returned {others} in addition to .loss. It is not known how "
            "they are contained in .loss and what each is averaged over. Switch them off, or write "
            "an Objective with one term for each."
        )
    aux = fields["aux_loss"] if others else None
    return widened(loss), None if aux is None else widened(aux)


def config_of(model: nn.Module) -> Any:
    """Return the configuration of a model, wrapped or not."""
    return (model.module if isinstance(model, DistributedDataParallel) else model).config


def configured_aux_coef(config: Any) -> float | None:
    """Return the factor of the auxiliary loss in a configuration of transformers, or None."""
    for owner in (config, config.get_text_config()):
        for name in ("router_aux_loss_coef", "aux_loss_coef"):
            if getattr(owner, name, None) is not None:
                return float(getattr(owner, name))
    return None
