"""Which rank this process is, who started it, and how many ranks a configuration asks for."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.distributed_c10d import Store

from ..errors import ConfigError
from .failure import say
from .job import Job, Order
from .slurm_names import hosts, port, tasks_per_node


@dataclass(frozen=True)
class Place:
    """Where this process stands among the processes of its start."""

    started_by: str  # "alone" | "torchrun" | "srun" | "environment"
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    store_at: tuple[str, int] | None = None  # host and port of rank 0, where the environment does not tell torch
    gpus_are_bound: bool = False  # each rank may see its own GPU only

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
            gpu_index=0 if self.sees_one_gpu() else self.local_rank,
            store=store,
        )

    def sees_one_gpu(self) -> bool:
        """Whether the GPU of this rank is the only one that it sees, whatever its neighbours have."""
        return self.gpus_are_bound and torch.cuda.device_count() == 1

    def rendezvous(self) -> dict[str, str]:
        """The variables from which torch learns where the ranks meet, where nobody else has set them."""
        if self.store_at is None:
            return {}
        host, port = self.store_at
        numbers = {"MASTER_PORT": port, "RANK": self.rank, "WORLD_SIZE": self.world_size}
        return {"MASTER_ADDR": host, **{name: str(number) for name, number in numbers.items()}}


def recognise(environment: Mapping[str, str]) -> Place:
    """Who started this process, from the environment alone. The only place that knows the kinds of launchers.

    torchrun (and torch's elastic launch in general) names itself, also inside a task of srun. A task of srun, one of
    several, is a rank; the first host of the step hosts the store. RANK and WORLD_SIZE without such names were set by
    hand, with MASTER_ADDR and MASTER_PORT beside them, and rank 0 hosts the store.

    Raises:
        ConfigError: for a variable that is missing, empty, no number, or contradicts another one.
    """
    if "TORCHELASTIC_RUN_ID" not in environment and _is_one_of_several_tasks(environment):
        return _task(environment)
    if "RANK" not in environment and whole_number(environment, "WORLD_SIZE", 1) == 1:
        return Place("alone", rank=0, world_size=1, local_rank=0, local_world_size=1)
    world_size = whole_number(environment, "WORLD_SIZE", at_least=1)
    rank = _below(environment, "RANK", "WORLD_SIZE", world_size)
    local_world_size = whole_number(environment, "LOCAL_WORLD_SIZE", world_size, at_least=1)
    if "LOCAL_RANK" not in environment and rank >= local_world_size:
        raise ConfigError(
            f"LOCAL_WORLD_SIZE={local_world_size} is set and LOCAL_RANK is not. Set LOCAL_RANK to this process's "
            f"number on its machine, from 0 to {local_world_size - 1}."
        )
    total_name = "LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in environment else "WORLD_SIZE"
    local_rank = _below(environment, "LOCAL_RANK", total_name, local_world_size, default=rank)
    started_by = "torchrun" if "TORCHELASTIC_RUN_ID" in environment else "environment"
    if world_size > 1 and started_by == "environment":
        _check_meeting_point(environment)
    return Place(started_by, rank, world_size, local_rank, local_world_size)


_BY_HAND = (
    "Without torchrun, each process needs RANK (0, 1, ...), WORLD_SIZE (the number of processes), MASTER_ADDR (the "
    "host of rank 0) and MASTER_PORT (a free port there). For a single process, unset all four: env -u RANK -u "
    "WORLD_SIZE -u MASTER_ADDR -u MASTER_PORT ..."
)
_RELATED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def whole_number(environment: Mapping[str, str], name: str, default: int | None = None, at_least: int = 0) -> int:
    """Read a whole number from the environment.

    Raises:
        ConfigError: it is missing and has no default, is empty, or is something else.
    """
    text = environment.get(name)
    if text is None and default is not None:
        return default
    if text is None:
        related = ", ".join(other for other in _RELATED if other in environment)
        raise ConfigError(f"{name} is not set, although related variables ({related}) are. {_BY_HAND}")
    if re.fullmatch(r"[0-9]{1,9}", text) is None or int(text) < at_least:
        raise ConfigError(
            f"The environment has {name}={text!r}; it must be a whole number from {at_least} on. {_BY_HAND}"
        )
    return int(text)


def _below(environment: Mapping[str, str], name: str, total_name: str, total: int, default: int | None = None) -> int:
    """A rank, which must be less than the number of ranks."""
    rank = whole_number(environment, name, default)
    if rank >= total:
        raise ConfigError(
            f"The environment has {name}={rank} and {total_name}={total}: ranks are numbered from 0 to "
            f"{total_name} - 1, which is {total - 1}. {_BY_HAND}"
        )
    return rank


def _check_meeting_point(environment: Mapping[str, str]) -> None:
    if not environment.get("MASTER_ADDR", "").strip():
        given = "is empty" if "MASTER_ADDR" in environment else "is missing"
        raise ConfigError(f"MASTER_ADDR {given} in the environment. {_BY_HAND}")
    if whole_number(environment, "MASTER_PORT", at_least=1) >= 1 << 16:
        raise ConfigError(f"MASTER_PORT={environment['MASTER_PORT']} is no port; those end at 65535. {_BY_HAND}")


def _is_one_of_several_tasks(environment: Mapping[str, str]) -> bool:
    # The shell of a batch job has a SLURM_PROCID as well, but is in no step.
    has_step = "SLURM_STEP_ID" in environment and "SLURM_PROCID" in environment
    return has_step and whole_number(environment, "SLURM_STEP_NUM_TASKS", 1) > 1


def _task(environment: Mapping[str, str]) -> Place:
    tasks = tasks_per_node(environment["SLURM_STEP_TASKS_PER_NODE"])
    # SLURM_LAUNCH_NODE_IPADDR would be the host on which srun was written.
    host = hosts(environment["SLURM_STEP_NODELIST"])[0]
    bound = "SLURM_GPUS_PER_TASK" in environment or "gpu" in environment.get("SLURM_TRES_PER_TASK", "")
    return Place(
        "srun",
        int(environment["SLURM_PROCID"]),
        int(environment["SLURM_STEP_NUM_TASKS"]),
        int(environment["SLURM_LOCALID"]),
        tasks[int(environment["SLURM_NODEID"])],
        store_at=(host, port(int(environment["SLURM_JOB_ID"]), int(environment["SLURM_STEP_ID"]))),
        gpus_are_bound=bound or "SLURM_GPU_BIND" in environment,
    )


def warn_without_srun(environment: Mapping[str, str], count: int) -> None:
    """Say so where SLURM has given room for more ranks than the `count` that this start makes of it."""
    place = recognise(environment)
    tasks = whole_number(environment, "SLURM_NTASKS", 1) if "SLURM_JOB_ID" in environment else 1
    if place.started_by == "alone" and tasks > count:
        say(
            f"warning: the allocation has {tasks} tasks, started without srun: this is {count} rank"
            f"{'s' if count > 1 else ''} on one machine. Write srun python -m distaccum ..."
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
        if count > gpus and not place.sees_one_gpu():
            raise ConfigError(
                f"{count} ranks on this machine, but it has {gpus} GPU{'s' if gpus != 1 else ''}: each rank needs "
                f"its own. Start {gpus} or fewer per machine, or write device=cpu."
            )
    return count
