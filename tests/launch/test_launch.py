"""How a job starts and how it ends, judged by what its ranks wrote. Real processes, save where only Hydra acts."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from distaccum.errors import ConfigError
from distaccum.launch import launch
from distaccum.launch.ranks import Place, ranks_here, recognise

HERE = Path(__file__).parent
PROGRAM = str(HERE / "program.py")
OF_A_LAUNCHER = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "OMP_NUM_THREADS",
)


class Program:
    """One start of program.py; its output goes to a file."""

    def __init__(self, folder, *args, torchrun=0, environment=None):
        starter = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={torchrun}"] if torchrun else []
        clean = {key: value for key, value in os.environ.items() if key not in OF_A_LAUNCHER}
        if torchrun:
            clean["OMP_NUM_THREADS"] = "1"  # or torchrun prints its advice
        self.folder = folder
        self.output_file = folder / f"output{time.monotonic_ns()}"
        with self.output_file.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, *starter, PROGRAM, *args],
                cwd=folder,
                env=clean | (environment or {}),
                stdout=output,
                stderr=output,
                start_new_session=True,  # a signal to pytest's group does not reach it
            )

    def wait(self, timeout_s=40):
        self.process.wait(timeout_s)
        return self

    @property
    def code(self):
        return self.process.returncode

    @property
    def output(self):
        return self.output_file.read_text()

    def own_output(self):
        """The output up to torchrun's summary, without its warnings."""
        own = self.output.split("Traceback (most recent call last):\n  File")[0]
        return [line for line in own.splitlines() if line and line[0] not in "WE"]


@pytest.fixture
def start(tmp_path):
    programs = []

    def begin(*args, **kwargs):
        programs.append(Program(tmp_path, *args, **kwargs))
        return programs[-1]

    yield begin
    for program in programs:
        if program.process.poll() is None:
            program.process.kill()
            program.process.wait()
    for rank in seen(tmp_path):
        if alive(rank["pid"]) and rank["pid"] != os.getpid():
            os.kill(rank["pid"], signal.SIGKILL)


def seen(folder):
    """What the ranks of all jobs wrote."""
    return [json.loads(file.read_text()) for file in sorted(folder.glob("*/*/*/**/rank*.json"))]


def wait_for_ranks(folder, count, timeout_s=30):
    end = time.monotonic() + timeout_s
    while len(ranks := seen(folder)) < count:
        assert time.monotonic() < end, f"{len(ranks)} of {count} ranks wrote something"
        time.sleep(0.05)
    return ranks


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def wait_until_gone(pids, timeout_s=10):
    end = time.monotonic() + timeout_s
    while left := [pid for pid in pids if alive(pid)]:
        assert time.monotonic() < end, f"orphans: {left}"
        time.sleep(0.05)


def assert_one_job(ranks, world_size):
    assert sorted(rank["rank"] for rank in ranks) == list(range(world_size))
    assert {rank["world_size"] for rank in ranks} == {world_size}
    first = ranks[0]
    for rank in ranks:
        assert rank["local"] == [rank["rank"], world_size]
        for key in ("config", "run_dir", "overrides", "number"):
            assert rank[key] == first[key]
        value = first["config"]["value"]
        assert rank.get("total") == (None if world_size == 1 else sum(value + other for other in range(world_size)))


# Ways of starting


def test_one_process(start, tmp_path):
    program = start("value=3", "fault.rank=7").wait()
    assert (program.code, program.output) == (0, "")
    ranks = seen(tmp_path)
    assert_one_job(ranks, 1)
    assert ranks[0]["config"] == {
        "launch": {"nproc_per_node": None},
        "model": {"width": 8},
        "device": "cpu",
        "value": 3,
        "fault": {"kind": "none", "rank": 7},
    }
    assert ranks[0]["overrides"] == ["value=3", "fault.rank=7"]
    assert ranks[0]["number"] == 0


def test_own_ranks_in_a_sweep_whose_first_job_fails(start, tmp_path):
    program = start("--multirun", "fault.kind=raise,none", "fault.rank=1", "launch.nproc_per_node=2").wait()
    assert program.code == 1
    ranks = seen(tmp_path)
    for number, kind in enumerate(("raise", "none")):
        job = [rank for rank in ranks if rank["number"] == number]
        assert_one_job(job, 2)
        assert job[0]["config"]["fault"]["kind"] == kind
        assert {rank["threads"] for rank in job} == {str(max(1, len(os.sched_getaffinity(0)) // 2))}
    lines = program.output.splitlines()
    assert lines[0] == "[rank 1] Traceback (most recent call last):"
    assert "[rank 1] ArithmeticError: the culprit's own error" in lines
    assert len([line for line in lines if not line.startswith("[rank 1] ")]) <= 2  # of rank 0, and Hydra's
    assert "ChildFailedError" not in program.output


def test_torchrun_makes_one_folder_for_each_job(start, tmp_path):
    """Three launches, in the same folder at the same time (harder than one after the other); one is a sweep of two."""
    programs = [start("value=1", torchrun=count) for count in (2, 3)]
    programs.append(start("--multirun", "value=4,5", "launch.nproc_per_node=2", torchrun=2))
    for program in programs:
        assert program.wait().code == 0, program.output
        assert program.own_output() == []
    jobs = {}
    for rank in seen(tmp_path):
        jobs.setdefault(rank["run_dir"], []).append(rank)
    for ranks in jobs.values():
        assert_one_job(ranks, len(ranks))
    assert len(list(tmp_path.glob("runs/*/*"))) == 2
    assert len(list(tmp_path.glob("sweeps/*/*"))) == 1
    assert sorted(len(ranks) for ranks in jobs.values()) == [2, 2, 2, 3]
    of_sweep = [
        (ranks[0]["number"], ranks[0]["config"]["value"]) for folder, ranks in jobs.items() if "sweeps" in folder
    ]
    assert sorted(of_sweep) == [(0, 4), (1, 5)]


def test_ranks_started_by_hand(start, tmp_path):
    """RANK and WORLD_SIZE without torchrun: rank 0 hosts the store and leaves last."""
    port = str(20000 + os.getpid() % 10000)
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    programs = [start("value=2", environment=place | {"RANK": str(rank)}) for rank in range(2)]
    assert [program.wait().code for program in programs] == [0, 0]
    assert [program.output for program in programs] == ["", ""]
    assert_one_job(seen(tmp_path), 2)


def test_showing_under_torchrun_prints_once(start, tmp_path):
    shown = start("--cfg", "job", "value=9", torchrun=2)
    helped = start("--help", torchrun=2)
    assert (shown.wait().code, helped.wait().code) == (0, 0)
    assert shown.output.count("value: 9") == 1
    assert helped.output.count("powered by Hydra") == 1
    assert "Traceback" not in shown.output + helped.output
    assert not (tmp_path / "runs").exists()


# What the user wrote cannot be done


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("nope=1", "Could not override 'nope'"),
        ("+nope=1", "unknown key: ['nope']"),
        ("value==", "Error parsing override 'value=='"),
        ("model=none", "Could not find 'model/none'"),
        ("value=${nowhere}", "Interpolation key 'nowhere' not found"),
        ("value=???", "Missing mandatory value: value"),
        ("launch.nproc_per_node=two", "must be a whole number of ranks"),
        ("--multirun value=1,2 nope=1", "Could not override 'nope'"),
        ("--run --multirun", "Only one of --run, --multirun"),
    ],
)
def test_refusal_is_a_letter(argument, words, tmp_path, monkeypatch, capfd):
    from . import program

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["program"])
    for name in OF_A_LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    code = launch(argument.split(), config_dir=HERE / "conf", check=program.check, task=program.task)
    output = "".join(capfd.readouterr())
    assert code == 2
    assert output.startswith("error: ")
    assert words in output
    assert "Traceback" not in output
    assert "HYDRA_FULL_ERROR" not in output
    assert "HYDRA_FULL_ERROR" not in os.environ
    assert seen(tmp_path) == []


def test_refusal_ends_every_way_of_starting(start, tmp_path):
    """Before any rank works, with the same letter once; torchrun adds its own summary and knows exit code 1 only."""
    own = start("+nope=1", "launch.nproc_per_node=2")
    torchrun = start("launch.nproc_per_node=3", torchrun=2)
    assert [program.wait().code for program in (own, torchrun)] == [2, 1]
    assert own.output == "error: unknown key: ['nope']. The keys are launch, model, device, value, fault.\n"
    assert len(torchrun.own_output()) == 1
    assert torchrun.own_output()[0].startswith("error: launch.nproc_per_node (3) differs from the 2 ranks")
    assert seen(tmp_path) == []


def test_refusal_by_the_task_on_all_ranks_is_shown_once(start):
    own = start("fault.kind=config", "launch.nproc_per_node=2")
    torchrun = start("fault.kind=config", torchrun=2)
    assert (own.wait().code, torchrun.wait().code) == (2, 1)
    assert own.output == "error: the task refuses this configuration\n"
    assert torchrun.output.count("the task refuses this configuration") == 1


def test_more_ranks_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    alone = recognise({})
    assert ranks_here({"device": "cpu", "launch": {"nproc_per_node": 4}}, alone) == 4
    assert ranks_here({"device": "cuda"}, alone) == 1
    for config in ({"device": "auto", "launch": {"nproc_per_node": 4}}, {"launch": {"nproc_per_node": 4}}):
        with pytest.raises(ConfigError, match=r"4 ranks on this machine, but it has 1 GPU:"):
            ranks_here(config, alone)
    with pytest.raises(ConfigError, match="2 ranks on this machine"):
        ranks_here({"device": "cuda"}, Place("torchrun", rank=5, world_size=8, local_rank=1, local_world_size=2))


# A rank fails or is killed (trap 22)


def test_failing_rank_takes_the_others_down(start, tmp_path):
    programs = {
        "raise": start("fault.kind=raise", "fault.rank=1", torchrun=3),
        "kill": start("fault.kind=kill", "fault.rank=1", torchrun=2),
        "own": start("fault.kind=kill", "fault.rank=1", "launch.nproc_per_node=2"),
    }
    ranks = wait_for_ranks(tmp_path, 7)
    began = time.monotonic()
    assert [program.wait(10).code for program in programs.values()] == [1, 1, 1]
    assert time.monotonic() - began < 10
    wait_until_gone([rank["pid"] for rank in ranks])
    lines = programs["raise"].own_output()
    assert lines[0] == "[rank 1] Traceback (most recent call last):"
    assert "[rank 1] ArithmeticError: the culprit's own error" in lines
    assert len([line for line in lines if not line.startswith("[rank 1]")]) <= 2, lines
    assert len(programs["kill"].own_output()) <= 1, programs["kill"].output
    assert "[rank 1] was ended by SIGKILL" in programs["own"].output
    assert "Traceback" not in programs["own"].output


def test_failures_are_told_over_the_store_where_nobody_watches(start, tmp_path):
    """Ranks without an agent: a raised error is shown by its rank only, a killed rank is noticed by the others."""
    port = 30000 + os.getpid() % 10000
    jobs = {}
    for offset, kind in enumerate(("raise", "kill")):
        place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port + offset)}
        arguments = (f"fault.kind={kind}", "fault.rank=1")
        jobs[kind] = [start(*arguments, environment=place | {"RANK": str(rank)}) for rank in range(2)]
    assert [program.wait().code for program in jobs["raise"]] == [1, 1]
    assert [program.wait().code for program in jobs["kill"]] == [1, -signal.SIGKILL]
    lines = jobs["raise"][0].output.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("[rank 0] leaves, because rank 1 failed first (")
    assert "[rank 1] ArithmeticError: the culprit's own error" in jobs["raise"][1].output
    lines = jobs["kill"][0].output.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("[rank 0] another rank has gone away")


def test_killed_launcher_leaves_no_orphan(start, tmp_path):
    programs = [start("fault.kind=sleep", torchrun=2), start("fault.kind=sleep", "launch.nproc_per_node=2")]
    ranks = wait_for_ranks(tmp_path, 4)
    assert {rank["parent"] for rank in ranks} == {program.process.pid for program in programs}
    assert all(alive(rank["pid"]) for rank in ranks)
    for program in programs:
        program.process.kill()
    wait_until_gone([rank["pid"] for rank in ranks], timeout_s=5)


def test_signal_ends_a_sweep_of_own_ranks(start, tmp_path):
    sweep = ("--multirun", "value=1,2", "fault.kind=sleep", "launch.nproc_per_node=2")
    programs = {number: start(*sweep) for number in (signal.SIGTERM, signal.SIGINT)}
    ranks = wait_for_ranks(tmp_path, 4)
    for number, program in programs.items():
        program.process.send_signal(number)
    for number, program in programs.items():
        assert program.wait(10).code == 128 + number
        assert "Traceback" not in program.output
    wait_until_gone([rank["pid"] for rank in ranks])
    assert {rank["number"] for rank in seen(tmp_path)} == {0}
