"""One loaded batch, cut into micro-batches."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from distaccum.data.containers import Parts, parts, rebuilt
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
    count = min(num_micros, num_samples)
    bounds = [-(-i * num_samples // count) for i in range(count + 1)] if count else []
    return [_part(batch, slice(first, end), num_samples) for first, end in pairwise(bounds)]


def _tensors(value: Any, path: str, *, strict: bool = True) -> Iterator[tuple[str, Tensor]]:
    """Yield each tensor and how to come to it; unless strict, what cannot be entered is passed over."""
    if isinstance(value, Tensor):
        yield path, value
    elif (old := _opened(value)) is not None:
        for key, entry in old.items.items():
            yield from _tensors(entry, f"{path}[{key!r}]", strict=strict)
        for name, entry in old.attributes.items():  # a class may keep there what is no part of the batch
            yield from _tensors(entry, f"{path}.{name}", strict=False)
    elif strict and not isinstance(value, _AS_IT_IS):
        raise ConfigError(
            f"split() cuts tensors in mappings, tuples and lists, and batch{path} is a {type(value).__name__}. "
            "Cut the batch yourself, and pass the list of parts to Accumulator.step."
        )


def _part(value: Any, samples: slice, num_samples: int, path: str = "") -> Any:
    if isinstance(value, Tensor):
        return value[samples]
    old = _opened(value)
    if old is None:
        return value
    if isinstance(value, list | tuple) and value and next(_tensors(value, path, strict=False), None) is None:
        if len(value) != num_samples:
            raise ConfigError(
                f"split() cannot tell what batch{path} is: a {type(value).__name__} of {len(value)} without tensors, "
                f"in a batch of {num_samples} samples. Take it out of the batch, or give it one entry a sample."
            )
        return type(value)(value[samples])
    items = {key: _part(entry, samples, num_samples, f"{path}[{key!r}]") for key, entry in old.items.items()}
    own = {
        name: _part(entry, samples, num_samples, f"{path}.{name}") if _has_tensors(entry) else entry
        for name, entry in old.attributes.items()
    }
    return rebuilt(value, Parts(items, own))


def _has_tensors(value: Any) -> bool:
    return next(_tensors(value, "", strict=False), None) is not None


def _opened(value: Any) -> Parts | None:
    return None if isinstance(value, PackedSequence) else parts(value)
