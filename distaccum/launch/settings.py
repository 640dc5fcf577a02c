"""Defines the `launch` group of the configuration: ranks on this machine, or a job of SLURM."""

import re
from dataclasses import dataclass
from enum import Enum
from typing import Any

from ..errors import ConfigError

_EARLY_S = 60  # SLURM may send the signal before the end up to this many seconds too early


class Launcher(Enum):
    """Names what starts a SLURM job's ranks: one srun task per rank, or one torchrun per node."""

    srun = "srun"
    torchrun = "torchrun"


@dataclass
class LocalLaunch:
    """Describes ranks that this machine starts, or that torchrun or srun have started."""

    name: str
    nproc_per_node: int | None
    max_restarts: int

    @property
    def world_size(self) -> int | None:
        """Return the number of ranks, or None if the configuration leaves it open."""
        return self.nproc_per_node


@dataclass
class SlurmLaunch:
    """Describes a batch job. A value that is null is left to the cluster."""

    name: str
    nodes: int
    gpus_per_node: int | None
    tasks_per_node: int | None
    cpus_per_task: int | None
    time: Any  # a text; declared as str, a number would silently become a text and mean minutes
    partition: str | None
    account: str | None
    qos: str | None
    constraint: str | None
    memory: str | None
    requeue: bool
    signal_s: int
    launcher: Launcher
    array_parallel: int | None
    setup: list[str]
    extra: list[str]
    python: str | None
    dry_run: bool

    def __post_init__(self) -> None:
        for name in ("nodes", "gpus_per_node", "tasks_per_node", "cpus_per_task", "array_parallel"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"launch.{name} ({value}) must be 1 or more.")
        if self.gpus_per_node is not None and self.ranks_per_node > self.gpus_per_node:
            raise ConfigError(
                f"launch.tasks_per_node ({self.tasks_per_node}) exceeds launch.gpus_per_node "
                f"({self.gpus_per_node}): each rank needs a GPU of its own. Leave "
                "launch.tasks_per_node out."
            )
        if self.signal_s < 0:
            raise ConfigError(
                f"launch.signal_s ({self.signal_s}) must be 0 (no signal) or a number of seconds."
            )
        for line in self.extra:
            if not line.startswith("-"):
                raise ConfigError(
                    f"launch.extra contains {line!r}, but arguments of sbatch begin with '-'. "
                    "Write them as in ['--exclusive']."
                )
        limit_s = None if self.time is None else seconds_of(self.time)
        if limit_s is not None and self.signal_s and limit_s <= self.signal_s + _EARLY_S:
            raise ConfigError(
                f"launch.signal_s ({self.signal_s}) leaves nothing of launch.time ({self.time}), "
                f"because SLURM may send the signal {_EARLY_S} s too early. Set a longer "
                "launch.time or a smaller launch.signal_s."
            )

    @property
    def ranks_per_node(self) -> int:
        """Return the ranks per node: as asked for, else one per GPU, else one."""
        return self.tasks_per_node or self.gpus_per_node or 1

    @property
    def world_size(self) -> int:
        """Return the number of ranks on all nodes."""
        return self.nodes * self.ranks_per_node


def seconds_of(time: Any) -> int | None:
    """Return the seconds of a time limit in SLURM's notation, or None for no limit.

    Raises:
        ConfigError: The value is not a time limit in this notation.
    """
    found = (
        re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time)
        if isinstance(time, str)
        else None
    )
    if isinstance(time, str) and time.upper() in ("UNLIMITED", "INFINITE"):
        return None
    if found is None or time.isdigit():
        raise ConfigError(
            f"launch.time ({time!r}) is not a time limit. Write hours:minutes:seconds or "
            "days-hours:minutes, with quotes in a YAML file: '1:30:00'. A bare number is refused, "
            "because SLURM reads it as minutes and YAML reads an unquoted 1:30:00 as 5400."
        )
    days, *parts = found.groups()
    numbers = [int(part) for part in parts if part is not None]
    units: tuple[int, ...] = (3600, 60, 1)
    if days is None:  # [hours:]minutes:seconds, else days-hours[:minutes[:seconds]]
        units = units[-len(numbers) :]
    return int(days or 0) * 86400 + sum(
        number * unit for number, unit in zip(numbers, units, strict=False)
    )
