"""`metrics.jsonl`: the truth about a run. One JSON object a line, handed to the system when `write` returns.

W&B keeps its rows in memory for seconds (a run killed a second after 100 rows had none of them); this file loses at
most the line being written. A crash of the machine may take what the system had not yet brought to the disk.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from distaccum.metrics.plain import to_plain

# Where JSON has no number (nan, inf) the field itself is null and its text stands here: `{"loss": "nan"}`.
NON_FINITE = "non_finite"
# The kind of the record that stands in for a line of which a killed run wrote only a part.
TORN = "torn"
# The kind of the record that a run writes when it goes on from an earlier step; see `standing`.
RESUME = "resume"


class MetricsFile:
    """Appends records to a file. For rank 0 only: two writers would tear each other's lines.

    The folder must exist. A torn last line of a killed run is replaced by a record `{"kind": "torn", "bytes": n}`, so
    that the file stays one JSON object a line when the run goes on. Errors of the disk (OSError) reach the caller: a
    training whose record cannot be written has to know. Nothing of such a record stays in the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        torn_bytes = _cut_torn_line(path)
        self._file = path.open("ab", buffering=0)  # a buffer would keep what could not be written
        if torn_bytes:
            self.write(TORN, bytes=torn_bytes)

    def write(self, kind: str, /, **fields: object) -> None:
        """Append one record: `kind` ("step", "heldout", ...), then the fields in the order given.

        A top-level float that is not finite is written as null and named under "non_finite", which keeps the line valid
        JSON for every reader; `read_metrics` gives the float back. Numbers must be Python's or subclasses of them;
        other objects are written as text.

        Raises:
            ValueError: a field is named "kind" or "non_finite".
            OSError: the disk did not take it.
        """
        taken = {"kind", NON_FINITE} & fields.keys()
        if taken:
            raise ValueError(
                f"metrics.jsonl: a field cannot be named {sorted(taken)}: the file uses it. Rename the field."
            )
        non_finite = {
            name: repr(float(x)) for name, x in fields.items() if isinstance(x, float) and not math.isfinite(x)
        }
        record: dict[str, object] = {"kind": kind}
        record.update((name, None if name in non_finite else to_plain(x)) for name, x in fields.items())
        if non_finite:
            record[NON_FINITE] = non_finite
        line = memoryview((json.dumps(record, allow_nan=False) + "\n").encode())
        end = self._file.seek(0, os.SEEK_END)
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError:
            self._file.truncate(end)
            raise

    def close(self) -> None:
        """Close the file. A second call does nothing; `write` afterwards raises ValueError."""
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, object]]:
    """Read all records of a `metrics.jsonl`, oldest first, floats that are not finite restored.

    A torn last line, as a killed run leaves it, is no error: a last record `{"kind": "torn", "bytes": n}` says that it
    was there. The file is not changed.

    Raises:
        ValueError: another line than the last is not a JSON object; names the file and the line.
        OSError: the file cannot be read.
    """
    return list(_records(path))


def standing(records: Iterable[dict[str, object]]) -> list[dict[str, object]]:
    """Without what a resumed run has done again: records of windows that came after the one it went on from.

    A run that was killed has recorded steps which its newest checkpoint does not have.
    """
    left: list[dict[str, object]] = []
    for record in records:
        if record["kind"] == RESUME:
            left = [kept for kept in left if not _is_later(kept, record)]
        left.append(record)
    return left


def _is_later(record: dict[str, object], resumed: dict[str, object]) -> bool:
    # Windows, as one that was skipped has the number of the step before it; a held-out loss has its step's number only.
    name = "window" if "window" in record and "window" in resumed else "step"
    step, last = record.get(name), resumed.get(name)
    return isinstance(step, int) and isinstance(last, int) and step > last


def _records(path: Path) -> Iterator[dict[str, object]]:
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        record = _parse(line)
        if record is not None:
            yield _restored(record)
        elif number == len(lines):  # no newline after it: the run was killed while it wrote
            yield {"kind": TORN, "bytes": len(line)}
        else:
            raise ValueError(
                f"{path}, line {number}: not a JSON object, got {line[:80]!r}. Only the last line may be incomplete; "
                "something else than distaccum has written here. Remove the line to read the rest."
            )


def _parse(line: bytes) -> dict[str, object] | None:
    try:
        record = json.loads(line)
    except ValueError:  # includes UnicodeDecodeError
        return None
    return record if isinstance(record, dict) else None


def _restored(record: dict[str, object]) -> dict[str, object]:
    non_finite = record.pop(NON_FINITE, {})
    assert isinstance(non_finite, dict), non_finite
    record.update((name, float(text)) for name, text in non_finite.items())
    return record


def _cut_torn_line(path: Path) -> int:
    """End the file at a whole line; return how many bytes of a torn one were cut away."""
    if not path.exists():
        return 0
    content = path.read_bytes()
    tail = content[content.rfind(b"\n") + 1 :]
    if not tail:
        return 0
    with path.open("r+b") as file:
        if _parse(tail) is not None:  # whole, only its newline is missing
            file.seek(0, 2)
            file.write(b"\n")
            return 0
        file.truncate(len(content) - len(tail))
    return len(tail)
