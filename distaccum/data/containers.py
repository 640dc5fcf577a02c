"""Reads nested containers and rebuilds them in their own classes.

A micro-batch is such a container.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor


class Parts(NamedTuple):
    """Holds the contents of a container: its items, and the attributes of the object.

    Attributes:
        items: contents as a dict, list or tuple, by key or index.
        attributes: attributes of the object by name.
    """

    items: Mapping[Any, Any]
    attributes: Mapping[str, Any]


def parts(value: Any) -> Parts | None:
    """Return the contents of a container, or None for a value that `rebuilt` cannot rebuild.

    Containers are dicts, lists, tuples, classes derived from these (including named tuples), other
    Mapping classes, whose contents are read from their attributes, and dataclasses.
    """
    items: Mapping[Any, Any] = {}
    if isinstance(value, dict):
        items = dict(dict.items(value))
    elif isinstance(value, list | tuple):
        items = dict(enumerate(value))
    elif not isinstance(value, Mapping) and not (
        dataclasses.is_dataclass(value) and not isinstance(value, type)
    ):
        return None
    own = getattr(value, "__dict__", {})
    attributes = {} if own is value else dict(own)  # the attributes of such a dict are its items
    if dataclasses.is_dataclass(value):  # with slots, its fields are not in __dict__
        attributes |= {
            f.name: getattr(value, f.name)
            for f in dataclasses.fields(value)
            if hasattr(value, f.name)
        }
    return (
        Parts(items, attributes)
        if items or attributes or not isinstance(value, Mapping) or len(value) == 0
        else None
    )


def rebuilt(value: Any, new: Parts) -> Any:
    """Build a container of the same class that has other values under the same names.

    Args:
        value: the container to copy. It is not modified.
        new: contents of the copy.
    """
    if isinstance(value, tuple):
        made: Any = tuple.__new__(type(value), new.items.values())
    else:
        made = copy.copy(value)
        if isinstance(value, list):
            list.__setitem__(made, slice(None), list(new.items.values()))
        for name, item in new.items.items() if isinstance(value, dict) else ():
            made[name] = item
        if getattr(value, "__dict__", None) is value:
            object.__setattr__(made, "__dict__", made)
    for name, attribute in new.attributes.items():
        object.__setattr__(made, name, attribute)  # dataclasses may be frozen
    return made


def mapped(value: Any, change: Callable[[Any], Any], is_leaf: Callable[[Any], bool]) -> Any:
    """Apply a function to the leaves of nested containers and keep the containers' classes.

    A container without a changed leaf is returned as the same object.

    Args:
        value: a leaf, a container, or anything else, which is returned unchanged.
        change: called with each leaf.
        is_leaf: returns True for a value that is passed to `change` instead of being entered.
    """
    if is_leaf(value):
        return change(value)
    old = parts(value)
    if old is None:
        return value
    new = Parts(
        *({name: mapped(part, change, is_leaf) for name, part in kind.items()} for kind in old)
    )
    same = all(new[i][name] is part for i, kind in enumerate(old) for name, part in kind.items())
    return value if same else rebuilt(value, new)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of nested containers, and those among an object's own attributes."""
    if isinstance(value, Tensor):
        yield value
        return
    old = parts(value) or Parts({}, dict(getattr(value, "__dict__", {})))
    for kind in old:
        for part in kind.values():
            if isinstance(part, Tensor) or parts(part) is not None:
                yield from tensors_in(part)
