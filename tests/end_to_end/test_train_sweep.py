"""A sweep of the real training: a folder for each job, a table, and the files at its end."""

from __future__ import annotations

import csv
from pathlib import Path

from commands import command_line
from test_house import SMALL


def test_two_trainings_and_one_refusal(tmp_path: Path) -> None:
    command = [
        "train",
        *SMALL,
        "device=cpu",
        "logger=wandb",
        "--multirun",
        "accum.gradient_accumulation_steps=1,2,0",
    ]
    done = command_line(command, tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr  # because of the refusal
    (folder,) = tmp_path.glob("sweeps/*")
    with (folder / "sweep.csv").open() as file:
        one, two, none = csv.DictReader(file)
    assert [row["status"] for row in (one, two, none)] == ["done", "done", "failed"]
    assert [row["accum.gradient_accumulation_steps"] for row in (one, two, none)] == ["1", "2", "0"]
    assert "gradient_accumulation_steps" in none["error"]
    for row in (one, two):
        assert 0 < float(row["validation_loss"]) < 10
        assert float(row["samples_per_s"]) > 0
        assert row["steps"] == "2"
        assert (Path(row["run_dir"]) / "metrics.jsonl").exists()
        (run,) = Path(row["run_dir"]).glob("wandb/offline-run-*/run-*.wandb")
        assert folder.name.encode() in run.read_bytes()  # W&B's group; a Record keeps text as it is
    assert one["validation_loss"] != two["validation_loss"]  # of 2 x 2 and of 2 x 4 samples
    assert (folder / "sweep.png").exists()
    assert "sweep: 3 jobs, 2 done, 1 failed" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
