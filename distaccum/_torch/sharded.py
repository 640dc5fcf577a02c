"""Uses private names of FSDP2."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class ShardedGroup:
    """Describes a group of parameters that FSDP2 gathers and reduces together, with its bytes.

    Sizes are in bytes of the whole group, with padding.
    """

    gather_bytes: int  # output of its all-gather
    scatter_bytes: int  # input of its reduce-scatter: the trained parameters only
    reduce_bytes: int  # one shard: its all-reduce between replicas (HSDP)
    reshards: bool  # whether it is gathered a second time for the backward
    reduce_dtype: torch.dtype  # dtype in which gradients are accumulated and reduced
    compute_dtype: torch.dtype  # dtype of the gathered parameters


def sharded_groups(model: nn.Module) -> Iterator[ShardedGroup]:
    """Yield the parameter groups of an FSDP2 model.

    FSDPModule has no public access to its groups or to its mixed precision policy.
    """
    for group, is_root in _fsdp_groups(model):
        shards = getattr(group.mesh_info, "shard_mesh_size", 1)
        gather = scatter = reduce = 0
        stored = reduce_dtype = compute_dtype = torch.float32
        for param in group.fsdp_params:
            # Until torch 2.14 only the group has a policy.
            policy = getattr(param, "mp_policy", None) or group.mp_policy
            size = param._orig_size
            padded = -(-size[0] // shards) * shards * size[1:].numel() if len(size) else shards
            stored = param.sharded_param.dtype
            compute_dtype = policy.param_dtype or stored
            gather += padded * compute_dtype.itemsize
            if param.sharded_param.requires_grad:
                reduce_dtype = policy.reduce_dtype or policy.param_dtype or stored
                scatter += padded * reduce_dtype.itemsize
                reduce += padded // shards * reduce_dtype.itemsize
        # The root stays gathered after its forward unless the user chose otherwise. torch decides
        # that in the first forward.
        undecided = is_root and bool(_state(model)._auto_reshard_after_forward)
        reshards = group.post_forward_mesh_info is not None and not undecided
        yield ShardedGroup(gather, scatter, reduce, reshards, reduce_dtype, compute_dtype)


def clear_sharded_gradients(model: nn.Module) -> None:
    """Discard unreduced gradients of an FSDP2 model, and any unfinished forward or backward.

    `zero_grad()` reaches neither the unsharded accumulators nor HSDP's partial sums.
    `reset_iter_state()` (from torch 2.12 on) leaves the unsharded accumulators too.
    """
    reset = getattr(model, "reset_iter_state", None)
    if reset is None:
        _reset_pass(model)
    elif hasattr(_state(model)._comm_ctx, "all_gather_state"):
        reset()  # it would fail before the first forward
    for group, _ in _fsdp_groups(model):
        group._partial_reduce_output = None
        for param in group.fsdp_params:
            # From torch 2.14 on it is cleared with the gradient below.
            if not hasattr(type(param), "unsharded_accumulated_grad"):
                param.unsharded_accumulated_grad = None
            if hasattr(param, "_unsharded_param"):
                param._unsharded_param.grad = None
            param.sharded_param.grad = None


def forget_forwards(model: nn.Module) -> None:
    """Discard FSDP2's record of forwards that no backward followed.

    FSDP2 keeps the order of forwards, and prefetches parameters in the backward according to it.
    """
    for group, _ in _fsdp_groups(model):
        group._post_forward_indices.clear()
        # The attribute does not exist before the first forward.
        getattr(group.comm_ctx, "post_forward_order", []).clear()


def changed_while_gathered(model: nn.Module) -> list[str]:
    """List the parameters that were frozen or unfrozen on gathered copies.

    FSDP2 forgets such a change when it shards the parameters again.
    """
    names: list[str] = []
    for group, _ in _fsdp_groups(model):
        for param in group.fsdp_params:
            owner, name = param._module_info.module, param._module_info.param_name
            there = getattr(owner, name)
            if (
                there is not param.sharded_param
                and there.requires_grad != param.sharded_param.requires_grad
            ):
                path = next(path for path, module in model.named_modules() if module is owner)
                names.append(f"{path}.{name}".removeprefix("."))
    return names


def reduce_unused_parameters(model: nn.Module) -> None:
    """Make every rank reduce all trained parameters, with zeros for those it did not use.

    torch has `set_reduce_scatter_unused_params` for this from 2.12 on. For earlier versions the
    backward hook of each group is extended.
    """
    reduce_unused = getattr(model, "set_reduce_scatter_unused_params", None)
    if reduce_unused is not None:
        reduce_unused(True)
        return
    for group, _ in _fsdp_groups(model):
        group.post_backward = functools.partial(
            _post_backward_with_zeros, group, group.post_backward
        )


def _post_backward_with_zeros(group: Any, post_backward: Callable[..., None], *unused: Any) -> None:
    if group.reduce_grads:
        for param in group.fsdp_params:
            fresh = param.unsharded_accumulated_grad is None
            leaf = getattr(param, "_unsharded_param", None)
            if fresh and leaf is not None and leaf.requires_grad and leaf.grad is None:
                leaf.grad = torch.zeros_like(leaf)
    post_backward(*unused)


def shared_group(model: nn.Module, blocks: Sequence[nn.Module]) -> bool:
    """Return whether FSDP2 gathers and reduces modules of two blocks in one group.

    A group has no public list of its modules.
    """
    owner = {
        id(module): number for number, block in enumerate(blocks) for module in block.modules()
    }
    groups = [
        {owner[id(module)] for module in group.modules if id(module) in owner}
        for group, _ in _fsdp_groups(model)
    ]
    return any(len(numbers) > 1 for numbers in groups)


def offloads(model: nn.Module) -> bool:
    """Return whether FSDP2 keeps parameters on the CPU, which only its private parameters know."""
    return any(
        param.offload_to_cpu for group, _ in _fsdp_groups(model) for param in group.fsdp_params
    )


def _state(model: Any) -> Any:
    return model._get_fsdp_state()


def _reset_pass(model: nn.Module) -> None:
    """Do what `reset_iter_state` does, for torch 2.11, which does not have it."""
    root = _state(model)
    root._state_ctx.iter_forward_root = None
    root._state_ctx.post_backward_final_callback_queued = False
    if hasattr(root, "_comm_ctx"):
        root._comm_ctx.post_forward_order.clear()
    for module in model.modules():
        if hasattr(module, "_get_fsdp_state"):
            state = _state(module)
            state._training_state = _idle(state)
            getattr(state, "_modules_to_run_forward", set()).clear()
    for group, _ in _fsdp_groups(model):
        group.finalize_backward()
        group._training_state = _idle(group)
        group._to_sharded()


def _idle(owner: Any) -> Any:
    return type(owner._training_state).IDLE


def _fsdp_groups(model: nn.Module) -> Iterator[tuple[Any, bool]]:
    """Yield each parameter group once, with whether it belongs to the root."""
    seen: set[int] = set()
    for module in model.modules():
        if not hasattr(module, "_get_fsdp_state"):
            continue
        state = _state(module)
        groups = getattr(state, "_fsdp_param_groups", None)
        if groups is None:  # torch 2.11 has one group per state
            groups = [state._fsdp_param_group] if state._fsdp_param_group else []
        for group in groups:
            if id(group) not in seen:
                seen.add(id(group))
                yield group, module is model
