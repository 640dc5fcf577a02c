"""Micro-batches on their way to a device, and parts of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map


def to_device(micro: Any, device: torch.device) -> Any:
    """A micro-batch with all its tensors on a device: without a host sync when they are in pinned memory.

    Mappings, tuples and lists are entered; anything else is passed through, for the objective to move.
    """
    if isinstance(micro, torch.Tensor):
        return micro.to(device, non_blocking=True)
    if isinstance(micro, tuple | list):
        values = [to_device(value, device) for value in micro]
        return type(micro)(*values) if hasattr(micro, "_fields") else type(micro)(values)
    if isinstance(micro, Mapping):
        return {key: to_device(value, device) for key, value in micro.items()}
    return micro


def halved(micro: Any) -> Any:
    """The first half of a micro-batch's samples, at least one; only where all its tensors have as many.

    Mappings, tuples and lists are entered as by `to_device`. Anything else is returned as it is.
    """
    sizes = {len(leaf) if leaf.ndim else 0 for leaf in tree_leaves(micro) if isinstance(leaf, torch.Tensor)}
    if len(sizes) != 1 or sizes == {0}:
        return micro
    half = -(-sizes.pop() // 2)
    return tree_map(lambda leaf: leaf[:half] if isinstance(leaf, torch.Tensor) else leaf, micro)


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
