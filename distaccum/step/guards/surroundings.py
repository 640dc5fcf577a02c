"""Checks what an accumulator is given, and clears a window that ends with an error."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau

from distaccum.core.loss import SupportsObjective
from distaccum.core.window import MicroBatches
from distaccum.errors import ConfigError, require

# Packages that wrap optimizers and schedulers in objects whose step() may make no step, or several.
_WRAPPING = ("accelerate.", "lightning.", "lightning_fabric.")


class Scheduler(Protocol):
    """Changes the learning rate once per optimizer step, as torch's LR schedulers do."""

    def step(self) -> Any:
        """Change the learning rate after an update; not called for a window that is skipped."""


def own_optimizer(optimizer: Any) -> Optimizer:
    """Return the optimizer without a wrapper of Accelerate or Fabric.

    Raises:
        ConfigError: for anything but one optimizer whose `step()` needs no arguments.
    """
    optimizer = _inside(optimizer, "optimizer")
    if not isinstance(optimizer, Optimizer):
        several = (
            " Merge several optimizers into one with parameter groups."
            if isinstance(optimizer, list | tuple)
            else ""
        )
        raise ConfigError(
            f"optimizer is a {type(optimizer).__name__}; give one torch.optim.Optimizer over the "
            f"model's parameters.{several}"
        )
    if _wants_arguments(optimizer):
        raise ConfigError(
            f"{type(optimizer).__name__}.step() requires an argument (a closure), but a window's "
            "loss is computed only once. Use an optimizer whose step(closure) can be called "
            "without one, such as SGD or AdamW."
        )
    return optimizer


def own_clip_norm(clip_norm: float | None) -> float | None:
    """Return the largest norm if it is positive, or None.

    Raises:
        ConfigError: for any other number.
    """
    require(
        clip_norm is None or clip_norm > 0,
        f"clip_norm is {clip_norm}; give a positive norm, or None for no clipping.",
    )
    return clip_norm


def own_objective(objective: Any) -> SupportsObjective:
    """Return the objective if it has the two methods of one.

    Raises:
        ConfigError: for anything else, such as a loss function.
    """
    if not all(callable(getattr(objective, name, None)) for name in ("loss_sum", "denominator")):
        raise ConfigError(
            f"objective is a {type(objective).__name__} without the methods loss_sum and "
            "denominator. Write da.Objective(loss_sum, denominator) with two functions: "
            "loss_sum(model, micro_batch) returns the sum of the losses, denominator(micro_batch) "
            "returns how many were summed."
        )
    found: SupportsObjective = objective
    return found


def own_scheduler(scheduler: Any, optimizer: Optimizer) -> Any:
    """Return the scheduler without Accelerate's wrapper, which steps once per rank.

    Raises:
        ConfigError: for anything without a `step()` that needs no arguments, except
            ReduceLROnPlateau, and for a scheduler of another optimizer.
    """
    scheduler = _inside(scheduler, "scheduler")
    moved = _inside(getattr(scheduler, "optimizer", optimizer), "optimizer")
    if isinstance(moved, Optimizer) and moved is not optimizer:
        raise ConfigError(
            f"The {type(scheduler).__name__} changes the learning rate of another optimizer, so "
            "that of this one would stay constant. Make the scheduler over the optimizer that you "
            "pass."
        )
    if scheduler is None or isinstance(scheduler, ReduceLROnPlateau):
        return scheduler
    if not callable(getattr(scheduler, "step", None)):
        several = ": torch.optim.lr_scheduler.ChainedScheduler or SequentialLR makes one of several"
        raise ConfigError(
            f"scheduler is a {type(scheduler).__name__}, which has no step() method. Give one "
            f"scheduler{several if isinstance(scheduler, list | tuple) else ''}."
        )
    if _wants_arguments(scheduler):
        raise ConfigError(
            f"{type(scheduler).__name__}.step() requires arguments, but it is called without any "
            "after each update. Give one of torch's LR schedulers, or call step() of yours after "
            "Accumulator.step with its arguments."
        )
    return scheduler


def step_scheduler(scheduler: Any, loss: float) -> None:
    """Step the scheduler once, after an update.

    ReduceLROnPlateau gets the window's loss, which is the same on all ranks.
    """
    if isinstance(scheduler, ReduceLROnPlateau):
        scheduler.step(loss)
    elif scheduler is not None:
        scheduler.step()


def checked(window: Any, scheduler: Any, device: torch.device) -> MicroBatches:
    """Return what is handed to `Accumulator.step` as a window, after checks of what surrounds it.

    Raises:
        ConfigError: inside `no_grad`, `inference_mode` or `autocast`, for a OneCycleLR that has
            made all its steps (it would raise only after the update), and for anything but a
            window or a sequence of micro-batches.
    """
    _check_contexts(device)
    _check_schedule_left(scheduler)
    return (
        window if isinstance(window, MicroBatches) else MicroBatches(_sequence(window), len(window))
    )


def _check_schedule_left(scheduler: Any) -> None:
    if isinstance(scheduler, OneCycleLR) and scheduler.last_epoch >= scheduler.total_steps:
        raise ConfigError(
            f"OneCycleLR has already made all its total_steps={scheduler.total_steps}. Set "
            "total_steps to the number of updates (windows, not micro-batches) of the whole "
            "training."
        )


def _check_contexts(device: torch.device) -> None:
    if not torch.is_grad_enabled():
        name = "torch.inference_mode()" if torch.is_inference_mode_enabled() else "torch.no_grad()"
        raise ConfigError(
            f"Accumulator.step was called inside {name}, where nothing can be trained. Call it "
            "outside that block."
        )
    if torch.is_autocast_enabled(device.type):
        raise ConfigError(
            "Accumulator.step was called inside torch.autocast. Autocast caches 16-bit copies of "
            "the weights until the block ends, so later windows would not see any update. Call "
            "step outside of it and use da.autocast(objective, dtype)."
        )


@contextmanager
def undone_after_errors(abort: Callable[[], None]) -> Iterator[None]:
    """Call `abort` if a window ends with an error, which is then raised."""
    try:
        yield
    except BaseException as error:
        try:
            abort()
        except Exception as another:  # the first error is the one to raise
            error.add_note(f"Clearing the window failed too: {type(another).__name__}: {another}")
        raise


def _sequence(window: Any) -> Sequence[Any]:
    """Return the window if it is a sequence; a generator or a single micro-batch is refused."""
    if isinstance(window, Tensor | Mapping | str) or not isinstance(window, Sequence):
        what = "one micro-batch" if isinstance(window, Tensor | Mapping) else "not a list"
        raise ConfigError(
            f"Accumulator.step got a {type(window).__name__}, which is {what}. Give a list of "
            "micro-batches, a window of da.windows(loader, ...), or da.windows.split(batch, K) for "
            "one batch that is to be cut."
        )
    return window


def _inside(wrapper: Any, name: str) -> Any:
    """Return what the wrappers of other packages hold as the attribute `name`."""
    while type(wrapper).__module__.startswith(_WRAPPING) and hasattr(wrapper, name):
        wrapper = getattr(wrapper, name)
    return wrapper


def _wants_arguments(owner: Any) -> bool:
    """Return whether `owner.step()` needs arguments; False if its signature is unknown."""
    try:  # of the class, since schedulers wrap the `step` of their optimizer instance in a counter
        _, *parameters = inspect.signature(type(owner).step).parameters.values()
    except (AttributeError, TypeError, ValueError):
        return False
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return any(p.default is inspect.Parameter.empty and p.kind not in variadic for p in parameters)
