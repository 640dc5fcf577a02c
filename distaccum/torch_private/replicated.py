"""Uses of names that DistributedDataParallel keeps private."""

from __future__ import annotations

from torch.nn.parallel import DistributedDataParallel


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
    del model.reducer  # its hooks on the parameters go with it
    # As DDP's own __setstate__ does it, which serves the default process group only.
    parameters, sparse = model._build_params_for_reducer()
    names = model._build_debug_param_to_name_mapping(parameters)
    model._ddp_init_helper(parameters, sparse, names, model.static_graph)
    if model.static_graph:
        model.reducer._set_static_graph()
        assert model.logger is not None
        model.logger._set_static_graph()
