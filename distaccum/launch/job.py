"""Defines a job, how it ended, and its result: one small file in its run folder.

A file reaches whoever started the job, however it was started.
"""

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed.distributed_c10d import Store

RESULT = "result.json"
_NOT_FINITE = ("nan", "inf", "-inf")  # JSON has no such numbers; they are written as texts
Result = dict[str, float | int | str | None]


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
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    gpu_index: int = 0  # this rank's GPU among those that it sees
    # For `dist.init_process_group(store=...)`, empty at the start of each job; None for one rank.
    store: Store | None = None


Task = Callable[[Job], None]
Check = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Ended:
    """Describes how a job ended."""

    code: int  # exit code of the first rank that failed, or 0
    error: str | None  # the error that this rank reported


def value_of(config: Any, key: str) -> Any:
    """Return the value of a dotted key in nested dicts, or None if there is no such key."""
    for part in key.split("."):
        config = config.get(part) if isinstance(config, dict) else None
    return config


def write_result(run_dir: Path, values: Mapping[str, float | int | str | None]) -> None:
    """Write `run_dir/result.json` and replace an earlier one. Call it on rank 0, at the end.

    Args:
        run_dir: An existing folder.
        values: Python numbers (no tensors), texts or None. A sweep passes one of them to its
            sweeper.
    """
    plain = {
        name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in values.items()
    }
    write_whole(run_dir / RESULT, json.dumps(plain, indent=2, allow_nan=False) + "\n")


def read_result(run_dir: Path) -> Result | None:
    """Return what `write_result` wrote, or None if nothing was written.

    Numbers that are not finite are returned as numbers again.
    """
    file = run_dir / RESULT
    if not file.exists():
        return None
    plain = json.loads(file.read_text())
    return {name: float(value) if value in _NOT_FINITE else value for name, value in plain.items()}


def write_whole(file: Path, text: str) -> None:
    """Write a file completely or not at all."""
    draft = file.with_name(f"{file.name}.draft")
    draft.write_text(text)
    os.replace(draft, file)
