"""What a rank may take of its device's memory."""

from __future__ import annotations

import torch

from distaccum.config import Config
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
