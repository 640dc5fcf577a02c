"""Determines this process's rank, who started it, and how many ranks a configuration asks for."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.distributed.distributed_c10d import Store

from ..errors import ConfigError
from .failure import say
from .job import Job, value_of
from .slurm_names import first_host, port, tasks_per_node


@dataclass(frozen=True)
class Place:
    """Describes the rank of this process within its start."""

    started_by: str  # "alone" | "torchrun" | "srun" | "environment"
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    store_at: tuple[str, int] | None = None  # host, port of rank 0 if not in torch's variables
    gpus_are_bound: bool = False  # whether each rank may see only its own GPU

    def job(self, job: Job, store: Store | None) -> Job:
        """Return a job as this rank sees it."""
        return replace(
            job,
            rank=self.rank,
            world_size=self.world_size,
            local_rank=self.local_rank,
            local_world_size=self.local_world_size,
            gpu_index=0 if self.sees_one_gpu() else self.local_rank,
            store=store,
        )

    def check_sweep(self) -> None:
        """Check that a sweep can be run here.

        Raises:
            ConfigError: A launcher has started ranks that the jobs of a sweep cannot use.
        """
        is_one_machine = self.started_by == "torchrun" and self.local_world_size == self.world_size
        if self.world_size > 1 and not is_one_machine:
            starter = (
                "environment variables have"
                if self.started_by == "environment"
                else f"{self.started_by} has"
            )
            raise ConfigError(
                f"--multirun cannot use the {self.world_size} ranks that {starter} "
                "started: each job of a sweep starts its own ranks, on one machine. Start one "
                "process and write launch.nproc_per_node=N, or submit the sweep with launch=slurm, "
                "as one job array that may use several machines."
            )

    def sees_one_gpu(self) -> bool:
        """Return whether this rank sees only its own GPU, whatever other ranks see."""
        return self.gpus_are_bound and torch.cuda.device_count() == 1

    def rendezvous(self) -> dict[str, str]:
        """Return the variables by which torch connects the ranks, if the environment lacks them."""
        if self.store_at is None:
            return {}
        host, port = self.store_at
        numbers = {"MASTER_PORT": port, "RANK": self.rank, "WORLD_SIZE": self.world_size}
        return {"MASTER_ADDR": host, **{name: str(number) for name, number in numbers.items()}}


def detect_launcher(environment: Mapping[str, str]) -> Place:
    """Determine from the environment alone who started this process and which rank it is.

    No other function knows the kinds of launchers. torchrun (and torch's elastic launch in general)
    identifies itself, also inside a task of srun. A task of srun is a rank if its step has several
    tasks; then the first host of the step hosts the store. RANK and WORLD_SIZE without these signs
    were set manually, together with MASTER_ADDR and MASTER_PORT, and rank 0 hosts the store.

    Raises:
        ConfigError: A variable is missing, is empty, is not a number, or contradicts another one.
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
            f"LOCAL_WORLD_SIZE={local_world_size} is set and LOCAL_RANK is not. Set LOCAL_RANK to "
            f"this process's number on its machine, from 0 to {local_world_size - 1}."
        )
    total_name = "LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in environment else "WORLD_SIZE"
    local_rank = _below(environment, "LOCAL_RANK", total_name, local_world_size, default=rank)
    started_by = "torchrun" if "TORCHELASTIC_RUN_ID" in environment else "environment"
    if world_size > 1 and started_by == "environment":
        _check_meeting_point(environment)
    return Place(started_by, rank, world_size, local_rank, local_world_size)


_NEEDED = (
    "Without torchrun, each process needs RANK (0, 1, ...), WORLD_SIZE (the number of processes), "
    "MASTER_ADDR (the host of rank 0) and MASTER_PORT (a free port there). For a single process, "
    "unset all four: env -u RANK -u WORLD_SIZE -u MASTER_ADDR -u MASTER_PORT ..."
)
_RELATED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def whole_number(
    environment: Mapping[str, str], name: str, default: int | None = None, at_least: int = 0
) -> int:
    """Read a whole number from an environment variable.

    Raises:
        ConfigError: The variable is missing and has no default, is empty, or holds something else.
    """
    text = environment.get(name)
    if text is None and default is not None:
        return default
    if text is None:
        related = ", ".join(other for other in _RELATED if other in environment)
        raise ConfigError(
            f"{name} is not set, although related variables ({related}) are. {_NEEDED}"
        )
    if re.fullmatch(r"[0-9]{1,9}", text) is None or int(text) < at_least:
        raise ConfigError(
            f"The environment has {name}={text!r}; it must be a whole number, {at_least} or more. "
            f"{_NEEDED}"
        )
    return int(text)


def _below(
    environment: Mapping[str, str],
    name: str,
    total_name: str,
    total: int,
    default: int | None = None,
) -> int:
    """Read a rank, which must be less than the number of ranks."""
    rank = whole_number(environment, name, default)
    if rank >= total:
        raise ConfigError(
            f"The environment has {name}={rank} and {total_name}={total}: ranks are numbered from "
            f"0 to {total_name} - 1, which is {total - 1}. {_NEEDED}"
        )
    return rank


def _check_meeting_point(environment: Mapping[str, str]) -> None:
    if not environment.get("MASTER_ADDR", "").strip():
        given = "is empty" if "MASTER_ADDR" in environment else "is missing"
        raise ConfigError(f"MASTER_ADDR {given} in the environment. {_NEEDED}")
    if whole_number(environment, "MASTER_PORT", at_least=1) >= 1 << 16:
        raise ConfigError(
            f"MASTER_PORT={environment['MASTER_PORT']} is not a port: ports end at 65535. {_NEEDED}"
        )


def _is_one_of_several_tasks(environment: Mapping[str, str]) -> bool:
    # The shell of a batch job also has SLURM_PROCID, but it is not in a step.
    has_step = "SLURM_STEP_ID" in environment and "SLURM_PROCID" in environment
    return has_step and whole_number(environment, "SLURM_STEP_NUM_TASKS", 1) > 1


def _task(environment: Mapping[str, str]) -> Place:
    tasks = tasks_per_node(environment["SLURM_STEP_TASKS_PER_NODE"])
    # SLURM_LAUNCH_NODE_IPADDR would be the host on which srun was called.
    host = first_host(environment["SLURM_STEP_NODELIST"])
    bound = "SLURM_GPUS_PER_TASK" in environment or "gpu" in environment.get(
        "SLURM_TRES_PER_TASK", ""
    )
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
    """Warn if SLURM has allocated more tasks than the `count` ranks of this start."""
    place = detect_launcher(environment)
    tasks = whole_number(environment, "SLURM_NTASKS", 1) if "SLURM_JOB_ID" in environment else 1
    if place.started_by == "alone" and tasks > count:
        say(
            f"warning: the allocation has {tasks} tasks, but this start without srun has {count} "
            f"rank{'s' if count > 1 else ''} on one machine. To use all tasks: srun python -m "
            "distaccum ..."
        )


def ranks_here(config: dict[str, Any], place: Place) -> int:
    """Return how many ranks this machine runs for this configuration.

    The result depends only on the arguments and on the number of GPUs.

    Raises:
        ConfigError: The launcher or the number of GPUs does not allow what the configuration asks
            for.
    """
    given = value_of(config, "launch.nproc_per_node")
    if given is not None and (isinstance(given, bool) or not isinstance(given, int) or given < 1):
        raise ConfigError(
            f"launch.nproc_per_node ({given!r}) must be a whole number of ranks, 1 or more, or "
            "null."
        )
    if place.started_by != "alone":
        if given is not None and given != place.local_world_size:
            raise ConfigError(
                f"launch.nproc_per_node ({given}) differs from the {place.local_world_size} ranks "
                f"per node that {place.started_by} has started. Leave launch.nproc_per_node out, "
                "or start with `python -m distaccum`."
            )
        given = place.local_world_size
    count = given or 1
    if config.get("device", "auto") != "cpu" and torch.cuda.is_available():
        gpus = torch.cuda.device_count()
        if count > gpus and not place.sees_one_gpu():
            raise ConfigError(
                f"There would be {count} ranks on this machine, but it has {gpus} "
                f"GPU{'s' if gpus != 1 else ''}: each rank needs its own. Start {gpus} or fewer "
                "per machine, or write device=cpu."
            )
    return count
