"""One loaded batch, cut into micro-batches."""

from __future__ import annotations

import copy
from collections.abc import Iterator, MutableMapping
from itertools import pairwise
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from distaccum.errors import ConfigError

_AS_IT_IS = (bool, int, float, complex, str, bytes, type(None))  # in every micro-batch


def split(batch: Any, num_micros: int) -> list[Any]:
    """Cut one loaded batch into micro-batches, along the first dimension of its tensors.

    The micro-batches are views of the batch, in its order, and of its classes. Sizes differ by one sample at most; none
    is empty. Lists without any tensor that are as long as the batch (file names, texts) are cut with it; numbers,
    strings and None are the same in every micro-batch.

    Args:
        batch: a tensor, or mappings, tuples, named tuples and lists of tensors, nested as you like.
        num_micros: how many micro-batches to make.

    Returns:
        A list for `Accumulator.step`: `num_micros` micro-batches, or one a sample where the batch has fewer samples.

    Raises:
        ConfigError: for tensors of different first dimensions or without one, a batch without tensors, or something in
            it that cannot be cut.
    """
    if isinstance(num_micros, bool) or not isinstance(num_micros, int) or num_micros < 1:
        raise ConfigError(f"num_micros is {num_micros!r}; a batch is cut into a whole number of parts, at least 1.")
    sizes: dict[int, str] = {}
    for path, tensor in _tensors(batch, ""):
        if tensor.ndim == 0:
            raise ConfigError(
                f"split() cuts along the first dimension, and the tensor{path} of the batch has none (it is a single "
                "number). Take it out of the batch, or give it one value a sample: tensor.expand(num_samples)."
            )
        sizes.setdefault(len(tensor), path)
    if not sizes:
        raise ConfigError(
            f"split() got a {type(batch).__name__} without any tensor, so that the number of samples is not known. "
            "Cut it by slicing, and pass the list of parts to Accumulator.step."
        )
    if len(sizes) > 1:
        found = ", ".join(f"{size} (tensor{path})" for size, path in sizes.items())
        raise ConfigError(
            f"split() cuts along the first dimension, which must be the samples in every tensor of the batch; it is "
            f"{found}. Move the samples first (tensor.transpose(0, 1)), or cut the batch by slicing and pass the list "
            "of parts to Accumulator.step."
        )
    (num_samples,) = sizes
    parts = min(num_micros, num_samples)
    bounds = [-(-i * num_samples // parts) for i in range(parts + 1)] if parts else []
    return [_part(batch, slice(first, end), num_samples) for first, end in pairwise(bounds)]


def _tensors(value: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    """Each tensor and how to come to it."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, MutableMapping):
        for key, entry in value.items():
            yield from _tensors(entry, f"{path}[{key!r}]")
    elif isinstance(value, tuple | list) and not isinstance(value, PackedSequence):
        for index, entry in enumerate(value):
            yield from _tensors(entry, f"{path}[{index}]")
    elif not isinstance(value, _AS_IT_IS):
        raise ConfigError(
            f"split() cuts tensors in mappings, tuples and lists, and batch{path} is a {type(value).__name__}. "
            "Cut the batch yourself, and pass the list of parts to Accumulator.step."
        )


def _part(value: Any, samples: slice, num_samples: int, path: str = "") -> Any:
    if isinstance(value, Tensor):
        return value[samples]
    if isinstance(value, MutableMapping):
        part = copy.copy(value)
        for key, entry in value.items():
            part[key] = _part(entry, samples, num_samples, f"{path}[{key!r}]")
        return part
    if not isinstance(value, tuple | list):
        return value
    if hasattr(value, "_fields"):
        entries = zip(value._fields, value, strict=True)
        return type(value)(*(_part(entry, samples, num_samples, f"{path}.{name}") for name, entry in entries))
    if value and next(_tensors(value, path), None) is None:
        if len(value) != num_samples:
            raise ConfigError(
                f"split() cannot tell what batch{path} is: a {type(value).__name__} of {len(value)} without tensors, "
                f"in a batch of {num_samples} samples. Take it out of the batch, or give it one entry a sample."
            )
        return type(value)(value[samples])
    return type(value)(_part(entry, samples, num_samples, f"{path}[{i}]") for i, entry in enumerate(value))
