"""Cuts one loaded batch into micro-batches."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from distaccum.data.containers import Parts, parts, rebuilt
from distaccum.errors import ConfigError

_NOT_CUT = (bool, int, float, complex, str, bytes, type(None))  # the same in every micro-batch


def split(batch: Any, gradient_accumulation_steps: int) -> list[Any]:
    """Cut one loaded batch into micro-batches along the first dimension of its tensors.

    The micro-batches are views of the batch, in its order, and keep its classes. Their sizes differ
    by at most one sample, and none is empty. A list without tensors that is as long as the batch
    (file names, texts) is cut with it. Numbers, strings and None are the same in every micro-batch.

    Args:
        batch: a tensor, or nested mappings, tuples, named tuples and lists of tensors.
        gradient_accumulation_steps: number of micro-batches to make.

    Returns:
        A list for `Accumulator.step` of `gradient_accumulation_steps` micro-batches, or of one
        micro-batch per sample if the batch has fewer samples.

    Raises:
        ConfigError: if tensors have different first dimensions or none, the batch has no tensors,
            or something in it cannot be cut.
    """
    check_steps(
        gradient_accumulation_steps, "the number of micro-batches into which the batch is cut"
    )
    sizes: dict[int, str] = {}
    for path, tensor in _tensors(batch, ""):
        if tensor.ndim == 0:
            raise ConfigError(
                f"split() cuts along the first dimension, and the tensor{path} of the batch has "
                "none (it is a single number). Remove it from the batch, or give it one value per "
                "sample: tensor.expand(num_samples)."
            )
        sizes.setdefault(len(tensor), path)
    if not sizes:
        raise ConfigError(
            f"split() got a {type(batch).__name__} without any tensor, so the number of samples is "
            "unknown. Cut it by slicing, and pass the list of parts to Accumulator.step."
        )
    if len(sizes) > 1:
        found = ", ".join(f"{size} (tensor{path})" for size, path in sizes.items())
        raise ConfigError(
            "split() cuts along the first dimension, which must be the number of samples in every "
            f"tensor of the batch, but it is {found}. Move the samples to the first dimension "
            "(tensor.transpose(0, 1)), or cut the batch by slicing and pass the list of parts to "
            "Accumulator.step."
        )
    (num_samples,) = sizes
    count = min(gradient_accumulation_steps, num_samples)
    bounds = [-(-i * num_samples // count) for i in range(count + 1)] if count else []
    return [_part(batch, slice(first, end), num_samples) for first, end in pairwise(bounds)]


def check_steps(gradient_accumulation_steps: object, meaning: str) -> None:
    """Refuse a number of micro-batches that is not a positive integer.

    Args:
        gradient_accumulation_steps: what the user gave.
        meaning: what the number means, for the message.
    """
    steps = gradient_accumulation_steps
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ConfigError(
            f"gradient_accumulation_steps is {steps!r}. It must be an integer, at least 1: "
            f"{meaning}."
        )


def _tensors(value: Any, path: str, *, strict: bool = True) -> Iterator[tuple[str, Tensor]]:
    """Yield each tensor with its path in the batch, such as `['x'][0]`.

    If `strict`, raise ConfigError for a value that cannot be entered; otherwise pass over it.
    """
    if isinstance(value, Tensor):
        yield path, value
    elif (old := _opened(value)) is not None:
        for key, entry in old.items.items():
            yield from _tensors(entry, f"{path}[{key!r}]", strict=strict)
        for (
            name,
            entry,
        ) in old.attributes.items():  # a class may have attributes that are not part of the batch
            yield from _tensors(entry, f"{path}.{name}", strict=False)
    elif strict and not isinstance(value, _NOT_CUT):
        raise ConfigError(
            f"split() cuts tensors in mappings, tuples and lists, but batch{path} is a "
            f"{type(value).__name__}. Cut the batch yourself, and pass the list of parts to "
            "Accumulator.step."
        )


def _part(value: Any, samples: slice, num_samples: int, path: str = "") -> Any:
    if isinstance(value, Tensor):
        return value[samples]
    old = _opened(value)
    if old is None:
        return value
    if (
        isinstance(value, list | tuple)
        and value
        and next(_tensors(value, path, strict=False), None) is None
    ):
        if len(value) != num_samples:
            raise ConfigError(
                f"split() does not know what batch{path} is: a {type(value).__name__} of "
                f"{len(value)} entries without tensors, in a batch of {num_samples} samples. "
                "Remove it from the batch, or give it one entry per sample."
            )
        return type(value)(value[samples])
    items = {
        key: _part(entry, samples, num_samples, f"{path}[{key!r}]")
        for key, entry in old.items.items()
    }
    own = {
        name: _part(entry, samples, num_samples, f"{path}.{name}") if _has_tensors(entry) else entry
        for name, entry in old.attributes.items()
    }
    return rebuilt(value, Parts(items, own))


def _has_tensors(value: Any) -> bool:
    return next(_tensors(value, "", strict=False), None) is not None


def _opened(value: Any) -> Parts | None:
    return None if isinstance(value, PackedSequence) else parts(value)
