"""The `launch` group of the configuration: on this machine, or by SLURM."""

import re
from dataclasses import dataclass
from enum import Enum
from typing import Any

from ..errors import ConfigError

_EARLY_S = 60  # SLURM may send the signal before the end so much too early


class Launcher(Enum):
    """What starts the ranks of a SLURM job: one task of srun for each, or one torchrun on each node."""

    srun = "srun"
    torchrun = "torchrun"


@dataclass
class LocalLaunch:
    """Ranks of this machine, or ranks that torchrun or srun have started."""

    name: str
    nproc_per_node: int | None
    max_restarts: int

    @property
    def world_size(self) -> int | None:
        """The number of ranks, where the configuration says it."""
        return self.nproc_per_node


@dataclass
class SlurmLaunch:
    """A batch job. What is null is left to the cluster."""

    name: str
    nodes: int
    gpus_per_node: int | None
    tasks_per_node: int | None
    cpus_per_task: int | None
    time: Any  # text: a number would be read as text without a word, and be minutes
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
                f"launch.tasks_per_node ({self.tasks_per_node}) exceeds launch.gpus_per_node ({self.gpus_per_node}): "
                "each rank needs a GPU of its own. Leave launch.tasks_per_node out."
            )
        if self.signal_s < 0:
            raise ConfigError(f"launch.signal_s ({self.signal_s}) must be 0 (no signal) or more seconds.")
        for line in self.extra:
            if not line.startswith("-"):
                raise ConfigError(f"launch.extra holds {line!r}; write arguments of sbatch, as in ['--exclusive'].")
        limit_s = None if self.time is None else seconds_of(self.time)
        if limit_s is not None and self.signal_s and limit_s <= self.signal_s + _EARLY_S:
            raise ConfigError(
                f"launch.signal_s ({self.signal_s}) leaves nothing of launch.time ({self.time}), as SLURM may signal "
                f"{_EARLY_S} s too early. Ask for more time, or for the signal later."
            )

    @property
    def ranks_per_node(self) -> int:
        """Ranks on each node: as asked for, else one for each GPU, else one."""
        return self.tasks_per_node or self.gpus_per_node or 1

    @property
    def world_size(self) -> int:
        """Ranks on all nodes."""
        return self.nodes * self.ranks_per_node


def seconds_of(time: Any) -> int | None:
    """The seconds of a time limit in SLURM's notation; None for no limit. ConfigError for anything else."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time) if isinstance(time, str) else None
    if isinstance(time, str) and time.upper() in ("UNLIMITED", "INFINITE"):
        return None
    if found is None or time.isdigit():
        raise ConfigError(
            f"launch.time ({time!r}) is no time limit. Write hours:minutes:seconds or days-hours:minutes, in a YAML "
            "file with quotes: '1:30:00'. A bare number is refused: SLURM takes it for minutes, and YAML reads "
            "1:30:00 without quotes as 5400."
        )
    days, *parts = found.groups()
    numbers = [int(part) for part in parts if part is not None]
    units: tuple[int, ...] = (3600, 60, 1)
    if days is None:  # [hours:]minutes:seconds, else days-hours[:minutes[:seconds]]
        units = units[-len(numbers) :]
    return int(days or 0) * 86400 + sum(number * unit for number, unit in zip(numbers, units, strict=False))
