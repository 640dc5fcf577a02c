"""Uses of names that FSDP2 keeps private."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


@dataclass(frozen=True)
class ShardedGroup:
    """One group of parameters that FSDP2 gathers and reduces together, in bytes of the whole (padded) group."""

    gather_bytes: int  # output of its all-gather
    scatter_bytes: int  # input of its reduce-scatter: the trained parameters only
    reduce_bytes: int  # its all-reduce between replicas (HSDP): one shard
    reshards: bool  # whether it is gathered once more for the backward
    reduce_dtype: torch.dtype  # in which gradients are accumulated and reduced
    compute_dtype: torch.dtype  # of the gathered parameters


def sharded_groups(model: nn.Module) -> Iterator[ShardedGroup]:
    """The groups of an FSDP2 module. FSDPModule does not tell its groups, nor its mixed precision policy."""
    for group, is_root in _fsdp_groups(model):
        shards = getattr(group.mesh_info, "shard_mesh_size", 1)
        gather = scatter = reduce = 0
        stored = reduce_dtype = compute_dtype = torch.float32
        for param in group.fsdp_params:
            policy = getattr(param, "mp_policy", None) or group.mp_policy  # the group's until torch 2.14
            size = param._orig_size
            padded = -(-size[0] // shards) * shards * size[1:].numel() if len(size) else shards
            stored = param.sharded_param.dtype
            compute_dtype = policy.param_dtype or stored
            gather += padded * compute_dtype.itemsize
            if param.sharded_param.requires_grad:
                reduce_dtype = policy.reduce_dtype or policy.param_dtype or stored
                scatter += padded * reduce_dtype.itemsize
                reduce += padded // shards * reduce_dtype.itemsize
        # The root is kept after its forward unless the user said otherwise; torch decides that in the first forward.
        undecided = is_root and bool(_state(model)._auto_reshard_after_forward)
        reshards = group.post_forward_mesh_info is not None and not undecided
        yield ShardedGroup(gather, scatter, reduce, reshards, reduce_dtype, compute_dtype)


def clear_sharded_gradients(model: nn.Module) -> None:
    """Forget unreduced gradients of an FSDP2 module, and any forward or backward that did not finish.

    `zero_grad()` does not reach the unsharded accumulators or HSDP's partial sums, and `reset_iter_state()` (from torch
    2.12 on) leaves the former too.
    """
    reset = getattr(model, "reset_iter_state", None)
    if reset is None:
        _reset_pass(model)
    elif hasattr(_state(model)._comm_ctx, "all_gather_state"):  # else nothing was ever begun, and it would fail
        reset()
    for group, _ in _fsdp_groups(model):
        group._partial_reduce_output = None
        for param in group.fsdp_params:
            if not hasattr(type(param), "unsharded_accumulated_grad"):  # from torch 2.14 on the next line clears it
                param.unsharded_accumulated_grad = None
            if hasattr(param, "_unsharded_param"):
                param._unsharded_param.grad = None
            param.sharded_param.grad = None


def forget_forwards(model: nn.Module) -> None:
    """Forget forwards that no backward followed: FSDP2 keeps their order, by which a backward gathers ahead."""
    for group, _ in _fsdp_groups(model):
        group._post_forward_indices.clear()
        getattr(group.comm_ctx, "post_forward_order", []).clear()  # not there before the first forward


def changed_while_gathered(model: nn.Module) -> list[str]:
    """Name the parameters that were frozen or thawed on gathered copies: FSDP2 forgets it with the next shards."""
    names: list[str] = []
    for group, _ in _fsdp_groups(model):
        for param in group.fsdp_params:
            owner, name = param._module_info.module, param._module_info.param_name
            there = getattr(owner, name)
            if there is not param.sharded_param and there.requires_grad != param.sharded_param.requires_grad:
                path = next(path for path, module in model.named_modules() if module is owner)
                names.append(f"{path}.{name}".removeprefix("."))
    return names


def reduce_unused_parameters(model: nn.Module) -> None:
    """Make every rank reduce all trained parameters, as zeros where a micro did not use them.

    torch has `set_reduce_scatter_unused_params` for it from 2.12 on; before, groups are taught it one by one.
    """
    reduce_unused = getattr(model, "set_reduce_scatter_unused_params", None)
    if reduce_unused is not None:
        reduce_unused(True)
        return
    for group, _ in _fsdp_groups(model):
        group.post_backward = functools.partial(_post_backward_with_zeros, group, group.post_backward)


def _post_backward_with_zeros(group: Any, post_backward: Callable[..., None], *unused: Any) -> None:
    if group.reduce_grads:
        for param in group.fsdp_params:
            fresh = param.unsharded_accumulated_grad is None
            leaf = getattr(param, "_unsharded_param", None)
            if fresh and leaf is not None and leaf.requires_grad and leaf.grad is None:
                leaf.grad = torch.zeros_like(leaf)
    post_backward(*unused)


def shared_group(model: nn.Module, blocks: Sequence[nn.Module]) -> bool:
    """Whether FSDP2 gathers and reduces modules of two blocks together; a group does not tell its modules."""
    owner = {id(module): number for number, block in enumerate(blocks) for module in block.modules()}
    groups = [
        {owner[id(module)] for module in group.modules if id(module) in owner} for group, _ in _fsdp_groups(model)
    ]
    return any(len(numbers) > 1 for numbers in groups)


def sharding_groups(model: nn.Module) -> list[dist.ProcessGroup]:
    """The process groups that FSDP2 uses, each once. The mesh of a parameter may be an equal one with other groups."""
    kinds = ("shard_process_group", "replicate_process_group")
    found = (getattr(group.mesh_info, kind, None) for group, _ in _fsdp_groups(model) for kind in kinds)
    return list(dict.fromkeys(group for group in found if group is not None))


def offloads(model: nn.Module) -> bool:
    """Tell whether FSDP2 keeps parameters on the CPU; only its parameters know."""
    return any(param.offload_to_cpu for group, _ in _fsdp_groups(model) for param in group.fsdp_params)


def custom_divide_factor(model: nn.Module) -> float | None:
    """A gradient divide factor that the user set on an FSDP2 module; there is a setter and no getter."""
    factors = {group.gradient_divide_factor for group, _ in _fsdp_groups(model)} - {None}
    return next(iter(factors), None)


def _state(model: Any) -> Any:
    return model._get_fsdp_state()


def _reset_pass(model: nn.Module) -> None:
    """What `reset_iter_state` does, for torch 2.11."""
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
    """Each group once, and whether it is the root's."""
    seen: set[int] = set()
    for module in model.modules():
        if not hasattr(module, "_get_fsdp_state"):
            continue
        state = _state(module)
        groups = getattr(state, "_fsdp_param_groups", None)
        if groups is None:  # torch 2.11 has one group a state
            groups = [state._fsdp_param_group] if state._fsdp_param_group else []
        for group in groups:
            if id(group) not in seen:
                seen.add(id(group))
                yield group, module is model
