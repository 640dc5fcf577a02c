"""The program that measures checkpoints runs, and every window sends the same with and without
them."""

from __future__ import annotations

import json
from pathlib import Path

from commands import command_line

PROGRAM = Path(__file__).resolve().parents[2] / "benchmarks" / "checkpoint_cost.py"


def test_it_measures_and_finds_no_further_collective(tmp_path: Path) -> None:
    done = command_line(["--smoke", "--out", "found.json"], tmp_path, program=PROGRAM.read_text())
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert {name: len(seconds) for name, seconds in found["seconds"].items()} == dict.fromkeys(
        ["none", "foreground", "behind"], 1
    )
    # weights and AdamW's two moments, in float32
    assert found["checkpoint_bytes"] > 3 * 4 * found["parameters"]
    assert "collectives of every window, with and without checkpoints" in done.stdout
