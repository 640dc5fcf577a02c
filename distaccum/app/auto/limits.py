"""What a rank may take of its device's memory, and what `accum.micro=auto` has to know."""

from __future__ import annotations

import torch

from distaccum.app.assembly import effective_batches
from distaccum.app.config import Config
from distaccum.app.task import Problem
from distaccum.core.batch_schedule import Ramp
from distaccum.errors import ConfigError


def usable_bytes(config: Config, device: torch.device) -> int | None:
    """limits.memory, or all of a GPU that other processes leave, less limits.margin; None: no limit is known."""
    limit = config.limits.memory_bytes
    if limit is None and device.type == "cuda":
        limit = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return None if limit is None else int(limit * (1 - config.limits.margin))


def require_limit(usable: int | None) -> int:
    """For accum.micro=auto, which has to know when a size does not fit.

    Raises:
        ConfigError: where no limit is known.
    """
    if usable is None:
        raise ConfigError(
            "accum.micro=auto on the CPU needs a limit: it does not say how much memory a rank may take. Give "
            "limits.memory, such as limits.memory=2GiB for each rank, or accum.micro a number."
        )
    return usable


def batches_for_auto(config: Config, problem: Problem) -> list[int]:
    """The effective batches that accum.micro=auto must not change.

    Raises:
        ConfigError: where the configuration leaves them open, or makes them depend on the micro size.
    """
    accum, batches = config.accum, effective_batches(config, problem)
    if not batches or accum.num_micros is not None:
        others = f"accum.num_micros={accum.num_micros} and " if accum.num_micros is not None else ""
        raise ConfigError(
            f"accum.micro=auto with {others}{'an' if batches else 'no'} effective batch: the number of micros follows "
            "from the size that is found, and the effective batch stays what it is. Give accum.micro=auto and "
            "accum.effective_batch (or effective_tokens, or schedule) and leave accum.num_micros null; or give two of "
            "accum.effective_batch, accum.micro and accum.num_micros as numbers."
        )
    if accum.schedule is not None and accum.ramp is Ramp.linear:
        raise ConfigError(
            "accum.micro=auto with accum.ramp=linear: the ramp goes in multiples of the micro size, so that effective "
            "batches would depend on the memory there is. Give accum.micro a number, or use accum.ramp=jump."
        )
    return batches
