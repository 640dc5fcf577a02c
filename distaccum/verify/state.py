"""Finds state other than weights that forwards change, and restores all state after a window."""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from distaccum.data.containers import parts
from distaccum.nn.buffers import same

# The attributes that torch keeps in every module for itself.
_TORCH_OWN = frozenset(vars(nn.Module())) - {"_parameters", "_buffers", "_modules"}
_REGISTERED = ("_parameters", "_buffers", "_modules")


def copied(model: nn.Module) -> nn.Module:
    """Return a deep copy of a module, with tensors in its attributes detached from their graph.

    A forward may have left a tensor with a graph in an attribute.
    """
    held = [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    return copy.deepcopy(model, {id(value): value.detach().clone() for value in held if not value.is_leaf})


def state_of(value: Any) -> dict[str, Tensor | float]:
    """Copy all tensors and numbers that a module or another object holds, by name.

    For a module these are parameters, buffers and attributes.
    """
    root = value if isinstance(value, nn.Module) else getattr(value, "__dict__", {})
    found = _places(root, "", set())
    return {name: held.detach().clone() if isinstance(held, Tensor) else held for name, held in found}


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
        # By id: a tensor, its copy and its gradient.
        self._tensors: dict[int, tuple[Tensor, Tensor, Tensor | None]] = {}
        self._holders: dict[int, tuple[Any, Any]] = {}  # by id: a dict or list and its former items
        self._objects: dict[int, tuple[Any, dict[str, Any]]] = {}  # by id: object, attributes
        for root in roots:
            self._keep(root)
            if id(root) not in self._objects and hasattr(root, "__dict__"):
                self._keep_attributes(root)  # an objective of any class
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        self._python = random.getstate()
        self._numpy = sys.modules["numpy"].random.get_state() if "numpy" in sys.modules else None

    def put_back(self) -> None:
        """Write the copied state back into the same tensors, dicts and lists."""
        for thing, attributes in self._objects.values():
            own = vars(thing)
            made = [name for name in own.keys() - attributes.keys() - _TORCH_OWN if _is_value(own[name])]
            for name in made:
                del own[name]
            own.update({name: value for name, value in attributes.items() if own.get(name) is not value})
        for holder, held in self._holders.values():
            if isinstance(holder, list):
                holder[:] = held
            elif list(map(id, holder.values())) != list(map(id, held.values())) or list(holder) != list(held):
                holder.clear()
                holder.update(held)
        with torch.no_grad():
            for tensor, value, gradient in self._tensors.values():
                if _is_writable(tensor):
                    tensor.copy_(value)
                if tensor.is_leaf:
                    tensor.grad = gradient
        torch.set_rng_state(self._cpu)
        if self._cuda:
            torch.cuda.set_rng_state_all(self._cuda)
        random.setstate(self._python)
        if self._numpy is not None:
            sys.modules["numpy"].random.set_state(self._numpy)

    def _keep(self, value: Any) -> None:
        if isinstance(value, Tensor):
            if id(value) not in self._tensors:
                gradient = value.grad if value.is_leaf else None
                self._tensors[id(value)] = value, value.detach().clone(), gradient
                if gradient is not None:
                    self._keep(gradient)
        elif id(value) in self._holders or id(value) in self._objects:
            return
        elif isinstance(value, dict | list):
            self._holders[id(value)] = value, dict(value) if isinstance(value, dict) else list(value)
            for part in value.values() if isinstance(value, dict) else value:
                self._keep(part)
        elif isinstance(value, nn.Module | Optimizer):
            self._keep_attributes(value)
        else:
            for kind in parts(value) or ():
                for part in kind.values():
                    self._keep(part)

    def _keep_attributes(self, thing: Any) -> None:
        names = _TORCH_OWN if isinstance(thing, nn.Module) else ()
        attributes = {name: value for name, value in vars(thing).items() if name not in names and _moves(value)}
        self._objects[id(thing)] = thing, attributes
        for value in vars(thing).values() if not names else attributes.values():
            self._keep(value)


def _is_value(value: Any) -> bool:
    return isinstance(value, Tensor | int | float)


def _moves(value: Any) -> bool:
    """Return whether an attribute with this value may be state that changes."""
    return value is None or _is_value(value) or isinstance(value, dict | list | tuple)


def _is_writable(tensor: Tensor) -> bool:
    """Return whether a tensor can have been written to in place.

    torch refuses that for inference tensors, and if several elements share one place in memory.
    """
    if tensor.is_inference() or tensor.layout is not torch.strided:
        return False
    return all(stride or size < 2 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))


def _places(value: Any, name: str, seen: set[int]) -> Iterator[tuple[str, Tensor | float]]:
    if isinstance(value, Tensor | int | float):
        yield name, value
        return
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, nn.Module):
        for attribute, held in vars(value).items():
            if attribute in _REGISTERED:
                for own, registered in held.items():
                    yield from _places(registered, _join(name, own), seen)
            elif attribute not in _TORCH_OWN:
                yield from _places(held, _join(name, attribute), seen)
        return
    for kind in parts(value) or ():
        for own, held in kind.items():
            yield from _places(held, _join(name, str(own)), seen)


def _join(name: str, own: str) -> str:
    return f"{name}.{own}" if name else own


def _equal(one: Tensor | float, other: Tensor | float) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return same(one, other)
    return type(one) is type(other) and repr(one) == repr(other)  # nan is nan
