"""Uses private names of DistributedDataParallel."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from distaccum._torch.tensors import backward
from distaccum.errors import ConfigError


def ddp_obstacle(model: DistributedDataParallel) -> str | None:
    """Return why this DDP module cannot accumulate gradients, or None if it can.

    DDP keeps its constructor's arguments in private attributes.
    """
    if getattr(model, "mixed_precision", None) is not None:
        return (
            "its mixed_precision argument casts and reduces in ways that are wrong with "
            "accumulation"
        )
    if getattr(model, "_delay_all_reduce_params", None):
        return "delay_all_reduce_named_params reduces in each micro-batch, whatever no_sync() says"
    if any(hasattr(parameter, "_in_backward_optimizers") for parameter in model.parameters()):
        return (
            "an optimizer runs inside its backward, so each micro-batch would be a step of its own"
        )
    return None


def ddp_buckets(model: DistributedDataParallel) -> int:
    """Return the number of all-reduces in one synchronized backward.

    Only DDP's logging data contain it.
    """
    if model.logger is not None:
        model.logger.set_runtime_stats_and_log()  # otherwise older than the newest forward
    data = model._get_ddp_logging_data()
    sizes = data.get("rebuilt_bucket_sizes") or data.get("bucket_sizes") or ""
    return len([size for size in str(sizes).split(",") if size.strip()])


class _Unchanged(TorchDispatchMode):
    """Makes `zeros_like(tensor)` return the tensor itself, which takes no memory."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (
            args[0] if func is torch.ops.aten.zeros_like.default else func(*args, **(kwargs or {}))
        )


def ddp_parameters(model: DistributedDataParallel) -> list[nn.Parameter]:
    """List the parameters whose gradients this DDP module reduces, as its errors number them.

    They were chosen when the module was made, and only its buckets show which ones they are:
    `requires_grad` may have changed since.
    """
    with _Unchanged():  # type: ignore[no-untyped-call]
        buckets = model.reducer._get_zeros_like_grad_buckets()
    reduced = {id(parameter) for bucket in buckets for parameter in bucket.parameters()}
    return [parameter for parameter in model.module.parameters() if id(parameter) in reduced]


@contextmanager
def ddp_synchronises(model: DistributedDataParallel, synchronised: bool) -> Iterator[None]:
    """Decide whether forwards prepare DDP's reduction, regardless of any `no_sync()` around them.

    Args:
        model: the DDP module.
        synchronised: whether the backward must reduce gradients.

    Raises:
        ConfigError: on exit, if the backward must reduce gradients and the last forward bypassed
            DDP.
    """
    flag = model.require_backward_grad_sync
    model.require_backward_grad_sync = synchronised
    # DDP's forward writes True or False to this attribute, and reads only whether it is true. While
    # it is 0 or 1, no forward has been run.
    model.require_forward_param_sync = int(model.require_forward_param_sync)  # type: ignore[assignment]
    try:
        yield
        if synchronised and model.require_forward_param_sync is not True:
            raise ConfigError(
                "The objective did not compute the last micro-batch through the "
                "DistributedDataParallel module, so its gradients would stay on this rank. Call "
                "the model that the objective is given as model(...), with gradients enabled, and "
                "not model.module(...) or a method of model.module. A loss that is computed inside "
                "of the model must be in forward()."
            )
    finally:
        model.require_backward_grad_sync = flag
        model.require_forward_param_sync = bool(model.require_forward_param_sync)


def ddp_complete(model: DistributedDataParallel, reduced: Sequence[nn.Parameter]) -> None:
    """Complete a reduction that waits for parameters which the backward did not reach.

    These parameters contribute zeros. Other ranks may have reached them, and then wait for this
    rank.

    Args:
        model: the DDP module after a backward; if that reduced nothing or everything, nothing is
            done.
        reduced: the parameters from `ddp_parameters`.

    Raises:
        ConfigError: for parameters that were frozen after the model was wrapped, and if torch does
            not name the missing parameters.
    """
    try:
        model._check_reducer_finalized()
        return
    except RuntimeError as error:
        numbers = re.search(
            r"Parameter indices which did not receive grad for rank \d+:\s*([\d ]+)", str(error)
        )
        waiting = [reduced[int(number)] for number in numbers[1].split()] if numbers else []
        names = {id(parameter): name for name, parameter in model.module.named_parameters()}
        frozen = [names[id(parameter)] for parameter in waiting if not parameter.requires_grad]
        if not waiting:
            raise ConfigError(
                "DistributedDataParallel did not finish its reduction after the last backward, and "
                f"torch does not name the missing parameters: {error}"
            ) from error
        if frozen:
            raise ConfigError(
                f"The last backward did not reduce all gradients: {len(frozen)} parameter(s) "
                f"({', '.join(frozen[:3])}) were frozen after DistributedDataParallel was made for "
                "them, so the gradients are those of this rank alone. No parameter was updated. "
                "Freeze parameters before wrapping, or use find_unused_parameters=True."
            ) from error
    backward(waiting, [torch.zeros_like(parameter) for parameter in waiting])
    model._check_reducer_finalized()


def reset_ddp(model: DistributedDataParallel) -> None:
    """Give a DDP module a new reducer.

    A reducer whose backward was interrupted refuses every later forward.
    """
    del model.reducer  # this also removes its hooks from the parameters
    # The steps of DDP's __setstate__, which itself supports only the default process group.
    parameters, sparse = model._build_params_for_reducer()
    names = model._build_debug_param_to_name_mapping(parameters)
    model._ddp_init_helper(parameters, sparse, names, model.static_graph)
    if model.static_graph:
        model.reducer._set_static_graph()
        assert model.logger is not None
        model.logger._set_static_graph()
