"""Finds state other than weights that forwards change, and restores all state after a window."""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from distaccum.data.containers import parts
from distaccum.nn.buffers import same

_REGISTERED = ("_parameters", "_buffers", "_modules")
# The attributes that torch keeps in every module for itself, such as its hooks.
_TORCH_OWN = frozenset(vars(nn.Module())).difference(_REGISTERED)


def copied(model: nn.Module) -> nn.Module:
    """Return a deep copy of a module, with tensors in its attributes detached from their graph.

    A forward may have left a tensor with a graph in an attribute.
    """
    held = [
        value
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor)
    ]
    return copy.deepcopy(
        model, {id(value): value.detach().clone() for value in held if not value.is_leaf}
    )


def state_of(value: Any) -> dict[str, Tensor | float]:
    """Copy all tensors and numbers that a module or another object holds, by name.

    For a module these are parameters, buffers and attributes.
    """
    root = value if isinstance(value, nn.Module) else getattr(value, "__dict__", {})
    found = _named(root, "", set())
    return {
        name: held.detach().clone() if isinstance(held, Tensor) else held for name, held in found
    }


def saved_names(model: nn.Module) -> set[str]:
    """Return the names of the parameters and persistent buffers that a checkpoint holds."""
    return set(model.state_dict(keep_vars=True))


def differing(one: Mapping[str, Tensor | float], other: Mapping[str, Tensor | float]) -> set[str]:
    """Return the names under which two states hold different values, of those that both hold."""
    return {name for name in one.keys() & other.keys() if not _equal(one[name], other[name])}


class Kept:
    """Keeps a copy of what modules, optimizers and objectives hold, to restore it later.

    It includes their gradients and the state of the random generators.
    """

    def __init__(self, *roots: Any) -> None:
        """Copy the state of these modules, optimizers and objectives."""
        # Each tensor with its copy and its gradient.
        self._tensors: list[tuple[Tensor, Tensor, Tensor | None]] = []
        self._holders: list[tuple[Any, Any]] = []  # a dict or list and its former items
        self._seen: set[int] = set()
        for root in roots:
            # An objective may be of any class.
            self._keep(root if isinstance(root, nn.Module) else getattr(root, "__dict__", root))
        self._generators: list[tuple[Callable[[Any], None], Any]] = [
            (torch.set_rng_state, torch.get_rng_state()),
            (random.setstate, random.getstate()),
        ]
        if torch.cuda.is_initialized():
            self._generators.append((torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all()))
        if "numpy" in sys.modules:
            numpy = sys.modules["numpy"].random
            self._generators.append((numpy.set_state, numpy.get_state()))

    def put_back(self) -> None:
        """Write the copied state back into the same tensors, dicts and lists."""
        for holder, held in self._holders:
            if isinstance(holder, list):
                holder[:] = held
            elif list(map(id, holder.values())) != list(map(id, held.values())) or list(
                holder
            ) != list(held):
                holder.clear()
                holder.update(held)
        with torch.no_grad():
            for tensor, value, gradient in self._tensors:
                if _is_writable(tensor):
                    tensor.copy_(value)
                if tensor.is_leaf:
                    tensor.grad = gradient
        for restore, state in self._generators:
            restore(state)

    def _keep(self, value: Any) -> None:
        skipped = _TORCH_OWN if isinstance(value, nn.Module) else ()
        if isinstance(value, nn.Module | Optimizer):
            value = vars(value)
        if id(value) in self._seen:
            return
        self._seen.add(id(value))
        if isinstance(value, Tensor):
            gradient = value.grad if value.is_leaf else None
            self._tensors.append((value, value.detach().clone(), gradient))
            self._keep(gradient)
            return
        if isinstance(value, dict | list):
            self._holders.append((value, copy.copy(value)))
        for kind in parts(value) or ():
            for name, part in kind.items():
                if name not in skipped:
                    self._keep(part)


def _is_writable(tensor: Tensor) -> bool:
    """Return whether a tensor can have been written to in place.

    torch refuses that for inference tensors, and if several elements share one place in memory.
    """
    if tensor.is_inference() or tensor.layout is not torch.strided:
        return False
    return all(
        stride or size < 2 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
    )


def _named(value: Any, name: str, seen: set[int]) -> Iterator[tuple[str, Tensor | float]]:
    """Yield the tensors and numbers in a value, with their names."""
    if isinstance(value, Tensor | int | float):
        yield name, value
    elif id(value) not in seen:
        seen.add(id(value))
        for own, held in _contents(value):
            yield from _named(held, f"{name}.{own}" if name else str(own), seen)


def _contents(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the attributes of a module, or the contents of a container, with their names."""
    if isinstance(value, nn.Module):
        for name, held in vars(value).items():
            if name in _REGISTERED:
                yield from held.items()
            elif name not in _TORCH_OWN:
                yield name, held
    else:
        for items in parts(value) or ():
            yield from items.items()


def _equal(one: Tensor | float, other: Tensor | float) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return same(one, other)
    return type(one) is type(other) and repr(one) == repr(other)  # nan is nan
