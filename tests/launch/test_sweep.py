"""Sweeps: what becomes of each job, of the sweep when a job fails or a signal comes, and what the
sweeper gets."""

import csv
import math
import os
import signal

import pytest
import yaml

from distaccum.errors import ConfigError
from distaccum.launch import read_result, write_result
from distaccum.launch.job import Ended
from distaccum.launch.sweep import Outcomes

from .programs import alive, assert_one_job, by_hand, seen, wait_for_ranks, wait_until_gone


def folder_of(program):
    (folder,) = program.folder.glob("sweeps/*/*")
    return folder


def rows_of(program):
    with (folder_of(program) / "sweep.csv").open() as file:
        return list(csv.DictReader(file))


def table_of(program):
    lines = program.output.splitlines()
    return [line for line in lines if line[:1].isdigit()]


@pytest.fixture
def folders(tmp_path):
    """A folder for each program of a test."""
    made = [tmp_path / name for name in ("a", "b", "c", "d")]
    for folder in made:
        folder.mkdir()
    return made


def test_result_round_trip(tmp_path):
    assert read_result(tmp_path) is None
    values = {
        "validation_loss": math.nan,
        "best": -math.inf,
        "steps": 3,
        "reason": "nancy",
        "none": None,
        "x": 0.1,
    }
    write_result(tmp_path, {"old": 1})
    write_result(tmp_path, values)
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]
    text = (tmp_path / "result.json").read_text()
    assert '"validation_loss": "nan"' in text  # JSON proper has no NaN
    read = read_result(tmp_path)
    assert math.isnan(read.pop("validation_loss"))
    del values["validation_loss"]
    assert read == values


def test_what_the_sweeper_gets(tmp_path):
    """The objective of a job that is done; nothing where it failed, is not finite, or left only an
    old result."""
    outcomes = Outcomes("validation_loss")

    def job(values, code=0, error=None, raised=None):
        def do():
            if values is not None:
                write_result(tmp_path, values)
            if raised is not None:
                raise raised
            return Ended(code, error)

        outcomes.run(len(outcomes.jobs), ["a=1"], tmp_path, tmp_path, do)
        return outcomes.last_objective()

    assert job({"validation_loss": 1.5}) == 1.5
    assert job(None) is None
    assert job({"validation_loss": math.nan}) is None
    assert job({"validation_loss": "low"}) is None
    assert outcomes.exit_code(0) == 0
    assert job({"validation_loss": 0.5}, code=3, error="late\nand long") is None
    assert job({"validation_loss": 0.5}, raised=ConfigError("no")) is None
    with pytest.raises(SystemExit):
        job({"validation_loss": 0.5}, raised=SystemExit(143))
    assert outcomes.last_objective() is None
    told = [(one.status, one.exit_code, one.error) for one in outcomes.jobs[4:]]
    assert told == [("failed", 3, "late"), ("failed", 2, "no"), ("interrupted", 143, None)]
    assert outcomes.exit_code(0) == 143
    del outcomes.jobs[-1]
    assert outcomes.exit_code(0) == 1


def test_a_job_that_fails_ends_only_itself(start, folders):
    """Own ranks: a rank raises, the check refuses. torchrun: a rank is killed, a rank raises while
    the other one does not notice; torchrun keeps its ranks throughout."""
    own = start(
        "-m",
        "fault.kind=raise,none",
        "value=1,-1",
        "fault.rank=1",
        "launch.nproc_per_node=2",
        folder=folders[0],
    )
    torchrun = start(
        "--multirun",
        "fault.kind=choice(none,kill,desert)",
        "value=range(3,4)",
        "fault.rank=1",
        torchrun=2,
        folder=folders[1],
    )

    assert own.wait().code == 1
    raised, refused, done, refused_too = rows_of(own)
    assert [row["status"] for row in (raised, refused, done, refused_too)] == [
        "failed",
        "failed",
        "done",
        "failed",
    ]
    assert (raised["error"], raised["exit_code"]) == (
        "ArithmeticError: the culprit's own error",
        "1",
    )
    assert (refused["error"], refused["exit_code"]) == ("value (-1) must be 0 or more.", "2")
    assert (done["validation_loss"], done["samples_per_s"], done["error"]) == ("1.0", "10.0", "")
    assert (done["fault.kind"], done["value"], done["launch.nproc_per_node"]) == ("none", "1", "2")
    ranks = seen(own.folder)
    for number in (0, 2):
        job = [rank for rank in ranks if rank["number"] == number]
        assert_one_job(job, 2)
        assert {rank["threads"] for rank in job} == {str(max(1, len(os.sched_getaffinity(0)) // 2))}
    assert {rank["sweep"] for rank in ranks} == {folder_of(own).name}

    assert torchrun.wait().code == 1
    rows = rows_of(torchrun)
    assert [row["status"] for row in rows] == ["done", "failed", "failed"]
    assert (
        rows[1]["error"]
        == "rank 1 was ended by SIGKILL (possibly manually, or by the system for lack of memory)"
    )
    assert rows[2]["error"] == "ArithmeticError: the culprit's own error"
    for number in range(3):
        job = [rank for rank in seen(torchrun.folder) if rank["number"] == number]
        assert_one_job(job, 2)
        assert {rank["run_dir"] for rank in job} == {str(folder_of(torchrun) / str(number))}
    parents = [
        {rank["parent"] for rank in seen(torchrun.folder) if rank["rank"] == number}
        for number in range(2)
    ]
    assert [len(found) for found in parents] == [1, 1]

    for program in (own, torchrun):
        assert (folder_of(program) / "sweep.png").read_bytes()[:4] == b"\x89PNG"
        assert len(table_of(program)) == len(rows_of(program))
        assert program.output.count("[rank 1] ArithmeticError: the culprit's own error") == 1
        assert "[rank 0] Traceback" not in program.output
    assert "Traceback (most recent call last)" not in own.output.replace("[rank 1] Traceback", "")


def test_a_sweep_on_ranks_that_its_jobs_cannot_use_is_refused_once(start, tmp_path):
    programs = by_hand(start, 2, "--multirun", "value=1,2")
    assert [program.wait().code for program in programs] == [2, 2]
    assert programs[0].output.startswith(
        "error: --multirun cannot use the 2 ranks that environment variables have"
    )
    assert "launch.nproc_per_node=N" in programs[0].output
    assert programs[1].output == ""
    assert seen(tmp_path) == []


def test_a_signal_ends_a_sweep_at_once(start, folders):
    """Nothing is left, no further job begins, and what was done is told."""
    sweep = ("--multirun", "value=1,2", "fault.kind=sleep")
    programs = [
        start(*sweep, "launch.nproc_per_node=2", folder=folders[0]),
        start(*sweep, folder=folders[1]),
        start(*sweep, torchrun=2, folder=folders[2]),
        start(*sweep, torchrun=2, folder=folders[3]),
    ]
    ranks = [
        wait_for_ranks(folder, count, 60)
        for folder, count in zip(folders, (2, 1, 2, 2), strict=True)
    ]
    programs[0].signal(signal.SIGINT)
    programs[1].signal(signal.SIGTERM)
    programs[2].signal(signal.SIGTERM)
    os.killpg(programs[3].pid, signal.SIGINT)  # as a terminal does
    codes = [program.wait(10).code for program in programs]
    assert codes[:2] == [130, 143]
    assert 0 not in codes
    for number, program, found in zip((130, 143, 143, 130), programs, ranks, strict=True):
        wait_until_gone(
            [pid for rank in found for pid in (rank["pid"], rank["parent"])], timeout_s=5
        )
        assert {rank["number"] for rank in seen(program.folder)} == {0}
        (row,) = rows_of(program)
        assert (row["status"], row["exit_code"]) == ("interrupted", str(number))
        assert len(table_of(program)) == 1
    assert "Traceback" not in programs[0].output + programs[1].output


def test_optuna_chooses_by_the_result_and_sees_no_number_of_a_job_that_failed(start):
    """The objective is (value - 2)^2; -1 is refused. Its failure neither ends the study nor counts
    as a measurement."""
    program = start(
        "--multirun",
        "hydra/sweeper=optuna",
        "hydra/sweeper/sampler=grid",
        "hydra.sweeper.n_trials=3",
        "value=choice(-1,0,2)",
    ).wait()
    assert program.code == 1
    rows = {row["value"]: row for row in rows_of(program)}
    assert {value: row["validation_loss"] for value, row in rows.items()} == {
        "-1": "",
        "0": "4.0",
        "2": "0.0",
    }
    assert rows["-1"]["status"] == "failed"
    # a grid is walked in random order, and the sweeper cannot end it with a failure
    if rows["-1"]["job"] == "2":
        assert "the last job of the grid failed" in program.output
    else:
        best = yaml.safe_load((folder_of(program) / "optimization_results.yaml").read_text())
        assert (best["best_params"], best["best_value"]) == ({"value": 2}, 0.0)
    assert "Traceback" not in program.output
    assert not any(alive(rank["pid"]) for rank in seen(program.folder))
