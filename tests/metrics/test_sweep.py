"""What a sweep tells at its end: table, sweep.csv, sweep.png."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path
from typing import Literal

import pytest
from matplotlib.figure import Figure

from distaccum.metrics.sweep import (
    JobOutcome,
    Sweep,
    described,
    draw_sweep,
    report_sweep,
    swept_keys,
    write_csv,
)


def job(
    number: int,
    overrides: tuple[str, ...],
    result: dict[str, float | int | str | None] | None = None,
    status: Literal["done", "failed", "interrupted"] = "done",
    exit_code: int = 0,
    error: str | None = None,
) -> JobOutcome:
    return JobOutcome(number, overrides, Path("somewhere"), status, exit_code, error, result or {})


def of(loss: float, rate: float = 10.0) -> dict[str, float | int | str | None]:
    return {"validation_loss": loss, "samples_per_s": rate, "steps": 3}


JOBS = (
    job(0, ("lr=0.001", "model=gpt", "a.b=1"), of(2.5, 123.44)),
    job(1, ("lr=0.00012345678901234", "model=gpt", "a.b=1"), of(math.nan)),
    job(2, ("lr=10", "model=gpt", "a.b=1"), {}, "failed", 1, 'OSError: no "disk", none'),
    job(3, ("lr=0.1", "model=gpt", "a.b=1"), of(1.25), "interrupted", 143),
    job(4, ("lr=1", "model=gpt", "a.b=1"), of(2.25)),
)


def test_table() -> None:
    assert described(JOBS).splitlines() == [
        "sweep: 5 jobs, 3 done, 1 failed, 1 interrupted",
        "job  lr          validation loss  samples/s  status",
        "---  ----------  ---------------  ---------  --------------------------------",
        "0    0.001       2.5000           123.4      done",
        "1    0.00012346  nan              10.0       done",
        '2    10          -                -          failed: OSError: no "disk", none',
        "3    0.1         1.2500           10.0       interrupted",
        "4    1           2.2500           10.0       done",
        "lowest validation loss: 2.2500, job 4",
    ]


def test_keys_that_are_added_deleted_or_left_out() -> None:
    jobs = (job(0, ("+a=1", "~b", "c=x=y", "d=1")), job(1, ("+a=1", "c=x=z", "d=1")))
    assert swept_keys(jobs) == ["b", "c"]
    assert described(jobs).splitlines()[1:] == [
        "job  b        c    status",
        "---  -------  ---  ------",
        "0    deleted  x=y  done",
        "1    -        x=z  done",
    ]
    assert described(jobs[:1]).splitlines()[1:] == [
        "job  status",
        "---  ------",
        "0    done",
    ]


def test_csv_has_a_row_for_each_job_and_a_column_for_each_key(tmp_path: Path) -> None:
    write_csv(tmp_path / "sweep.csv", JOBS)
    with (tmp_path / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [
        *("job", "lr", "model", "a.b", "status", "exit_code"),
        *("validation_loss", "samples_per_s", "steps", "error", "run_dir"),
    ]
    assert [row["job"] for row in rows] == ["0", "1", "2", "3", "4"]
    assert rows[1]["lr"] == "0.00012345678901234"
    assert rows[2]["error"] == 'OSError: no "disk", none'
    assert (rows[2]["validation_loss"], rows[2]["exit_code"]) == ("", "1")
    assert (rows[4]["validation_loss"], rows[4]["steps"], rows[4]["error"]) == ("2.25", "3", "")


def test_picture_shows_every_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two keys, numbers over a large span and names; failed jobs as crosses; what is drawn is what
    was measured."""
    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure,
        "savefig",
        lambda figure, *args, **kwargs: drawn.append(figure) or save(figure, *args, **kwargs),
    )
    jobs = (
        job(0, ("lr=0.01", "optim=sgd"), of(3.0, 10.0)),
        job(1, ("lr=1", "optim=adamw"), of(2.0, 20.0)),
        job(2, ("lr=0.1", "optim=sgd"), {}, "failed"),
    )
    draw_sweep(tmp_path / "a.png", jobs)
    loss_lr, loss_optim, rate_lr, _ = drawn[0].axes
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    assert loss_lr.lines[0].get_xydata().tolist() == [[0.01, 3.0], [1.0, 2.0]]
    assert loss_lr.lines[1].get_xdata().tolist() == [0.1]
    assert (loss_lr.get_xscale(), rate_lr.get_xlabel()) == ("log", "lr")
    assert rate_lr.lines[0].get_ydata().tolist() == [10.0, 20.0]
    assert loss_optim.lines[0].get_xydata().tolist() == [[0.0, 3.0], [1.0, 2.0]]
    assert [label.get_text() for label in drawn[0].axes[3].get_xticklabels()] == ["sgd", "adamw"]


@pytest.mark.parametrize("jobs", [JOBS, JOBS[:1], JOBS[2:3]], ids=["five", "one", "one-failed"])
def test_all_of_it(tmp_path: Path, jobs: tuple[JobOutcome, ...]) -> None:
    out = io.StringIO()
    report_sweep(Sweep(tmp_path, jobs), out)
    drawn = ["sweep.png"] if any(job.result for job in jobs) else []
    assert sorted(file.name for file in tmp_path.iterdir()) == ["sweep.csv", *drawn]
    assert out.getvalue() == f"{described(jobs)}\nsweep folder: {tmp_path}\n"


def test_a_picture_that_fails_is_told_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "sweep.png").mkdir()
    out = io.StringIO()
    report_sweep(Sweep(tmp_path, JOBS), out)
    assert "sweep.png was not drawn (IsADirectoryError" in out.getvalue()
    assert (tmp_path / "sweep.csv").exists()
