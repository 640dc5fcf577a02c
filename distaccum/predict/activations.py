"""What one micro keeps on the device for its backward, found by a forward that computes nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from distaccum.torch_private import weightless


def saved_bytes(
    model: nn.Module, loss_sum: Callable[[nn.Module, Any], Any], micro: Any, device: str | torch.device = "cpu"
) -> int:
    """The bytes that are alive after a forward and because of it: what autograd keeps until the backward.

    Everything runs on tensors without memory that behave like those of `device`. (Plain meta tensors would mislead:
    they ignore autocast, and their attention keeps its whole T x T matrix.) Parameters, buffers and the micro itself
    are not counted; copies of the parameters in autocast's dtype are, and do not grow with the micro. Blocks under
    activation checkpointing count with their inputs only. FSDP2's casts are not seen: give the model in the dtype in
    which it gathers.

    Args:
        model: on any device, the meta device included, not wrapped and not compiled; stays as it is.
        loss_sum: the objective's, with autocast where the training has it, for the type of `device`.
        micro: tensors in lists, tuples and dicts; only their shapes and dtypes matter.
        device: the kernels differ (a CPU's attention with dropout keeps its T x T matrix, a GPU's does not). A GPU has
            to be there to be asked.
    """
    twin = copy.deepcopy(model)
    with weightless():

        def fake(tensor: Tensor) -> Tensor:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)

        _fill(twin, fake)
        fake_micro = tree_map(lambda leaf: fake(leaf) if isinstance(leaf, Tensor) else leaf, micro)
        return alive_after(lambda: loss_sum(twin, fake_micro))


def alive_after(forward: Callable[[], Any]) -> int:
    """The bytes of the storages that operators made within `forward` and that its result keeps alive.

    Args:
        forward: returns a tensor with its graph, or a structure of such. The result's own storages are not counted.
    """
    with _Storages() as storages:
        result = forward()
    own = {StorageWeakRef(leaf.untyped_storage()).cdata for leaf in tree_leaves(result) if isinstance(leaf, Tensor)}
    return sum(size for key, (reference, size) in storages.made.items() if key not in own and not reference.expired())


class _Storages(TorchDispatchMode):
    """Remembers every storage that an operator returns, without keeping it alive."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}
        self._given: dict[int, StorageWeakRef] = {}  # a weak reference keeps the key from being used again

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                reference = StorageWeakRef(leaf.untyped_storage())
                if reference.cdata not in self.made:
                    self._given[reference.cdata] = reference  # was there before: a parameter, a buffer, the micro
        results = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(results):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                reference = StorageWeakRef(storage)
                if reference.cdata not in self._given:
                    self.made[reference.cdata] = (reference, storage.nbytes())
        return results


def _fill(model: nn.Module, make: Callable[[Tensor], Tensor]) -> None:
    """Replace all parameters and buffers of a model, tied ones by one and the same."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for name, tensor in [*_own(module)]:
            if id(tensor) not in made:
                new = make(tensor)
                made[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
            setattr(module, name, made[id(tensor)])


def _own(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=False, remove_duplicate=False)
    yield from module.named_buffers(recurse=False, remove_duplicate=False)
