"""The short forms of programs that have no test of their own: they run, and what they write is
complete."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from commands import command_line

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def smoke(name: str, folder: Path) -> dict[str, Any]:
    """What it writes, in a folder of its own."""
    program = (
        f"import sys\nsys.path.insert(0, {str(BENCHMARKS)!r})\nimport"
        f" {name}\nsys.exit({name}.main())\n"
    )
    done = command_line(["--smoke", "--out", "found.json"], folder, program=program)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    found: dict[str, Any] = json.loads((folder / "found.json").read_text())
    assert {"processor", "python", "torch", "commit", "date"} <= set(found["machine"])
    return found


def test_import_time(tmp_path: Path) -> None:
    found = smoke("import_time", tmp_path)
    assert {name: len(seconds) for name, seconds in found["seconds"].items()} == {
        "torch": 1,
        "distaccum": 1,
    }
    (ratio,) = found["ratios"]
    assert ratio == found["seconds"]["distaccum"][0] / found["seconds"]["torch"][0]


@pytest.mark.nightly
def test_verify_all(tmp_path: Path) -> None:
    found = smoke("verify_all", tmp_path)
    assert [(row["strategy"], row["sync"]) for row in found["rows"]] == [
        ("ddp", "boundary"), ("fsdp", "gather_once"), ("ddp", "every"), ("hsdp", "reduce_scatter"),
    ]  # fmt: skip
    assert all(row["holds"] and row["network_agrees"] for row in found["rows"])
    assert found["ranks"] == 2


def test_precisions(tmp_path: Path) -> None:
    found = smoke("precisions", tmp_path)
    assert len(found["rows"]) == 7
    for row in found["rows"]:
        assert row["constant gradient"] == {"1": 1.0, "2": 1.0}
        assert set(row["errors"]) == {"1", "2"}
        assert all(num_bytes == row["bytes"][part] for part, num_bytes in row["bytes held"].items())


def test_every_program_that_measures_has_a_short_form_that_is_run_here() -> None:
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    sources = {path.stem: path.read_text() for path in BENCHMARKS.glob("*.py")}
    programs = {
        name: source
        for name, source in sources.items()
        if '"--out"' in source and "__main__" in source
    }
    assert len(programs) >= 6
    for name, source in programs.items():
        assert '"--smoke"' in source or '"--tiny"' in source, f"{name}.py has no short form"
        assert re.search(rf'"{name}(\.py|\.sh)?"|from {name} import', tests), (
            f"no test runs {name}.py"
        )
