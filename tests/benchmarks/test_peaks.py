"""The program that measures memory runs, and in its short form too the predictions hold."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).resolve().parents[2] / "benchmarks" / "memory.py"


@pytest.mark.nightly
def test_it_measures_what_is_predicted(tmp_path: Path) -> None:
    words = [sys.executable, str(PROGRAM), "--smoke", "--out", str(tmp_path / "found.json")]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=115)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert [row["num_micro_batches"] for row in found["flat"]] == [1, 2, 4]
    assert len(found["table"]) == 8
    assert len(found["spread"]) == 9
    for row in [*found["flat"], *found["table"], *found["spread"]]:
        assert 0.9 < row["predicted"] / row["measured"] < 1.1, row
    peaks = [row["measured"] for row in found["flat"]]
    assert peaks[1] > peaks[0]
    assert abs(peaks[2] / peaks[1] - 1) < 0.01
    assert (tmp_path / "found.png").stat().st_size > 0
