"""What a rank may take of its device's memory."""

from __future__ import annotations

import torch

from distaccum.config import Config


def usable_bytes(config: Config, device: torch.device) -> int | None:
    """limits.memory, or all of a GPU that other processes leave, less limits.margin; None: no limit is known."""
    limit = config.limits.memory_bytes
    if limit is None and device.type == "cuda":
        limit = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return None if limit is None else int(limit * (1 - config.limits.margin))
