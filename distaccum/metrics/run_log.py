"""Writes and reads `metrics.jsonl`, the complete record of a run: one JSON object per line.

Each line is handed to the operating system before `write` returns, so a run that is killed loses
at most the line being written. W&B keeps its rows in memory for seconds: a run that was killed one
second after 100 rows had saved none of them. A crash of the machine may also lose lines that the
system has not yet written to the disk.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path

from distaccum.metrics.plain import to_plain

# JSON has no nan and no inf. Such a field is null, and this key holds its text: `{"loss": "nan"}`.
NON_FINITE = "non_finite"
# The kind of the record that replaces an incomplete line, which a killed run left.
TORN = "torn"
# The kind of the record that a run writes when it resumes from an earlier step; see `standing`.
RESUME = "resume"


class MetricsFile:
    """Appends records to a `metrics.jsonl`, on rank 0 only.

    Two writers would mix their lines. An incomplete last line, which a killed run left, is replaced
    by a record `{"kind": "torn", "bytes": n}`, so that each line is one JSON object when the run
    resumes. Disk errors (OSError) reach the caller, because a training must know that a record is
    missing. No part of such a record stays in the file.

    Args:
        path: the file, in an existing folder. It is made if it is missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        torn_bytes = _cut_torn_line(path)
        # Unbuffered: a buffer would keep bytes that could not be written, and write them later.
        self._file = path.open("ab", buffering=0)
        if torn_bytes:
            self.write(TORN, bytes=torn_bytes)

    def write(self, kind: str, /, **fields: object) -> None:
        """Append one record: `kind` ("step", "validation", ...), then the fields in their order.

        A top-level float that is not finite is written as null, and its text is stored under
        "non_finite". So each line is valid JSON for every reader, and `read_metrics` restores the
        float. Numbers must be Python numbers or subclasses of them. Other objects are written as
        text.

        Raises:
            ValueError: a field is named "kind" or "non_finite".
            OSError: the record could not be written.
        """
        taken = {"kind", NON_FINITE} & fields.keys()
        if taken:
            raise ValueError(
                f"A field of metrics.jsonl cannot be named {sorted(taken)}, because the format "
                "uses this name. Rename the field."
            )
        non_finite = {
            name: repr(float(x))
            for name, x in fields.items()
            if isinstance(x, float) and not math.isfinite(x)
        }
        record = {"kind": kind, **fields, **dict.fromkeys(non_finite)}
        if non_finite:
            record[NON_FINITE] = non_finite
        line = memoryview((json.dumps(to_plain(record), allow_nan=False) + "\n").encode())
        end = self._file.seek(0, os.SEEK_END)
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError:
            self._file.truncate(end)
            raise

    def close(self) -> None:
        """Close the file.

        A second call does nothing. A later `write` raises ValueError.
        """
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, object]]:
    """Read all records of a `metrics.jsonl`, oldest first, and restore floats that are not finite.

    An incomplete last line, which a killed run left, is not an error: the last record is then
    `{"kind": "torn", "bytes": n}`. The file is not changed.

    Raises:
        ValueError: a line other than the last is not a JSON object. The message names the file and
            the line.
        OSError: the file cannot be read.
    """
    records = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        record = _parsed(line)
        if record is not None:
            records.append(record)
        elif number == len(lines) and line:  # no newline follows: the run was killed while writing
            records.append({"kind": TORN, "bytes": len(line)})
        elif line.strip():
            raise ValueError(
                f"{path}, line {number}: expected a JSON object, got {line[:80]!r}. A run leaves "
                "at most its last line incomplete, so another program has written to this file. "
                "Remove the line to read the rest."
            )
    return records


def standing(records: Iterable[dict[str, object]]) -> list[dict[str, object]]:
    """Return the records without those of windows that a resumed run computed again.

    A killed run may have recorded windows that are later than its newest checkpoint. For each
    "resume" record, this function removes earlier records of windows after the one resumed from.
    """
    left: list[dict[str, object]] = []
    for record in records:
        if record["kind"] == RESUME:
            left = [kept for kept in left if not _is_later(kept, record)]
        left.append(record)
    return left


def _is_later(record: dict[str, object], resumed: dict[str, object]) -> bool:
    # Compares windows where it can, because a skipped window has the number of the previous step. A
    # validation record has the number of its step only.
    name = "window" if "window" in record and "window" in resumed else "step"
    step, last = record.get(name), resumed.get(name)
    return isinstance(step, int) and isinstance(last, int) and step > last


def _parsed(line: bytes) -> dict[str, object] | None:
    """Return the record of a line with its floats restored, or None if it is not a JSON object."""
    try:
        record = json.loads(line)
    except ValueError:  # includes UnicodeDecodeError
        return None
    if not isinstance(record, dict):
        return None
    non_finite = record.pop(NON_FINITE, {})
    return record | {name: float(text) for name, text in non_finite.items()}


def _cut_torn_line(path: Path) -> int:
    """Cut an incomplete last line off the file, and return the number of bytes that were cut."""
    content = path.read_bytes() if path.exists() else b""
    tail = content[content.rfind(b"\n") + 1 :]
    if not tail:
        return 0
    if _parsed(tail) is not None:  # complete, only its newline is missing
        with path.open("ab") as file:
            file.write(b"\n")
        return 0
    os.truncate(path, len(content) - len(tail))
    return len(tail)
