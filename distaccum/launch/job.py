"""What one job is: the values that pass between the rank that runs Hydra and the ranks that work."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch.distributed.distributed_c10d import Store


@dataclass(frozen=True)
class Job:
    """What a task gets on each rank. All but the five numbers of the rank is identical on every rank.

    `config` holds plain containers, resolved. Its keys are text, because it has travelled as JSON.
    """

    config: dict[str, Any]
    run_dir: Path  # absolute; made once, by Hydra
    overrides: list[str]  # what the user wrote for this job
    number: int  # 0, or the number within a sweep
    sweep: str | None  # the name of the sweep, which is that of its folder; None for a single run
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    gpu_index: int  # this rank's GPU, among those that it sees
    store: Store | None  # None for one rank; otherwise for `dist.init_process_group(store=...)`, empty for each job


Task = Callable[[Job], None]
Check = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Ended:
    """How a job ended."""

    code: int  # the exit code of its first rank that failed, or 0
    error: str | None  # what that rank said


@dataclass(frozen=True)
class Order:
    """A job without the facts of a rank: what rank 0 composed and publishes."""

    config: dict[str, Any]
    run_dir: str
    overrides: list[str]
    number: int
    sweep: str | None

    def to_json(self) -> str:
        """The order as text. TypeError for values that are not plain."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> "Order":
        """The inverse of `to_json`."""
        return Order(**json.loads(text))
