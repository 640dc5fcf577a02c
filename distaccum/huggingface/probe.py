"""What a head averages over, measured on the model at hand: no list of classes is consulted.

If a head returns the mean over D(X) counted things of whatever samples X it is given, then for every batch
L(batch) D(batch) = sum over its samples of L(sample) D(sample). Where samples differ in D, the right D alone fits.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from distaccum._torch import is_out_of_memory
from distaccum.errors import ConfigError
from distaccum.huggingface.counting import (
    IGNORED,
    DenominatorName,
    check_micro,
    countable,
    counted,
    is_question_answering,
    label_names,
)
from distaccum.huggingface.heads import config_of, configured_aux_coef, mean_and_aux

MOST_SAMPLES = 8  # of the micro-batch; each is one forward
# Samples computed together and alone differ by roundings. A wrong denominator differs by (its share of a sample - the
# true share) x (how much losses of samples differ) / loss, which is 1e-3 and more even before training.
TOLERANCE_EPS = 256
FEWEST_LABELS = 4  # of a single row, so that it and a copy with every second one ignored have other means
_PER_SAMPLE = {DenominatorName.samples, DenominatorName.numbers}  # the same thing where a sample has one label


class Head(NamedTuple):
    """Holds what was measured of a head: the arguments of `HuggingFace`."""

    denominator: DenominatorName
    aux_coef: float
    reason: str


def probe(model: nn.Module, micro: Mapping[str, Any]) -> Head:
    """Measure the denominator of a head's mean, and check how much of an auxiliary loss is in it.

    Runs the micro-batch and each of its first 8 samples alone, without dropout and gradients, and keeps the candidates
    that explain the numbers. Where labels count equally in all samples, so that several do, most labels of one sample
    are ignored in a copy. That is done on the CPU, or where the micro-batch holds ignored labels itself: a head that
    does not know -100 raises, and on a GPU such an error is the end of the process.

    Call it on the plain model, in float32 or wider, before wrapping. On a wrapped model (DDP, FSDP2) all ranks must
    call it alike, with the same micro-batch: its forwards communicate. Modes and weights stay as they are.

    Args:
        model: returns its mean loss as `.loss` when called as `model(**micro)`.
        micro: model inputs, on the model's device; tensors of B rows are cut by samples. One row with labels for its
            positions is compared with a copy in which every second of its labels is ignored.

    Returns:
        The denominator, the factor, and a reason that says what was measured and which of several equivalent
        candidates was taken.

    Raises:
        ConfigError: where nothing explains the numbers, or candidates that differ do; it shows the numbers.
    """
    answering = isinstance(micro, Mapping) and is_question_answering(micro)
    check_micro(DenominatorName.samples if answering else DenominatorName.numbers, micro)
    size = len(micro[label_names(micro)[0]])
    micro = _rows(micro, slice(0, MOST_SAMPLES)) if size > 1 else _two_rows(micro)
    labels: Tensor | None = None if answering else micro["labels"]
    candidates = [name for name in DenominatorName if countable(name, labels)]
    with _measuring(model):
        try:
            aux_coef = _aux_coef(model, micro)
            kept = _explaining(model, micro, aux_coef, candidates)
        except (IndexError, RuntimeError) as error:
            if size > 1 or is_out_of_memory(error):
                raise
            raise ConfigError(_several_rows(f"the head fails on a copy with ignored labels ({error})")) from error
        if len(kept) == 1 or labels is None or labels.is_floating_point():
            return Head(_preferred(kept, labels), aux_coef, f"measured: {_named(kept)}, nothing else, fits the samples")
        _refuse_unsafe(labels, kept)
        try:
            left = _explaining(model, {**micro, "labels": _mostly_ignored(labels)}, aux_coef, kept)
        except (IndexError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            # Every label counts for such a head. What is left fits this data alike, in another unit at most.
            reason = (
                f"{_named(kept)} fit the samples alike, and the head takes no label -100 ({error}); a label that it "
                "ignores by another number would be counted"
            )
            return Head(_preferred(kept, labels), aux_coef, reason)
    if len(left) > 1 and not (labels.numel() == len(labels) and set(left) == _PER_SAMPLE):
        raise ConfigError(
            f"HuggingFace.find cannot tell {_named(left)} apart on this micro-batch: its samples have almost the same "
            "loss (as with a model that has just been initialised), or one length, or the model computes in too few "
            "digits. Give HuggingFace(denominator=...), 'shifted_tokens' for a causal language model, or call it with "
            "other samples or on a float32 model."
        )
    reason = f"measured with ignored labels: {_named(left)}, nothing else, fits the samples"
    return Head(_preferred(left, labels), aux_coef, reason)


def _explaining(
    model: nn.Module, micro: Mapping[str, Any], aux_coef: float, candidates: list[DenominatorName]
) -> list[DenominatorName]:
    """The candidates for which the whole is the sum of its samples.

    Raises:
        ConfigError: if there are none.
    """
    size = len(micro[label_names(micro)[0]])
    parts = [_rows(micro, slice(i, i + 1)) for i in range(size)]
    whole, eps = _token_mean(model, micro, aux_coef)
    means = [_token_mean(model, part, aux_coef)[0] for part in parts]
    shown, kept = [], []
    for name in candidates:
        counts = [int(counted(name, part)) for part in parts]
        left = whole * int(counted(name, micro))
        right = sum(mean * count for mean, count in zip(means, counts, strict=True) if count)
        if abs(left - right) <= TOLERANCE_EPS * eps * abs(left):
            kept.append(name)
        shown.append(f"{name.value}: {left:.8g} together, {right:.8g} alone (counts {counts})")
    if not kept:
        raise ConfigError(
            "HuggingFace.find: no denominator makes the head's mean of all samples, times what it counts in them, the "
            f"sum of that of each sample alone. {'; '.join(shown)}. Give HuggingFace(denominator=...) if you know it, "
            "or write an Objective(loss_sum, weight) over .logits."
        )
    return kept


def _token_mean(model: nn.Module, micro: Mapping[str, Any], aux_coef: float) -> tuple[float, float]:
    """The head's mean without an auxiliary loss, and the relative rounding of the numbers behind it."""
    output = model(**micro)
    mean, aux = mean_and_aux(output)
    floats = [v.dtype for v in (*model.parameters(), *_tensors(output)) if v.is_floating_point()]
    return float(mean) - aux_coef * float(aux or 0.0), max(torch.finfo(dtype).eps for dtype in floats)


def _aux_coef(model: nn.Module, micro: Mapping[str, Any]) -> float:
    """The factor of the auxiliary loss in `.loss`: the configuration's, if leaving it out shows the same."""
    loss, aux = mean_and_aux(model(**micro))
    if aux is None:
        return 0.0
    without, rest = mean_and_aux(model(**{**micro, "output_router_logits": False}))
    coef = configured_aux_coef(config_of(model))
    difference = float(loss) - float(without)
    rounding = TOLERANCE_EPS * torch.finfo(loss.dtype).eps * abs(float(loss))
    if rest is not None or coef is None or abs(difference - coef * float(aux)) > rounding:
        raise ConfigError(
            f"HuggingFace.find: the model returns an .aux_loss of {float(aux):.6g}, its configuration the factor "
            f"{coef}, and .loss changes by {difference:.6g} with output_router_logits=False. Give "
            "HuggingFace(denominator=..., aux_coef=...) if you know it, or write an Objective with two terms."
        )
    return coef


def _refuse_unsafe(labels: Tensor, kept: list[DenominatorName]) -> None:
    if labels.device.type != "cpu" and not bool((labels == IGNORED).any()):
        raise ConfigError(
            f"HuggingFace.find: {_named(kept)} fit this micro-batch alike. To tell them apart, labels are ignored in "
            f"a copy, but not on {labels.device.type}, where a head that does not know -100 ends the process. Call it "
            "while the model is on the CPU, pass a micro-batch with labels of -100, or give denominator=..."
        )


def _two_rows(micro: Mapping[str, Any]) -> dict[str, Any]:
    """The one row of a micro-batch, and a copy of it with every second label ignored, so that other losses count."""
    if is_question_answering(micro):
        raise ConfigError(_several_rows("the positions of one sample say nothing about a mean"))
    labels: Tensor = micro["labels"]
    places = (labels != IGNORED).flatten().nonzero().flatten()
    if len(labels) != 1 or labels.is_floating_point() or labels.ndim < 2 or len(places) < FEWEST_LABELS:
        raise ConfigError(
            _several_rows(
                f"its labels of shape {list(labels.shape)} and {labels.dtype} cannot be turned into a second sample"
            )
        )
    if labels.device.type != "cpu" and len(places) == labels.numel():
        raise ConfigError(
            _several_rows(
                f"on {labels.device.type} a head that does not know the label -100 would crash the process, so no "
                "labels are masked there; run find on the CPU"
            )
        )
    two = {
        name: torch.cat([value, value]) if isinstance(value, Tensor) and value.ndim and len(value) == 1 else value
        for name, value in micro.items()
    }
    two["labels"][1].view(-1)[places[1::2]] = IGNORED
    return two


def _several_rows(reason: str) -> str:
    return (
        f"HuggingFace.find needs at least two samples to compare, and this micro-batch has one: {reason}. Pass several "
        "rows, HuggingFace.find(model, collate([row1, row2])), or write HuggingFace(denominator=...) if you know what "
        "the head averages over."
    )


def _mostly_ignored(labels: Tensor) -> Tensor:
    """A copy in which all labels count but those of the first sample, which keeps two, or none where it has one."""
    labels = labels.masked_fill(labels == IGNORED, 0).contiguous()
    row = labels[0].view(-1)
    row[2 if row.numel() > 2 else 0 :] = IGNORED
    return labels


def _preferred(names: list[DenominatorName], labels: Tensor | None) -> DenominatorName:
    """Of equivalent candidates the one that is what torch's reductions count."""
    order = [DenominatorName.samples] if labels is None or labels.ndim == 1 else []
    return next(name for name in (*order, DenominatorName.numbers, *names) if name in names)


def _rows(micro: Mapping[str, Any], rows: slice) -> dict[str, Any]:
    size = len(micro[label_names(micro)[0]])
    return {
        name: value[rows] if isinstance(value, Tensor) and value.ndim and len(value) == size else value
        for name, value in micro.items()
    }


def _tensors(output: Any) -> list[Tensor]:
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple) else ()
    return [value for value in values if isinstance(value, Tensor)]


def _named(names: list[DenominatorName]) -> str:
    return " and ".join(name.value for name in names)


@contextmanager
def _measuring(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; what FSDP2 gathered is given back."""
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
