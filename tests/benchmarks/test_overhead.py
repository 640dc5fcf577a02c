"""The program that measures overhead runs, and all arms that are measured train the same
parameters."""

from __future__ import annotations

import json
from pathlib import Path

from commands import command_line

PROGRAM = Path(__file__).resolve().parents[2] / "benchmarks" / "overhead.py"
OWN = [
    "hand loop",
    "hand loop, lists",
    "hand loop with loss and norm",
    "ours",
    "ours, lists",
    "ours, keyed randomness",
]
PEER = "Accelerate"
SETTINGS = ["empty, 1 process", "gpt, 1 process", "empty, 2 ranks, DDP"]


def test_it_measures_loops_that_train_the_same(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    arms = [*OWN, PEER, "DeepSpeed"]
    done = command_line(["--smoke", "--out", str(out), "--only", *arms], tmp_path, PROGRAM)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    assert list(found["settings"]) == SETTINGS
    for title, measured in found["settings"].items():
        assert set(measured) == set(arms)
        for name in [*OWN, PEER]:
            arm = measured[name]
            assert arm["status"] == "measured", (title, name, arm)
            assert arm["equal"], (title, name, arm)
            assert len(arm["us_per_micro_batch"]) == len(arm["ratio"]) == found["rounds"]
        assert measured["DeepSpeed"]["status"] in ("measured", "not installed (deepspeed)")
        assert measured["hand loop"]["ratio"] == [1.0] * found["rounds"]
