"""The program that compares predicted with measured times runs, and every window sends what was
predicted."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).resolve().parents[2] / "benchmarks" / "step_time.py"


@pytest.mark.nightly
def test_every_way_is_predicted_and_measured(tmp_path: Path) -> None:
    found_file, picture = tmp_path / "found.json", tmp_path / "found.png"
    words = [
        sys.executable,
        str(PROGRAM),
        "--smoke",
        "--out",
        str(found_file),
        "--plot",
        str(picture),
    ]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=110)
    assert done.returncode == 0, done.stderr
    assert "traffic as predicted, to the byte: 10 of 10" in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
    found = json.loads(found_file.read_text())
    (rate,) = found["rates"].values()
    ways = ["ddp", "ddp, T = 4", "fsdp boundary", "fsdp gather_once", "fsdp every"]
    assert [(row["way"], row["num_micro_batches"]) for row in rate["rows"]] == list(
        itertools.product(ways, [2, 8])
    )
    assert rate["profile"]["ranks"] == 2
    assert len(rate["micro_batch"]["seconds"]) == 2  # before the windows of each K
    for row in rate["rows"]:
        assert len(row["seconds"]) == 1
        assert row["predicted_s"] > 0
        assert row["traffic"]["predicted"] == row["traffic"]["counted"]


def test_without_root_it_says_what_it_needs(monkeypatch, capsys) -> None:
    monkeypatch.syspath_prepend(str(PROGRAM.parent))
    import step_time

    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(step_time.signal, "signal", lambda *unused: None)
    assert step_time.main([]) == 2
    assert "only root may make them" in capsys.readouterr().err
