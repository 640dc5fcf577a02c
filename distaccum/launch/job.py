"""Defines a job: the values that pass between the rank that runs Hydra and the ranks that work."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch.distributed.distributed_c10d import Store


@dataclass(frozen=True)
class Job:
    """Holds what a task gets on each rank.

    The fields up to `sweep` are identical on every rank; the others describe the rank. `config`
    holds plain, resolved containers. Its keys are texts, because it is sent as JSON.
    """

    config: dict[str, Any]
    run_dir: Path  # absolute; Hydra makes it once
    overrides: list[str]  # what the user wrote for this job
    number: int  # the job's number within a sweep; 0 for a single run
    sweep: str | None  # the sweep's name, which is its folder's; None for a single run
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    gpu_index: int  # this rank's GPU among those that it sees
    # For `dist.init_process_group(store=...)`, empty at the start of each job; None for one rank.
    store: Store | None


Task = Callable[[Job], None]
Check = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Ended:
    """Describes how a job ended."""

    code: int  # exit code of the first rank that failed, or 0
    error: str | None  # the error that this rank reported


@dataclass(frozen=True)
class Order:
    """Describes a job without the values of a rank: what rank 0 composed and publishes."""

    config: dict[str, Any]
    run_dir: str
    overrides: list[str]
    number: int
    sweep: str | None

    def to_json(self) -> str:
        """Return the order as JSON text.

        Raises:
            TypeError: The configuration holds values that JSON cannot express.
        """
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> "Order":
        """Return the order that `to_json` wrote."""
        return Order(**json.loads(text))
