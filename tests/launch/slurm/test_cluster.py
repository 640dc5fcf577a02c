"""Jobs on a real SLURM cluster. All are submitted before the first is waited for, so that they
share the machine."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster import Cluster, Job

from distaccum.cli import main

ROOT = Path(__file__).resolve().parents[3]
# SGD in float64: what ranks add in another order differs by rounding only, and AdamW would divide
# by it.
SMALL = [
    "model.num_layers=1", "model.width=16", "data.seq_len=16", "loader.workers=0", "device=cpu",
    "precision=fp64", "optim=sgd", "optim.schedule.warmup=0", "accum.effective_batch_size=8",
    "accum.micro_batch_size=1", "train.steps=4", "train.validation_samples=4",
    "train.log_every_steps=1", "data=path", "data.path=text", "data.cache_dir=cache",
]  # fmt: skip
# 4 steps of sums of some thousand numbers, at 1.1e-16 each.
ROUNDING = 1e-12
# Of 64 micro-batches each, so that the signal arrives long before the last.
LONG = ["train.steps=40", "accum.effective_batch_size=64"]


class Jobs:
    """What was submitted, by the name of what it shows."""

    def __init__(self, cluster: Cluster, work: Path) -> None:
        self.cluster, self.work = cluster, work
        (work / "text").mkdir()
        for number in range(12):
            (work / "text" / f"{number}.txt").write_text(
                "the quick brown fox jumps over the lazy dog\n" * 20
            )
        two_nodes = ["--nodes=2", "--ntasks-per-node=1"]
        train, sweep = str(ROOT / "slurm" / "train.sbatch"), str(ROOT / "slurm" / "sweep.sbatch")
        self.paused = self.command("launch.nodes=2", "run_dir=runs/paused", *LONG)
        self.failing = cluster.submit(
            *two_nodes, train, *SMALL, "optim.lr=0.1",
            folder=work, PYTHON=self.lost_node(), RUN_DIR=str(work / "runs" / "failing"),
        )  # fmt: skip
        self.hanging = cluster.submit(
            *two_nodes, train, *SMALL, "optim.lr=0.1", "train.timeout_s=12",
            "+faults=[{rank: 1, step: 2, at: forward, kind: hang}]",
            folder=work, PYTHON=self.with_faults(), RUN_DIR=str(work / "runs" / "hanging"),
        )  # fmt: skip
        self.by_hand = self.shown_arguments(sweep)
        self.pause(self.paused, "paused")
        self.srun = self.command(
            "launch.nodes=2", "launch.tasks_per_node=2", "run_dir='runs/it\\'s 4 ranks'"
        )
        self.array = self.command("--multirun", "hydra.sweep.dir=sweeps/rates", "optim.lr=0.1,0.2")

    def command(self, *arguments: str) -> Job:
        """What `launch=slurm` submits, in this process, where torch is loaded already."""
        rate = [] if "--multirun" in arguments else ["optim.lr=0.1"]
        argv = [
            "distaccum",
            "train",
            *SMALL,
            *rate,
            "launch=slurm",
            "launch.time=30:00",
            *arguments,
        ]
        said = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
            patch.chdir(self.work)
            patch.setattr(sys, "argv", argv)
            for name in {*os.environ, *self.cluster.environment}:
                value = self.cluster.environment.get(name)
                patch.delenv(name) if value is None else patch.setenv(name, value)
            with pytest.raises(SystemExit) as end:
                main()
        found = re.search(r"^submitted (?:job )?(\d+)", said.getvalue(), re.MULTILINE)
        assert end.value.code == 0
        assert found, said.getvalue()
        assert f"scancel --signal=USR1 {found[1]}" in said.getvalue()
        return Job(self.cluster, found[1])

    @cached_property
    def torchrun(self) -> Job:
        """The long job under torchrun, submitted by hand: its run folder has its id."""
        job = self.cluster.submit(
            "--nodes=2", "--ntasks-per-node=1", str(ROOT / "slurm" / "train.sbatch"), *SMALL, *LONG,
            "optim.lr=0.1", folder=self.work, PYTHON=sys.executable, LAUNCHER="torchrun",
        )  # fmt: skip
        self.pause(job, f"slurm-{job.id}")
        return job

    def pause(self, job: Job, name: str) -> None:
        """Signal a long job when it is at work."""
        metrics = self.work / "runs" / name / "metrics.jsonl"
        job.until(lambda _: metrics.exists() and '"step": 3,' in metrics.read_text())
        self.cluster.run("scancel", "--signal=USR1", job.id)

    def lost_node(self) -> str:
        """An interpreter for which the second node lacks the data."""
        return self.script(
            "lost_node", f'[ "$SLURM_PROCID" = 1 ] && cd /\nexec {sys.executable} "$@"'
        )

    def with_faults(self) -> str:
        """An interpreter that starts tests/app/resume/program.py in place of the package (`-m
        distaccum`)."""
        program = ROOT / "tests" / "app" / "resume" / "program.py"
        return self.script("with_faults", f'shift 2\nexec {sys.executable} {program} "$@"')

    def shown_arguments(self, sweep: str) -> Job:
        """An array by hand whose program writes its arguments."""
        show = self.script("show", """for word in "$@"; do echo "<$word>"; done""")
        (self.work / "sweep.txt").write_text(
            "accum.micro_batch_size=1\naccum.micro_batch_size=2 'logger.run_name=\"a b\"'\n"
        )
        (self.work / "slurm").symlink_to(ROOT / "slurm")
        return self.cluster.submit(
            "--array=0-1", sweep, "sweep.txt", "train.steps=4", folder=self.work, PYTHON=show
        )

    def script(self, name: str, text: str) -> str:
        """An executable file."""
        file = self.work / name
        file.write_text(f"#!/bin/bash\n{text}\n")
        file.chmod(0o755)
        return str(file)


@pytest.fixture(scope="module")
def jobs(cluster: Cluster, work: Path) -> Iterator[Jobs]:
    """All jobs of this file."""
    return Jobs(cluster, work)


def records(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def losses(run_dir: Path) -> list[float]:
    """Of each step, and at last of the validation samples."""
    validation = json.loads((run_dir / "result.json").read_text())["validation_loss"]
    return [record["loss"] for record in records(run_dir, "step")] + [validation]


@pytest.fixture(scope="module")
def one_process(jobs: Jobs) -> list[float]:
    """The losses of the same training on one process: an element of the array has the same learning
    rate."""
    Job(jobs.cluster, f"{jobs.array.id}_0").wait("COMPLETED")
    return losses(jobs.work / "sweeps" / "rates" / "0")


def test_a_failing_rank_ends_the_job_with_its_own_error_first(jobs: Jobs) -> None:
    facts = jobs.failing.wait()
    assert (facts["JobState"], facts["ExitCode"]) == ("FAILED", "2:0"), jobs.failing.log()
    assert facts["Restarts"] == "0"
    log = jobs.failing.log()
    told = [line for line in log.splitlines() if "error" in line]
    assert told[0].startswith("error: "), log
    assert "text" in told[0]
    assert "Traceback" not in log


def test_a_hanging_rank_ends_the_job_and_is_named(jobs: Jobs) -> None:
    """It sleeps for ten minutes; the other one waits for train.timeout_s."""
    facts = jobs.hanging.wait()
    run_dir, log = jobs.work / "runs" / "hanging", jobs.hanging.log()
    assert (run_dir / "faults" / "rank-1-step-2.json").exists(), log
    assert (facts["JobState"], facts["ExitCode"]) == ("FAILED", "1:0"), log
    assert "a collective took longer than train.timeout_s=12: rank 1 did not join it" in " ".join(
        log.split()
    )
    assert "faults.py" in (run_dir / "stacks" / "rank-1.txt").read_text()
    assert (run_dir / "stacks" / "rank-0.txt").exists()


def test_a_rank_for_each_task_of_srun(jobs: Jobs, one_process: list[float]) -> None:
    jobs.srun.wait("COMPLETED")
    assert losses(jobs.work / "runs" / "it's 4 ranks") == pytest.approx(
        one_process, rel=ROUNDING, abs=0
    )
    assert "ddp, 4 rank(s) on cpu, gloo" in " ".join(jobs.srun.log().split())


def test_a_sweep_is_one_array(jobs: Jobs, one_process: list[float]) -> None:
    found = []
    for number in range(2):
        element = Job(jobs.cluster, f"{jobs.array.id}_{number}")
        element.wait("COMPLETED")
        run_dir = jobs.work / "sweeps" / "rates" / str(number)
        assert (run_dir / "job.log").read_text() == element.log()
        config = yaml.safe_load((run_dir / ".hydra" / "config.yaml").read_text())
        found.append((config["optim"]["lr"], config["logger"]["group"], losses(run_dir)[-1]))
    assert [(rate, group) for rate, group, _ in found] == [(0.1, "rates"), (0.2, "rates")]
    assert len({loss for _, _, loss in found}) == 2


def test_an_array_by_hand(jobs: Jobs) -> None:
    texts = []
    for number in range(2):
        element = Job(jobs.cluster, f"{jobs.by_hand.id}_{number}")
        element.wait("COMPLETED")
        texts.append(element.log().split("\n"))
    run_dirs = [
        f"<run_dir='{jobs.work}/runs/slurm-{jobs.by_hand.id}_{number}'>" for number in range(2)
    ]
    same = ["<-m>", "<distaccum>", "<train>", "<train.steps=4>"]
    assert texts[0] == [*same, "<accum.micro_batch_size=1>", "<launch=local>", run_dirs[0], ""]
    assert texts[1] == [
        *same,
        "<accum.micro_batch_size=2>",
        '<logger.run_name="a b">',
        "<launch=local>",
        run_dirs[1],
        "",
    ]


def end_of_second_start(job: Job) -> dict[str, str]:
    job.until(lambda facts: facts["Restarts"] == "1")
    return job.wait("COMPLETED")


@pytest.mark.parametrize("launcher", ["srun", pytest.param("torchrun", marks=pytest.mark.nightly)])
def test_a_paused_job_saves_is_queued_again_and_goes_on(jobs: Jobs, launcher: str) -> None:
    job = jobs.paused if launcher == "srun" else jobs.torchrun
    run_dir = jobs.work / "runs" / ("paused" if launcher == "srun" else f"slurm-{job.id}")
    facts = end_of_second_start(job)
    assert (facts["ExitCode"], facts["Restarts"]) == ("0:0", "1")
    assert not (run_dir / "PREEMPTED").exists()
    log = job.log()
    assert log.count("continues after step") == 1
    assert f"distaccum: job {job.id} saved and stopped; it is queued again" in log
    assert [record["step"] for record in records(run_dir, "step")] == list(range(1, 41))
    assert json.loads((run_dir / "result.json").read_text())["steps"] == 40


@pytest.mark.nightly
def test_srun_and_torchrun_train_the_same(jobs: Jobs) -> None:
    """The two paused jobs, wherever each was stopped. 40 steps of sums of some thousand numbers, at
    1.1e-16 each."""
    for job in (jobs.paused, jobs.torchrun):
        end_of_second_start(job)
    found = [losses(jobs.work / "runs" / name) for name in ("paused", f"slurm-{jobs.torchrun.id}")]
    assert found[1] == pytest.approx(found[0], rel=10 * ROUNDING, abs=0)
    assert "ddp, 2 rank(s) on cpu, gloo" in " ".join(jobs.torchrun.log().split())
