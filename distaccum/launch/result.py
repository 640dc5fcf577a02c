"""Writes and reads a job's result, one small file in its run folder.

A file reaches whoever started the job, however it was started.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

FILE_NAME = "result.json"
_NOT_FINITE = ("nan", "inf", "-inf")  # JSON has no such numbers; they are written as texts


def write_result(run_dir: Path, values: Mapping[str, float | int | str | None]) -> None:
    """Write `run_dir/result.json` and replace an earlier one. Call it on rank 0, at the end.

    The file is written completely or not at all.

    Args:
        run_dir: An existing folder.
        values: Python numbers (no tensors), texts or None. A sweep passes one of them to its
            sweeper.
    """
    plain = {name: str(value) if _is_not_finite(value) else value for name, value in values.items()}
    draft = run_dir / f"{FILE_NAME}.draft"
    draft.write_text(json.dumps(plain, indent=2, allow_nan=False) + "\n")
    os.replace(draft, run_dir / FILE_NAME)


def read_result(run_dir: Path) -> dict[str, float | int | str | None] | None:
    """Return what `write_result` wrote, or None if nothing was written.

    Numbers that are not finite are returned as numbers again.
    """
    try:
        plain = json.loads((run_dir / FILE_NAME).read_text())
    except FileNotFoundError:
        return None
    return {name: float(value) if value in _NOT_FINITE else value for name, value in plain.items()}


def remove_result(run_dir: Path) -> None:
    """Remove the result that an earlier job left in the same folder."""
    (run_dir / FILE_NAME).unlink(missing_ok=True)


def _is_not_finite(value: float | int | str | None) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
