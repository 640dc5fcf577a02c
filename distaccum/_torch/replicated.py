"""Uses of names that DistributedDataParallel keeps private."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from distaccum.errors import ConfigError


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


class _Unchanged(TorchDispatchMode):
    """Answers a request for zeros like a tensor with the tensor itself, so that no memory is taken."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if func is torch.ops.aten.zeros_like.default else func(*args, **(kwargs or {}))


def ddp_parameters(model: DistributedDataParallel) -> list[nn.Parameter]:
    """List the parameters whose gradients this DDP reduces, in the order in which its errors number them.

    They were chosen when it was made. Only its buckets still know them: `requires_grad` may have changed since.
    """
    with _Unchanged():  # type: ignore[no-untyped-call]
        buckets = model.reducer._get_zeros_like_grad_buckets()
    reduced = {id(parameter) for bucket in buckets for parameter in bucket.parameters()}
    return [parameter for parameter in model.module.parameters() if id(parameter) in reduced]


@contextmanager
def ddp_synchronises(model: DistributedDataParallel, synchronised: bool) -> Iterator[None]:
    """Decide whether forwards inside prepare the reduction, whatever `no_sync()` around them says.

    Raises:
        ConfigError: on leaving, when it was to synchronise and the last forward went past DDP.
    """
    flag = model.require_backward_grad_sync
    model.require_backward_grad_sync = synchronised
    # DDP's forward writes True or False here, and reads its truth only: 0 and 1 show that no forward has come by.
    model.require_forward_param_sync = int(model.require_forward_param_sync)  # type: ignore[assignment]
    try:
        yield
        if synchronised and model.require_forward_param_sync is not True:
            raise ConfigError(
                "The objective did not compute the last micro-batch through the DistributedDataParallel module, so its "
                "gradients would stay on this rank. Call the model that the objective is given, with gradients, as "
                "model(...): not model.module(...) or a method of model.module. For a loss inside of the model, put it "
                "into forward()."
            )
    finally:
        model.require_backward_grad_sync = flag
        model.require_forward_param_sync = bool(model.require_forward_param_sync)


def ddp_complete(model: DistributedDataParallel, reduced: Sequence[nn.Parameter]) -> None:
    """Let a reduction end that waits for parameters which the backward did not reach: they add zeros.

    Other ranks may have reached them, and wait for this one.

    Args:
        model: after a backward; one that synchronised nothing, or all, is left alone.
        reduced: from `ddp_parameters`.

    Raises:
        ConfigError: for parameters that were frozen since the model was made.
    """
    try:
        model._check_reducer_finalized()
        return
    except RuntimeError as error:
        numbers = re.search(r"Parameter indices which did not receive grad for rank \d+:\s*([\d ]+)", str(error))
        waiting = [reduced[int(number)] for number in numbers[1].split()] if numbers else []
        names = {id(parameter): name for name, parameter in model.module.named_parameters()}
        frozen = [names[id(parameter)] for parameter in waiting if not parameter.requires_grad]
        if not waiting:
            raise ConfigError(
                "DistributedDataParallel did not finish its reduction after the last backward, and torch does not say "
                f"which parameters are missing: {error}"
            ) from error
        if frozen:
            raise ConfigError(
                f"The last backward did not reduce all gradients: {len(frozen)} parameter(s) ({', '.join(frozen[:3])}) "
                "were frozen after DistributedDataParallel was made for them, so the gradients are this rank's own. "
                "Nothing was updated. Freeze parameters before wrapping, or use find_unused_parameters=True."
            ) from error
    torch.autograd.backward(waiting, [torch.zeros_like(parameter) for parameter in waiting])
    model._check_reducer_finalized()


def reset_ddp(model: DistributedDataParallel) -> None:
    """Give a DDP module a new reducer. One whose backward was interrupted refuses the next forward for good."""
    del model.reducer  # its hooks on the parameters go with it
    # As DDP's own __setstate__ does it, which serves the default process group only.
    parameters, sparse = model._build_params_for_reducer()
    names = model._build_debug_param_to_name_mapping(parameters)
    model._ddp_init_helper(parameters, sparse, names, model.static_graph)
    if model.static_graph:
        model.reducer._set_static_graph()
        assert model.logger is not None
        model.logger._set_static_graph()
