"""Determines the memory that a rank may take, and the inputs of `accum.micro_batch_size=auto`."""

from __future__ import annotations

import torch

from distaccum.app.assembly import effective_batch_sizes
from distaccum.app.config import Config
from distaccum.app.task import Task
from distaccum.core.batch_schedule import Ramp
from distaccum.errors import ConfigError


def usable_bytes(config: Config, device: torch.device) -> int | None:
    """Return the bytes that a rank may take of its device's memory; None: no limit is known.

    The limit is limits.memory, or else the memory of a GPU that other processes do not use.
    limits.margin is subtracted from it.

    Args:
        config: the configuration.
        device: the device of the rank.
    """
    limit = config.limits.memory_bytes
    if limit is None and device.type == "cuda":
        limit = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return None if limit is None else int(limit * (1 - config.limits.margin))


def require_limit(usable: int | None) -> int:
    """Return the memory limit, or raise an error if there is none.

    accum.micro_batch_size=auto needs a limit to know when a size does not fit.

    Args:
        usable: the result of `usable_bytes`.

    Raises:
        ConfigError: if no limit is known.
    """
    if usable is None:
        raise ConfigError(
            "accum.micro_batch_size=auto on the CPU needs a memory limit, because nothing else says how much memory a "
            "rank may take. Set limits.memory, such as limits.memory=2GiB for each rank, or set "
            "accum.micro_batch_size to a number."
        )
    return usable


def batches_for_auto(config: Config, task: Task) -> list[int]:
    """Return the effective batch sizes, which accum.micro_batch_size=auto must not change.

    Args:
        config: the configuration.
        task: the task of the configuration.

    Raises:
        ConfigError: if the configuration does not fix the effective batch sizes, or makes them
            depend on the micro-batch size.
    """
    accum, batches = config.accum, effective_batch_sizes(config, task)
    if not batches or accum.gradient_accumulation_steps is not None:
        others = (
            f"accum.gradient_accumulation_steps={accum.gradient_accumulation_steps} and "
            if accum.gradient_accumulation_steps is not None
            else ""
        )
        raise ConfigError(
            f"accum.micro_batch_size=auto is used with {others}{'an' if batches else 'no'} effective batch. It needs a "
            "fixed effective batch, from which the number of micro-batches follows once the size is found. Set "
            "accum.effective_batch_size (or effective_batch_tokens, or schedule), and leave "
            "accum.gradient_accumulation_steps null; or set two of accum.effective_batch_size, "
            "accum.micro_batch_size and accum.gradient_accumulation_steps to numbers."
        )
    if accum.schedule is not None and accum.ramp is Ramp.linear:
        raise ConfigError(
            "accum.micro_batch_size=auto cannot be used with accum.ramp=linear: the ramp rises in multiples of the "
            "micro-batch size, so the effective batches would depend on the available memory. Set "
            "accum.micro_batch_size to a number, or use accum.ramp=jump."
        )
    return batches
