"""Measures on a model what its head averages over, without a list of classes.

Let L(X) be the mean that a head returns for the samples X, and D(X) the number of things that it
averages over. Then L(batch) D(batch) = sum over its samples of L(sample) D(sample) for every batch.
If the samples differ in D, only the right D satisfies this.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from distaccum._torch import is_out_of_memory
from distaccum.errors import ConfigError
from distaccum.huggingface.heads import (
    IGNORED,
    MeanOver,
    check_micro_batch,
    config_of,
    configured_aux_coef,
    countable,
    counted,
    is_question_answering,
    label_names,
    mean_and_aux,
)

MOST_SAMPLES = 8  # of the micro-batch; each one takes a forward
# Samples that are computed together and alone differ by rounding. A wrong denominator differs by
# (its share of a sample - the true share) x (how much losses of samples differ) / loss, which is
# 1e-3 and more even before training.
TOLERANCE_EPS = 256
# A single row needs this many labels, so that its mean differs from that of a copy with every
# second label ignored.
FEWEST_LABELS = 4
_PER_SAMPLE = {MeanOver.samples, MeanOver.numbers}  # equal if each sample has one label


def probe(model: nn.Module, micro_batch: Mapping[str, Any]) -> tuple[MeanOver, float, str]:
    """Measure what a head's mean is taken over, and the factor of an auxiliary loss in it.

    The first 8 samples of the micro-batch are run together and one by one, without dropout and
    gradients. The candidates that explain the results are kept. If several are kept because all
    samples have equally many labels, a copy is run in which most labels of one sample are ignored.
    A head that does not know the label -100 then raises an error, which on a GPU ends the process.
    Therefore the copy is run only on the CPU, or if the micro-batch itself contains ignored labels.

    Call this on the plain model, in float32 or wider, before wrapping. On a wrapped model (DDP,
    FSDP2) all ranks must call it with the same micro-batch, because its forwards communicate.
    Training modes and parameters are not changed.

    Args:
        model: returns its mean loss as `.loss` when called as `model(**micro_batch)`.
        micro_batch: model inputs, on the model's device; tensors of B rows are cut by samples. A
            single row with labels for its positions is compared with a copy in which every second
            label is ignored.

    Returns:
        The denominator, the factor, and a reason that says what was measured and which of several
        equivalent candidates was chosen.

    Raises:
        ConfigError: if no candidate explains the results, or several that differ do. The message
            shows the numbers.
    """
    answering = isinstance(micro_batch, Mapping) and is_question_answering(micro_batch)
    check_micro_batch(MeanOver.samples if answering else MeanOver.numbers, micro_batch)
    size = len(micro_batch[label_names(micro_batch)[0]])
    micro_batch = _rows(micro_batch, slice(0, MOST_SAMPLES)) if size > 1 else _two_rows(micro_batch)
    labels: Tensor | None = None if answering else micro_batch["labels"]
    candidates = [name for name in MeanOver if countable(name, labels)]
    with _measuring(model):
        try:
            aux_coef = _aux_coef(model, micro_batch)
            kept = _explaining(model, micro_batch, aux_coef, candidates)
        except (IndexError, RuntimeError) as error:
            if size > 1 or is_out_of_memory(error):
                raise
            raise _one_row(f"the head fails on a copy with ignored labels ({error})") from error
        if len(kept) == 1 or labels is None or labels.is_floating_point():
            return (
                _preferred(kept, labels),
                aux_coef,
                f"measured: the samples fit only {_named(kept)}",
            )
        _refuse_unsafe(labels, kept)
        try:
            left = _explaining(
                model, {**micro_batch, "labels": _mostly_ignored(labels)}, aux_coef, kept
            )
        except (IndexError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            # For such a head every label counts, so the candidates differ at most in their unit.
            reason = (
                f"{_named(kept)} fit the samples equally well, and the head accepts no label -100 "
                f"({error}); labels that it ignores under another number would be counted"
            )
            return _preferred(kept, labels), aux_coef, reason
    if len(left) > 1 and not (labels.numel() == len(labels) and set(left) == _PER_SAMPLE):
        raise ConfigError(
            f"HuggingFace.find cannot tell {_named(left)} apart on this micro-batch: its samples "
            "have almost the same loss (as with a model that has just been initialized) or the "
            "same length, or the precision of the model is too low. Write "
            "HuggingFace(mean_over=...), with 'shifted_tokens' for a causal language model, or "
            "call find with other samples or on a float32 model."
        )
    reason = f"measured with ignored labels: the samples fit only {_named(left)}"
    return _preferred(left, labels), aux_coef, reason


def _explaining(
    model: nn.Module, micro_batch: Mapping[str, Any], aux_coef: float, candidates: list[MeanOver]
) -> list[MeanOver]:
    """Return the denominators with which the loss sums of single samples add up to the batch's.

    Raises:
        ConfigError: if there are none.
    """
    size = len(micro_batch[label_names(micro_batch)[0]])
    parts = [_rows(micro_batch, slice(i, i + 1)) for i in range(size)]
    whole, eps = _token_mean(model, micro_batch, aux_coef)
    means = [_token_mean(model, part, aux_coef)[0] for part in parts]
    shown, kept = [], []
    for name in candidates:
        counts = [int(counted(name, part)) for part in parts]
        left = whole * int(counted(name, micro_batch))
        right = sum(mean * count for mean, count in zip(means, counts, strict=True) if count)
        if abs(left - right) <= TOLERANCE_EPS * eps * abs(left):
            kept.append(name)
        shown.append(f"{name.value}: {left:.8g} together, {right:.8g} alone (counts {counts})")
    if not kept:
        raise ConfigError(
            "HuggingFace.find: no denominator fits. With the right one, the head's mean over all "
            "samples times its denominator is the sum of the same products of each sample alone. "
            f"Measured: {'; '.join(shown)}. Write HuggingFace(mean_over=...) if you know what the "
            "head averages over, or an Objective(loss_sum, denominator) over .logits."
        )
    return kept


def _token_mean(
    model: nn.Module, micro_batch: Mapping[str, Any], aux_coef: float
) -> tuple[float, float]:
    """Return the head's mean without an auxiliary loss, and its relative rounding error."""
    output = model(**micro_batch)
    mean, aux = mean_and_aux(output)
    floats = [v.dtype for v in (*model.parameters(), *_tensors(output)) if v.is_floating_point()]
    return float(mean) - aux_coef * float(aux or 0.0), max(
        torch.finfo(dtype).eps for dtype in floats
    )


def _aux_coef(model: nn.Module, micro_batch: Mapping[str, Any]) -> float:
    """Return the factor of the auxiliary loss in `.loss`, or 0 if there is none.

    The configuration names the factor, and a forward without the auxiliary loss confirms it.
    """
    loss, aux = mean_and_aux(model(**micro_batch))
    if aux is None:
        return 0.0
    without, rest = mean_and_aux(model(**{**micro_batch, "output_router_logits": False}))
    coef = configured_aux_coef(config_of(model))
    difference = float(loss) - float(without)
    rounding = TOLERANCE_EPS * torch.finfo(loss.dtype).eps * abs(float(loss))
    if rest is not None or coef is None or abs(difference - coef * float(aux)) > rounding:
        raise ConfigError(
            f"HuggingFace.find: the model returns an .aux_loss of {float(aux):.6g}, and its "
            f"configuration has the factor {coef}, but .loss changes by {difference:.6g} with "
            "output_router_logits=False. Write HuggingFace(mean_over=..., aux_coef=...) if you "
            "know the factor, or an Objective with two terms."
        )
    return coef


def _refuse_unsafe(labels: Tensor, kept: list[MeanOver]) -> None:
    if labels.device.type != "cpu" and not bool((labels == IGNORED).any()):
        raise ConfigError(
            f"HuggingFace.find: {_named(kept)} fit this micro-batch equally well. To tell them "
            f"apart, labels are ignored in a copy. This is not done on {labels.device.type}, where "
            "a head that does not know the label -100 would end the process. Call find while the "
            "model is on the CPU, pass a micro-batch with labels of -100, or write "
            "HuggingFace(mean_over=...)."
        )


def _two_rows(micro_batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return the one row of a micro-batch and a copy of it with every second label ignored.

    The two rows have different means, because different labels count.
    """
    if is_question_answering(micro_batch):
        raise _one_row("the positions of one sample say nothing about a mean")
    labels: Tensor = micro_batch["labels"]
    places = (labels != IGNORED).flatten().nonzero().flatten()
    if (
        len(labels) != 1
        or labels.is_floating_point()
        or labels.ndim < 2
        or len(places) < FEWEST_LABELS
    ):
        raise _one_row(
            f"its labels of shape {list(labels.shape)} and {labels.dtype} cannot be turned into a "
            "second sample"
        )
    if labels.device.type != "cpu" and len(places) == labels.numel():
        raise _one_row(
            f"on {labels.device.type} a head that does not know the label -100 would end the "
            "process, so no labels are ignored there; call find on the CPU"
        )
    two = _by_rows(micro_batch, lambda value: torch.cat([value, value]))
    two["labels"][1].view(-1)[places[1::2]] = IGNORED
    return two


def _one_row(reason: str) -> ConfigError:
    return ConfigError(
        "HuggingFace.find needs at least two samples to compare, but this micro-batch has one: "
        f"{reason}. Pass several rows, HuggingFace.find(model, collate([row1, row2])), or write "
        "HuggingFace(mean_over=...) if you know what the head averages over."
    )


def _mostly_ignored(labels: Tensor) -> Tensor:
    """Return a copy of the labels in which most labels of the first sample are ignored.

    The first sample keeps two labels, or none if it has at most two. All other labels count.
    """
    labels = labels.masked_fill(labels == IGNORED, 0).contiguous()
    row = labels[0].view(-1)
    row[2 if row.numel() > 2 else 0 :] = IGNORED
    return labels


def _preferred(names: list[MeanOver], labels: Tensor | None) -> MeanOver:
    """Choose, among equivalent candidates, the one that torch's own reductions count."""
    order = [MeanOver.samples] if labels is None or labels.ndim == 1 else []
    return next(name for name in (*order, MeanOver.numbers, *names) if name in names)


def _rows(micro_batch: Mapping[str, Any], rows: slice) -> dict[str, Any]:
    return _by_rows(micro_batch, lambda value: value[rows])


def _by_rows(micro_batch: Mapping[str, Any], change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """Change the tensors that have a row for each sample."""
    size = len(micro_batch[label_names(micro_batch)[0]])
    return {
        name: change(v) if isinstance(v, Tensor) and v.ndim and len(v) == size else v
        for name, v in micro_batch.items()
    }


def _tensors(output: Any) -> list[Tensor]:
    values = (
        output.values()
        if isinstance(output, Mapping)
        else output
        if isinstance(output, tuple)
        else ()
    )
    return [value for value in values if isinstance(value, Tensor)]


def _named(names: list[MeanOver]) -> str:
    return " and ".join(name.value for name in names)


@contextmanager
def _measuring(model: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode without gradients, and restore the training modes afterwards.

    Parameters that FSDP2 gathered are freed again.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
        if "torch.distributed.fsdp" in sys.modules:
            from torch.distributed.fsdp import FSDPModule

            for module, _ in modes:
                if isinstance(module, FSDPModule):
                    module.reshard()
