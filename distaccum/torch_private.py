"""All uses of names that torch keeps private, in one place. Tested with torch 2.11, 2.13 and 2.15.

Each function says why no public name serves.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


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
    if reset is not None:
        reset()
    else:
        _reset_pass(model)
    for group, _ in _fsdp_groups(model):
        group._partial_reduce_output = None
        for param in group.fsdp_params:
            if not hasattr(type(param), "unsharded_accumulated_grad"):  # from torch 2.14 on the next line clears it
                param.unsharded_accumulated_grad = None
            if hasattr(param, "_unsharded_param"):
                param._unsharded_param.grad = None
            param.sharded_param.grad = None


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


def has_hooks(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether a trained parameter has hooks of its user; tensors keep them in private attributes."""
    return any(p.requires_grad and (p._backward_hooks or p._post_accumulate_grad_hooks) for p in parameters)


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
    if model.logger is not None:
        model.logger.set_runtime_stats_and_log()  # otherwise what is told is from before the newest forward
    data = model._get_ddp_logging_data()
    sizes = data.get("rebuilt_bucket_sizes") or data.get("bucket_sizes") or ""
    return len([size for size in str(sizes).split(",") if size.strip()])


def reset_ddp(model: DistributedDataParallel) -> None:
    """Give a DDP module a new reducer. One whose backward was interrupted refuses the next forward for good."""
    group, device_ids = model.process_group, model.device_ids
    state = model.__getstate__()
    del model.reducer  # its hooks on the parameters go with it
    model.__setstate__(state)
    model.process_group, model.device_ids = group, device_ids


def backward(root: Tensor, gradient: Tensor) -> None:
    """What `torch.autograd.backward(root, gradient)` does, for a gradient of the root's shape.

    The public function checks in Python what is right by construction here; on a small micro-batch that takes as long
    as a fifth of all its work.
    """
    torch.autograd.Variable._execution_engine.run_backward(
        (root,), (gradient,), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


def weightless() -> AbstractContextManager[Any]:
    """Tensors made inside have no memory and behave like their device's.

    Public meta tensors do not: they ignore autocast and fused attention.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode()


@contextmanager
def storage_resizes(seen: Callable[[torch.UntypedStorage], None]) -> Iterator[None]:
    """Tell of each storage that is resized from Python while it is entered: no operator does, and FSDP2 does it."""
    resize = torch.UntypedStorage.resize_

    def told(storage: torch.UntypedStorage, *size: Any) -> Any:
        result = resize(storage, *size)
        seen(storage)
        return result

    torch.UntypedStorage.resize_ = told  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]


def silent_group(world_size: int, rank: int) -> dist.ProcessGroup:
    """Ranks of which only this one is there: collectives return at once and send nothing.

    torch keeps them for tests. Where this process has no process group, this becomes its default one.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        group = dist.new_group(backend="fake", use_local_synchronization=True)
    else:
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
        group = dist.group.WORLD
    assert group is not None
    return group


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
