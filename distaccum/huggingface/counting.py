"""What the mean of a Hugging Face head is taken over, counted from the model's inputs alone."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from distaccum.errors import ConfigError

IGNORED = -100  # the label that torch's and transformers' cross entropies leave out


class DenominatorName(Enum):
    """What a head averages over.

    shifted_tokens: labels from the second position on that are not -100 (causal language models).
    tokens: labels that are not -100, of whatever shape: masked language models, token classification, sequence to
        sequence, and classification with one label a sample.
    samples: the first dimension of the labels; with question answering, the samples whose positions are in range.
    numbers: all numbers in the labels (regression, multi-label).
    """

    shifted_tokens = "shifted_tokens"
    tokens = "tokens"
    samples = "samples"
    numbers = "numbers"


def counted(name: DenominatorName, micro: Mapping[str, Any]) -> Tensor:
    """The denominator [] int64 of a head's mean over this micro-batch, on the device of the labels."""
    if is_question_answering(micro):
        return in_range(micro, "start_positions").sum()
    labels: Tensor = micro["labels"]
    if name is DenominatorName.shifted_tokens:
        return (labels[..., 1:] != IGNORED).sum()
    if name is DenominatorName.tokens:
        return (labels != IGNORED).sum()
    number = len(labels) if name is DenominatorName.samples else labels.numel()
    return torch.full((), number, dtype=torch.int64, device=labels.device)


def countable(name: DenominatorName, labels: Tensor | None) -> bool:
    """Whether labels of this shape and dtype can be counted so; None: question answering."""
    if labels is None:
        return name is DenominatorName.samples
    if labels.is_floating_point():
        return name in (DenominatorName.samples, DenominatorName.numbers)
    return labels.ndim > 1 or name is not DenominatorName.shifted_tokens


def countless(name: DenominatorName, micro: Mapping[str, Any]) -> dict[str, Any]:
    """The micro-batch, with every label 0 if none of them counts: a mean over nothing is NaN, and so is its gradient.

    Decided on the device, so that the host does not wait for it.
    """
    empty = counted(name, micro) == 0
    return {**micro, **{key: micro[key].masked_fill(empty, 0) for key in label_names(micro)}}


def check_micro(name: DenominatorName, micro: Any) -> None:
    """Refuse a micro-batch whose mean has another denominator than the one that would be counted.

    Raises:
        ConfigError: for a micro that is no mapping of model inputs, has no labels, or brings a denominator of its own.
    """
    if not isinstance(micro, Mapping):
        raise ConfigError(
            f"HuggingFace needs micro-batches that are mappings of model inputs, got {type(micro).__name__}: the model "
            "is called as model(**micro). Use a collator that returns a dict."
        )
    for foreign in ("num_items_in_batch", "shift_labels"):
        if foreign in micro:
            raise ConfigError(
                f"HuggingFace: the micro-batch holds {foreign!r}, with which the head no longer returns the mean over "
                "its own labels. Leave it out: the division by the global count is made here, once."
            )
    if is_question_answering(micro):
        starts, ends = (int(in_range(micro, f"{end}_positions").sum()) for end in ("start", "end"))
        if starts != ends:
            raise ConfigError(
                f"HuggingFace: {starts} start_positions and {ends} end_positions of this micro-batch lie within the "
                "sequence. The head returns the mean of two means with these two denominators, which cannot be taken "
                "apart. Put both positions of a sample without an answer out of range, or write an Objective with two "
                "terms over .start_logits and .end_logits."
            )
        return
    labels = micro.get("labels")
    if not isinstance(labels, Tensor) or labels.ndim == 0:
        raise ConfigError(
            f"HuggingFace: the micro-batch has {sorted(micro)}, and no tensor 'labels' [B, ...] (nor start_positions "
            "and end_positions). Without labels a head returns no loss: name them so in the collator."
        )
    if not countable(name, labels):
        raise ConfigError(
            f"HuggingFace(denominator={name.value!r}) cannot count labels of shape {list(labels.shape)} and "
            f"{labels.dtype}. Use HuggingFace.find(model, micro), which measures what the head averages over."
        )
    if name is DenominatorName.samples and not labels.is_floating_point() and bool((labels == IGNORED).any()):
        raise ConfigError(
            f"HuggingFace(denominator='samples'): {int((labels == IGNORED).sum())} of {labels.numel()} labels are "
            "-100, which cross entropy leaves out of its mean. Use denominator='tokens', which leaves them out too."
        )


def is_question_answering(micro: Mapping[str, Any]) -> bool:
    """Whether labels are positions in the sequence."""
    return "start_positions" in micro and "end_positions" in micro


def label_names(micro: Mapping[str, Any]) -> tuple[str, ...]:
    """The inputs that the loss is computed from."""
    return ("start_positions", "end_positions") if is_question_answering(micro) else ("labels",)


def in_range(micro: Mapping[str, Any], name: str) -> Tensor:
    """Which positions count. Heads clamp them to [0, T] and ignore T, so a negative one counts as position 0."""
    inputs = micro["input_ids"] if "input_ids" in micro else micro["inputs_embeds"]
    counts: Tensor = micro[name] < inputs.shape[1]
    return counts
