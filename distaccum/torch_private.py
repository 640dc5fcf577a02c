"""All uses of names that torch keeps private, in one place. Tested with torch 2.11, 2.13 and 2.15.

Each function says why no public name serves.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class ShardedGroup:
    """One group of parameters that FSDP2 gathers and reduces together, in bytes of the whole (padded) group."""

    gather_bytes: int  # output of its all-gather
    scatter_bytes: int  # input of its reduce-scatter: the trained parameters only
    reduce_bytes: int  # its all-reduce between replicas (HSDP): one shard
    reshards: bool  # whether it is gathered once more for the backward
    param_dtype: torch.dtype  # of the parameters themselves
    reduce_dtype: torch.dtype  # in which gradients are accumulated and reduced


def sharded_groups(model: nn.Module) -> Iterator[ShardedGroup]:
    """The groups of an FSDP2 module. FSDPModule does not tell its groups, nor its mixed precision policy."""
    for group, is_root in _fsdp_groups(model):
        shards = getattr(group.mesh_info, "shard_mesh_size", 1)
        gather = scatter = reduce = 0
        policy = group.mp_policy
        for param in group.fsdp_params:
            size = param._orig_size
            padded = -(-size[0] // shards) * shards * size[1:].numel() if len(size) else shards
            stored = param.sharded_param.dtype
            gather += padded * (policy.param_dtype or stored).itemsize
            if param.sharded_param.requires_grad:
                itemsize = (policy.reduce_dtype or policy.param_dtype or stored).itemsize
                scatter += padded * itemsize
                reduce += padded // shards * itemsize
        stored = group.fsdp_params[0].sharded_param.dtype
        state_reshards = group.post_forward_mesh_info is not None
        yield ShardedGroup(
            gather_bytes=gather,
            scatter_bytes=scatter,
            reduce_bytes=reduce,
            # The root is kept after its forward unless the user said otherwise; torch decides that in the first forward.
            reshards=state_reshards and not (is_root and _root_decides_later(model)),
            param_dtype=stored,
            reduce_dtype=policy.reduce_dtype or policy.param_dtype or stored,
        )


def clear_sharded_gradients(model: nn.Module) -> None:
    """Forget unreduced gradients of an FSDP2 module, and any forward or backward that did not finish.

    `zero_grad()` does not reach the unsharded accumulators or HSDP's partial sums, and `reset_iter_state()` leaves the
    former too.
    """
    root = _root_state(model)
    if root._state_ctx is not None and hasattr(model, "reset_iter_state"):
        model.reset_iter_state()
    for group, _ in _fsdp_groups(model):
        group._partial_reduce_output = None
        for param in group.fsdp_params:
            param.unsharded_accumulated_grad = None
            if hasattr(param, "_unsharded_param"):
                param._unsharded_param.grad = None
            param.sharded_param.grad = None


def custom_divide_factor(model: nn.Module) -> float | None:
    """A gradient divide factor that the user set on an FSDP2 module; there is a setter and no getter."""
    factors = {group.gradient_divide_factor for group, _ in _fsdp_groups(model)} - {None}
    return next(iter(factors), None)


def ddp_obstacle(model: DistributedDataParallel) -> str | None:
    """Why this DDP module cannot accumulate, or None. The constructor's arguments are kept in private attributes."""
    if getattr(model, "mixed_precision", None) is not None:
        return "its mixed_precision argument casts and reduces in ways that are wrong with accumulation"
    if getattr(model, "_delay_all_reduce_params", None):
        return "delay_all_reduce_named_params reduces in each micro-batch, whatever no_sync() says"
    if any(hasattr(parameter, "_in_backward_optimizers") for parameter in model.parameters()):
        return "an optimizer runs inside its backward, so each micro-batch would be a step of its own"
    return None


def ddp_buckets(model: DistributedDataParallel) -> int:
    """How many all-reduces one synchronised backward makes; only the logging data tell."""
    data = model._get_ddp_logging_data()
    sizes = data.get("rebuilt_bucket_sizes") or data.get("bucket_sizes") or ""
    return len([size for size in str(sizes).split(",") if size.strip()])


def ddp_buffers_synced(model: DistributedDataParallel) -> bool:
    """Whether a forward after a synchronised backward broadcasts the buffers of rank 0."""
    return bool(model.broadcast_buffers and getattr(model, "modules_buffers", None))


def ddp_has_hook(model: DistributedDataParallel) -> bool:
    """Whether a communication hook was registered, so that the bytes on the wire are the hook's."""
    return bool(getattr(model, "_comm_hooks", None))


def reset_ddp(model: DistributedDataParallel) -> None:
    """Give a DDP module a new reducer. One whose backward was interrupted refuses the next forward for good."""
    group, device_ids = model.process_group, model.device_ids
    state = model.__getstate__()
    del model.reducer  # its hooks on the parameters go with it
    model.__setstate__(state)
    model.process_group, model.device_ids = group, device_ids


def _root_state(model: nn.Module) -> Any:
    return model._get_fsdp_state()  # type: ignore[operator]


def _root_decides_later(model: nn.Module) -> bool:
    return bool(getattr(_root_state(model), "_auto_reshard_after_forward", False))


def _fsdp_groups(model: nn.Module) -> Iterator[tuple[Any, bool]]:
    seen: set[int] = set()
    for module in model.modules():
        if not hasattr(module, "_get_fsdp_state"):
            continue
        state = module._get_fsdp_state()
        groups = getattr(state, "_fsdp_param_groups", None)
        if groups is None:  # torch 2.11 has one group a state
            groups = [state._fsdp_param_group] if state._fsdp_param_group else []
        for group in groups:
            if id(group) not in seen:
                seen.add(id(group))
                yield group, module is model
