"""Moves micro-batches to a device, and cuts them into halves."""

from __future__ import annotations

import copy
import inspect
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from distaccum.data.containers import Parts, mapped, parts, tensors_in

# equal in both halves
_SHARED = (type(None), bool, str, bytes, int, float, torch.dtype, torch.device)


def to_device(micro_batch: Any, device: torch.device) -> Any:
    """Move the tensors of a micro-batch to a device.

    Tensors in pinned memory are moved without making the host wait. Objects whose class has a
    method `to` (tensors, PackedSequence, transformers' BatchEncoding, your classes) move
    themselves. Dicts, lists, tuples, other Mapping classes and dataclasses are entered and keep
    their classes. Anything else is passed through, for the objective to move.

    Args:
        micro_batch: the object to move. It is not modified.
        device: where its tensors are needed.

    Returns:
        The given object if all of its tensors are on the device, otherwise a new one.
    """
    return mapped(micro_batch, lambda leaf: _moved(leaf, device), moves_itself)


def moves_itself(value: Any) -> bool:
    """Return whether the class of an object has a method `to`."""
    return callable(getattr(type(value), "to", None))


def halves(micro_batch: Any) -> tuple[Any, Any] | None:
    """Cut a micro-batch into two by its samples, so that the first half is not the smaller one.

    The samples are the rows of its tensors (their first dimension); lists without tensors that have
    one item per row are cut with them. If the micro-batch consists of lists, such as images of
    several sizes and their targets, the samples are the items of these lists. The halves keep the
    classes of the containers.

    Returns:
        The two halves, or None if there is only one sample or it is not certain what the samples
        are: no tensors, tensors of different first dimensions, numbers that may count the samples,
        or classes that cannot be entered.
    """
    rows, size = _num_rows(micro_batch), _num_items(micro_batch)
    if (rows is None) == (size is None):  # neither, or both
        return None
    half = -(-(rows or size or 0) // 2)

    def is_cut(value: Any) -> bool:
        if rows is None:
            return isinstance(value, list) and value is not micro_batch
        return isinstance(value, Tensor) or _is_column(value, rows)

    first = mapped(micro_batch, lambda leaf: leaf[:half], is_cut)
    return first, mapped(micro_batch, lambda leaf: leaf[half:], is_cut)


def halved(micro_batch: Any) -> Any:
    """Return the first half of a micro-batch's samples, or the whole if `halves` cannot cut it."""
    both = halves(micro_batch)
    return micro_batch if both is None else both[0]


def one_ahead(micro_batches: Iterable[Any], device: torch.device) -> Iterator[tuple[Any, Any]]:
    """Yield pairs of a micro-batch on the host and its copy on the device.

    When a pair is yielded, the transfer of the next micro-batch has started, but none after that.
    On the CPU both are the same object.
    """
    on_cpu = device.type == "cpu"  # nothing to move
    ahead: deque[tuple[Any, Any]] = deque()
    for micro_batch in micro_batches:
        ahead.append((micro_batch, micro_batch if on_cpu else to_device(micro_batch, device)))
        if on_cpu or len(ahead) > 1:
            yield ahead.popleft()
    yield from ahead


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    devices = {tensor.device for tensor in tensors_in(value)}
    if devices == {device}:
        return value
    own = _copied(value)  # `to` may change its object in place
    moved = own.to(device, non_blocking=True) if _takes_non_blocking(own.to) else own.to(device)
    return own if moved is None else moved


def _takes_non_blocking(to: Callable[..., Any]) -> bool:
    try:
        options = inspect.signature(to).parameters.values()
    except ValueError:  # a method that is not written in Python may have no signature
        return False
    return any(
        option.name == "non_blocking" or option.kind is option.VAR_KEYWORD for option in options
    )


def _copied(value: Any) -> Any:
    """Copy an object but not its contents, or return the object if it cannot be copied."""
    try:
        return value if isinstance(value, tuple) else copy.copy(value)
    except TypeError:
        return value


def _num_rows(micro_batch: Any) -> int | None:
    """Return how many rows all tensors have, or None if the rows are not certain to be samples.

    The number is at least 2.
    """
    sizes = {
        (
            len(tensor)
            if tensor.ndim and tensor.layout is torch.strided and not tensor.is_nested
            else 0
        )
        for tensor in tensors_in(micro_batch)
    }
    rows = sizes.pop() if len(sizes) == 1 else 0
    old = _opened(micro_batch)
    if rows < 2 or not (
        isinstance(micro_batch, Tensor) or (old is not None and _are_known(old, rows))
    ):
        return None
    return rows


def _are_known(old: Parts, rows: int) -> bool:
    return all(
        _is_known(part, rows) or (str(name).startswith("_") and isinstance(part, int))
        for kind in old
        for name, part in kind.items()
    )


def _is_known(value: Any, rows: int) -> bool:
    """Return whether a part is cut with the tensors' rows or certainly belongs to both halves."""
    if isinstance(value, Tensor) or _is_column(value, rows):
        return True
    if isinstance(value, _SHARED):
        # a number of samples would be wrong in a half
        return isinstance(value, bool) or value != rows
    old = None if isinstance(value, list | tuple) and len(value) == rows else _opened(value)
    return old is not None and _are_known(old, rows)


def _is_column(value: Any, rows: int) -> bool:
    """Return whether a list has one item for each row.

    Lists of numbers are excluded, because their meaning is not certain: [32, 32] may be a shape.
    """
    is_list = isinstance(value, list) and len(value) == rows
    return is_list and not any(
        isinstance(item, int | float) or _has_tensors(item) for item in value
    )


def _num_items(micro_batch: Any) -> int | None:
    """Return the length of the lists that make up a micro-batch, or None for other contents.

    The length is at least 2.
    """
    old = _opened(micro_batch)
    held = [] if old is None else [part for kind in old for part in kind.values()]
    if (
        not held
        or not all(isinstance(part, list) for part in held)
        or not _has_tensors(micro_batch)
    ):
        return None
    sizes = {len(part) for part in held}
    size = sizes.pop()
    return size if size > 1 and not sizes else None


def _has_tensors(value: Any) -> bool:
    return next(tensors_in(value), None) is not None


def _opened(value: Any) -> Parts | None:
    """Return the contents of a container, or None for a sequence whose class has a method `to`.

    Such a class (for example PackedSequence) knows more about its contents than a sequence does.
    """
    return None if isinstance(value, list | tuple) and moves_itself(value) else parts(value)
