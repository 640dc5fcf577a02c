"""A job's result: one small file in its run folder, so that it reaches whoever started the job, however that was."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

FILE_NAME = "result.json"
_NOT_FINITE = ("nan", "inf", "-inf")  # JSON has no such numbers; metrics.jsonl writes them in the same way


def write_result(run_dir: Path, values: Mapping[str, float | int | str | None]) -> None:
    """Write `run_dir/result.json`, whole or not at all; an earlier one is replaced. Call it on rank 0, at the end.

    Args:
        run_dir: an existing folder.
        values: Python numbers (no tensors), texts or None. A sweep returns one of them to its sweeper.
    """
    plain = {name: str(value) if _is_not_finite(value) else value for name, value in values.items()}
    draft = run_dir / f"{FILE_NAME}.draft"
    draft.write_text(json.dumps(plain, indent=2, allow_nan=False) + "\n")
    os.replace(draft, run_dir / FILE_NAME)


def read_result(run_dir: Path) -> dict[str, float | int | str | None] | None:
    """What `write_result` wrote, numbers that are not finite included; None when nothing was written."""
    try:
        plain = json.loads((run_dir / FILE_NAME).read_text())
    except FileNotFoundError:
        return None
    return {name: float(value) if value in _NOT_FINITE else value for name, value in plain.items()}


def remove_result(run_dir: Path) -> None:
    """Forget what an earlier job has left in the same folder."""
    (run_dir / FILE_NAME).unlink(missing_ok=True)


def _is_not_finite(value: float | int | str | None) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
