"""Micro-batches on their way to a device, and parts of them."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from distaccum.data.containers import Parts, mapped, parts, tensors_in

_SHARED = (type(None), bool, str, bytes, int, float, torch.dtype, torch.device)  # holds for both halves alike


def to_device(micro: Any, device: torch.device) -> Any:
    """Move the tensors of a micro-batch to a device: without a host sync where they are in pinned memory.

    Objects with a method `to` of their own (tensors, PackedSequence, transformers' BatchEncoding, your classes) move
    themselves; dicts, lists, tuples, other Mapping classes and dataclasses are entered, and keep their classes.
    Anything else is passed through, for the objective to move.

    Returns:
        The object that was given where all tensors are on the device, otherwise a new one: what was given stays.
    """
    return mapped(micro, lambda leaf: _moved(leaf, device), moves_itself)


def moves_itself(value: Any) -> bool:
    """Whether an object is moved by a method `to` of its own."""
    return callable(getattr(type(value), "to", None))


def halves(micro: Any) -> tuple[Any, Any] | None:
    """Cut a micro-batch into two by its samples, the first half not smaller; classes are kept.

    Samples are the rows of its tensors (their first dimension, and the items of lists without tensors as long as that),
    or the items of the lists that it consists of, such as images of several sizes and their targets.

    Returns:
        None where it is not certain what the samples are, or there is one only: no tensors, different first dimensions,
        numbers that may count the samples, classes that cannot be entered.
    """
    rows, size = _num_rows(micro), _num_items(micro)
    if (rows is None) == (size is None):  # neither, or both
        return None
    half = -(-(rows or size or 0) // 2)

    def is_cut(value: Any) -> bool:
        if rows is None:
            return isinstance(value, list) and value is not micro
        return isinstance(value, Tensor) or _is_column(value, rows)

    first = mapped(micro, lambda leaf: leaf[:half], is_cut)
    return first, mapped(micro, lambda leaf: leaf[half:], is_cut)


def halved(micro: Any) -> Any:
    """Return the first half of a micro-batch's samples; the whole where it cannot be cut, see `halves`."""
    both = halves(micro)
    return micro if both is None else both[0]


def one_ahead(micros: Iterable[Any], device: torch.device) -> Iterator[tuple[Any, Any]]:
    """Pairs of a micro-batch as it was read and on the device; the next one is under way, and no more than that."""
    if device.type == "cpu":
        yield from ((micro, micro) for micro in micros)  # where they are already
        return
    ahead: tuple[Any, Any] | None = None
    for micro in micros:
        current = (micro, to_device(micro, device))
        if ahead is not None:
            yield ahead
        ahead = current
    if ahead is not None:
        yield ahead


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    devices = {tensor.device for tensor in tensors_in(value)}
    if devices == {device}:
        return value
    own = _copied(value)  # `to` may move in place
    moved = own.to(device, non_blocking=True) if _takes_non_blocking(own.to) else own.to(device)
    return own if moved is None else moved


def _takes_non_blocking(to: Callable[..., Any]) -> bool:
    try:
        options = inspect.signature(to).parameters.values()
    except ValueError:  # not written in Python
        return False
    return any(option.name == "non_blocking" or option.kind is option.VAR_KEYWORD for option in options)


def _copied(value: Any) -> Any:
    """Copy an object but not what it holds; itself where its class cannot be copied."""
    try:
        return value if isinstance(value, tuple) else copy.copy(value)
    except TypeError:
        return value


def _num_rows(micro: Any) -> int | None:
    """How many rows all tensors have, two at least; None where that does not say what the samples are."""
    sizes = {
        len(tensor) if tensor.ndim and tensor.layout is torch.strided and not tensor.is_nested else 0
        for tensor in tensors_in(micro)
    }
    rows = sizes.pop() if len(sizes) == 1 else 0
    old = _opened(micro)
    if rows < 2 or not (isinstance(micro, Tensor) or (old is not None and _are_known(old, rows))):
        return None
    return rows


def _are_known(old: Parts, rows: int) -> bool:
    return all(
        _is_known(part, rows) or (str(name).startswith("_") and isinstance(part, int))
        for kind in old
        for name, part in kind.items()
    )


def _is_known(value: Any, rows: int) -> bool:
    """Whether a part of a micro-batch is cut with the rows of its tensors, or certainly belongs to both halves."""
    if isinstance(value, Tensor) or _is_column(value, rows):
        return True
    if isinstance(value, _SHARED):
        return isinstance(value, bool) or value != rows  # a number of samples would be wrong in a half
    old = None if isinstance(value, list | tuple) and len(value) == rows else _opened(value)
    return old is not None and _are_known(old, rows)


def _is_column(value: Any, rows: int) -> bool:
    """Whether a list has one item for each row. Numbers are not certain to be that: [32, 32] may be a shape."""
    is_list = isinstance(value, list) and len(value) == rows
    return is_list and not any(isinstance(item, int | float) or _has_tensors(item) for item in value)


def _num_items(micro: Any) -> int | None:
    """The length of the lists that a micro-batch consists of, two at least; None where it consists of other things."""
    old = _opened(micro)
    held = [] if old is None else [part for kind in old for part in kind.values()]
    if not held or not all(isinstance(part, list) for part in held) or not _has_tensors(micro):
        return None
    sizes = {len(part) for part in held}
    size = sizes.pop()
    return size if size > 1 and not sizes else None


def _has_tensors(value: Any) -> bool:
    return next(tensors_in(value), None) is not None


def _opened(value: Any) -> Parts | None:
    """The parts of a container; None for sequences with a class that knows more about them, such as PackedSequence."""
    return None if isinstance(value, list | tuple) and moves_itself(value) else parts(value)
