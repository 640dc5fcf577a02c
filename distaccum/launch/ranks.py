"""Which rank this process is, who started it, and how many ranks a configuration asks for."""

import ctypes
import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.distributed_c10d import Store

from ..errors import ConfigError
from .failure import leave
from .job import Job, Order


@dataclass(frozen=True)
class Place:
    """Where this process stands among the processes of its start."""

    started_by: str  # "alone" | "torchrun" | "environment"
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int

    def job(self, order: Order, store: Store | None) -> Job:
        """The job of `order` as this rank sees it. `order.run_dir` must be absolute."""
        return Job(
            config=order.config,
            run_dir=Path(order.run_dir),
            overrides=order.overrides,
            number=order.number,
            sweep=order.sweep,
            rank=self.rank,
            world_size=self.world_size,
            local_rank=self.local_rank,
            local_world_size=self.local_world_size,
            store=store,
        )


def recognise(environment: Mapping[str, str]) -> Place:
    """Who started this process, from the environment alone. The only place that knows the kinds of launchers.

    torchrun (and torch's elastic launch in general) names itself; RANK and WORLD_SIZE without that name were set by
    hand or by a scheduler, with MASTER_ADDR and MASTER_PORT beside them, and rank 0 hosts the store.
    """
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        return Place("alone", rank=0, world_size=1, local_rank=0, local_world_size=1)
    rank, world_size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    return Place(
        "torchrun" if "TORCHELASTIC_RUN_ID" in environment else "environment",
        rank,
        world_size,
        int(environment.get("LOCAL_RANK", rank)),
        int(environment.get("LOCAL_WORLD_SIZE", world_size)),
    )


def ranks_here(config: dict[str, Any], place: Place) -> int:
    """How many ranks this machine runs for this configuration. ConfigError when that cannot be.

    A pure function of its arguments but for the number of GPUs.
    """
    given = (config.get("launch") or {}).get("nproc_per_node")
    if given is not None and (isinstance(given, bool) or not isinstance(given, int) or given < 1):
        raise ConfigError(f"launch.nproc_per_node ({given!r}) must be a whole number of ranks, 1 or more, or null.")
    if place.started_by != "alone":
        if given is not None and given != place.local_world_size:
            raise ConfigError(
                f"launch.nproc_per_node ({given}) differs from the {place.local_world_size} ranks per node that "
                f"{place.started_by} has started. Leave launch.nproc_per_node out, or start with `python -m distaccum`."
            )
        given = place.local_world_size
    count = given or 1
    if config.get("device", "auto") != "cpu" and torch.cuda.is_available():
        gpus = torch.cuda.device_count()
        if count > gpus:
            raise ConfigError(
                f"{count} ranks on this machine, but it has {gpus} GPU{'s' if gpus != 1 else ''}: each rank needs "
                f"its own. Start {gpus} or fewer per machine, or write device=cpu."
            )
    return count


def tie_to_parent(parent: int | None = None) -> None:
    """Let the kernel end this process when its parent dies, so that a killed launcher leaves no orphan. Linux only.

    Args:
        parent: the parent's process id where it is known; if the parent has died already, this process leaves at
            once. Where it is not known, connecting to the parent's store shows the same.
    """
    if sys.platform != "linux":
        return
    pr_set_pdeathsig = 1
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL, 0, 0, 0)
    if parent is not None and os.getppid() != parent:
        leave(1)
