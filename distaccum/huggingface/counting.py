"""Counts what the mean of a Hugging Face head is taken over, from the model's inputs alone."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any

import torch
from torch import Tensor

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
    return {**micro_batch, **{key: micro_batch[key].masked_fill(empty, 0) for key in label_names(micro_batch)}}


def check_micro_batch(name: MeanOver, micro_batch: Any) -> None:
    """Refuse a micro-batch whose mean has another denominator than `counted` returns.

    Raises:
        ConfigError: if the micro-batch is not a mapping of model inputs, has no labels that can be
            counted, or contains a denominator of its own.
    """
    if not isinstance(micro_batch, Mapping):
        raise ConfigError(
            f"HuggingFace needs micro-batches that are mappings of model inputs, got {type(micro_batch).__name__}. The "
            "model is called as model(**micro_batch), so use a collator that returns a dict."
        )
    for foreign in ("num_items_in_batch", "shift_labels"):
        if foreign in micro_batch:
            raise ConfigError(
                f"HuggingFace: the micro-batch contains {foreign!r}, with which the head no longer returns the mean "
                "over its own labels. Leave it out: distaccum divides by the global count, once."
            )
    if is_question_answering(micro_batch):
        starts, ends = (int(in_range(micro_batch, f"{end}_positions").sum()) for end in ("start", "end"))
        if starts != ends:
            raise ConfigError(
                f"HuggingFace: {starts} start_positions and {ends} end_positions of this micro-batch lie within the "
                "sequence. The head returns the mean of two means with these two denominators, which cannot be "
                "separated. Put both positions of a sample without an answer out of range, or write an Objective with "
                "two terms over .start_logits and .end_logits."
            )
        return
    labels = micro_batch.get("labels")
    if not isinstance(labels, Tensor) or labels.ndim == 0:
        raise ConfigError(
            f"HuggingFace: the micro-batch has {sorted(micro_batch)}, but no tensor 'labels' [B, ...] (nor "
            "start_positions and end_positions). Without labels a head returns no loss. Let the collator return them "
            "under these names."
        )
    if not countable(name, labels):
        raise ConfigError(
            f"HuggingFace(mean_over={name.value!r}) cannot count labels of shape {list(labels.shape)} and "
            f"{labels.dtype}. Use HuggingFace.find(model, micro_batch), which measures what the head averages over."
        )
    if name is MeanOver.samples and not labels.is_floating_point() and bool((labels == IGNORED).any()):
        raise ConfigError(
            f"HuggingFace(mean_over='samples'): {int((labels == IGNORED).sum())} of {labels.numel()} labels are "
            "-100, which cross entropy leaves out of its mean. Use mean_over='tokens', which leaves them out too."
        )


def is_question_answering(micro_batch: Mapping[str, Any]) -> bool:
    """Return whether the labels of a micro-batch are positions in the sequence."""
    return "start_positions" in micro_batch and "end_positions" in micro_batch


def label_names(micro_batch: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of the inputs from which the loss is computed."""
    return ("start_positions", "end_positions") if is_question_answering(micro_batch) else ("labels",)


def in_range(micro_batch: Mapping[str, Any], name: str) -> Tensor:
    """Return which positions count, bool [B].

    Heads clamp positions to [0, T] and ignore T, so a negative position counts as position 0.
    """
    inputs = micro_batch["input_ids"] if "input_ids" in micro_batch else micro_batch["inputs_embeds"]
    counts: Tensor = micro_batch[name] < inputs.shape[1]
    return counts
