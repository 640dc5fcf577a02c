"""How a job starts and how it ends, judged by what its ranks wrote. Real processes, save where only
Hydra acts."""

import errno
import fcntl
import logging
import multiprocessing
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from commands import OF_A_LAUNCHER
from hydra.core.override_parser.overrides_parser import OverridesParser

from distaccum.errors import ConfigError
from distaccum.launch import launch, run_lock
from distaccum.launch.overrides import to_paste
from distaccum.launch.own_ranks import _surroundings
from distaccum.launch.ranks import Place, detect_launcher, ranks_here

from .programs import HERE, assert_one_job, by_hand, seen, wait_for_ranks

# Ways of starting


@pytest.mark.parametrize("level", [logging.NOTSET, logging.WARNING])
def test_what_is_disabled_in_logging_stays_disabled(level):
    before = logging.root.manager.disable
    logging.disable(level)
    try:
        with _surroundings(1):
            assert logging.root.manager.disable == logging.CRITICAL
        assert logging.root.manager.disable == level
    finally:
        logging.disable(before)


def test_one_process(start, tmp_path):
    program = start("value=3", "fault.rank=7").wait()
    assert (program.code, program.output) == (0, "")
    ranks = seen(tmp_path)
    assert_one_job(ranks, 1)
    assert ranks[0]["config"] == {
        "launch": {"nproc_per_node": None, "max_restarts": 0},
        "model": {"width": 8},
        "run_dir": str(Path(ranks[0]["run_dir"]).relative_to(tmp_path)),
        "device": "cpu",
        "value": 3,
        "fault": {"kind": "none", "rank": 7, "times": 1000},
        "timeout_s": 600,
        "train": {"timeout_s": 600},
    }
    assert ranks[0]["overrides"] == ["value=3", "fault.rank=7"]
    assert ranks[0]["number"] == 0


def test_one_folder_for_each_job(start, tmp_path):
    """Three launches, in the same folder at the same time (harder than one after the other), by new
    interpreters."""
    programs = [
        start("value=1", torchrun=2, cold=True),
        start("value=1", torchrun=3),
        start("value=1", "launch.nproc_per_node=2", cold=True),
    ]
    for program in programs:
        assert program.wait().code == 0, program.output
        assert program.own_output() == []
    jobs = {}
    for rank in seen(tmp_path):
        jobs.setdefault(rank["run_dir"], []).append(rank)
    for ranks in jobs.values():
        assert_one_job(ranks, len(ranks))
        assert {(rank["number"], rank["sweep"]) for rank in ranks} == {(0, None)}
    assert len(list(tmp_path.glob("runs/*/*"))) == 3
    assert sorted(len(ranks) for ranks in jobs.values()) == [2, 2, 3]
    assert list(tmp_path.rglob("stacks")) == []


def test_ranks_started_by_hand(start, tmp_path):
    """RANK and WORLD_SIZE without torchrun: rank 0 hosts the store and leaves last."""
    programs = by_hand(start, 2, "value=2")
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
        (
            "run_dir=epoch=3",
            """: run_dir=epoch=3\nIf its value is exactly this text, write 'run_dir="epoch=3"'""",
        ),
        (
            "run_dir=it's",
            """: run_dir=it's\nIf its value is exactly this text, write "run_dir='it\\'s'" """,
        ),
        (
            "run_dir=my run",
            "cannot be read: run\nAn override has the form key=value. Quote a value with spaces",
        ),
        ("model=none", "Could not find 'model/none'"),
        ("value=${nowhere}", "Interpolation key 'nowhere' not found"),
        ("value=???", "Missing mandatory value: value"),
        ("launch.nproc_per_node=two", "must be a whole number of ranks"),
        ("value=1,2", "To sweep over it, add --multirun"),
        ("--multirun value=1,2 nope=1", "Could not override 'nope'"),
        ("--multirun value=interval(1,2)", "interval(a,b) needs hydra/sweeper=optuna"),
        ("device=cpu --multirun value=range(2,1)", "the sweep has no jobs"),
        ("--run --multirun", "Only one of --run, --multirun"),
    ],
)
def test_refusal_is_a_letter(argument, words, tmp_path, monkeypatch, capfd):
    from . import program

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["program"])
    for name in OF_A_LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    code = launch(
        argument.split(), config_dir=HERE / "conf", check=program.check, task=program.task
    )
    output = "".join(capfd.readouterr())
    assert code == 2
    assert output.startswith("error: ")
    assert words in output
    assert "Traceback" not in output
    assert "HYDRA_FULL_ERROR" not in output
    assert "HYDRA_FULL_ERROR" not in os.environ
    assert seen(tmp_path) == []


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ("RANK= WORLD_SIZE=2", "RANK=''; it must be a whole number, 0 or more"),
        ("RANK=", "WORLD_SIZE is not set, although related variables (RANK) are"),
        ("RANK=one WORLD_SIZE=2", "RANK='one'"),
        ("RANK=1 WORLD_SIZE=0", "WORLD_SIZE='0'; it must be a whole number, 1 or more"),
        (
            "RANK=2 WORLD_SIZE=2",
            "RANK=2 and WORLD_SIZE=2: ranks are numbered from 0 to WORLD_SIZE - 1, which is 1",
        ),
        ("RANK=1", "WORLD_SIZE is not set, although related variables (RANK) are"),
        ("WORLD_SIZE=2", "RANK is not set, although related variables (WORLD_SIZE) are"),
        ("RANK=0 WORLD_SIZE=2", "MASTER_ADDR is missing"),
        ("RANK=0 WORLD_SIZE=2 MASTER_ADDR=", "MASTER_ADDR is empty"),
        (
            "RANK=0 WORLD_SIZE=2 MASTER_ADDR=a",
            (
                "MASTER_PORT is not set, although related variables (RANK, WORLD_SIZE, "
                "MASTER_ADDR) are"
            ),
        ),
        ("RANK=0 WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=70000", "MASTER_PORT=70000 is not a port"),
        ("RANK=0 WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=1 LOCAL_RANK=x", "LOCAL_RANK='x'"),
        (
            "RANK=0 WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=1 LOCAL_RANK=1 LOCAL_WORLD_SIZE=1",
            "LOCAL_RANK=1 and LOCAL_",
        ),
        (
            "RANK=0 WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=1 LOCAL_RANK=2",
            "LOCAL_RANK=2 and WORLD_SIZE=2: ranks",
        ),
        ("SLURM_STEP_ID=0 SLURM_PROCID=0 SLURM_STEP_NUM_TASKS=", "SLURM_STEP_NUM_TASKS=''"),
    ],
)
def test_an_environment_that_cannot_be_is_a_letter(environment, words, monkeypatch, capfd):
    for name in OF_A_LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    for word in environment.split():
        monkeypatch.setenv(*word.split("="))
    assert launch([], config_dir=HERE / "conf", check=None, task=None) == 2
    told = capfd.readouterr().err
    assert told.startswith("error: ")
    assert words in told
    assert "env -u RANK" in told


def test_a_local_rank_that_is_missing_is_no_false_report():
    environment = {"RANK": "5", "WORLD_SIZE": "8", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    told = (
        r"^LOCAL_WORLD_SIZE=4 is set and LOCAL_RANK is not\. Set LOCAL_RANK to .* on its machine,"
        r" from 0 to 3\.$"
    )
    with pytest.raises(ConfigError, match=told):
        detect_launcher(environment | {"LOCAL_WORLD_SIZE": "4"})
    assert (
        detect_launcher(environment | {"LOCAL_WORLD_SIZE": "4", "LOCAL_RANK": "1"}).local_rank == 1
    )
    assert detect_launcher(environment).local_rank == 5


@pytest.mark.parametrize(
    "text",
    ["plain/a-b", "epoch=3", "it's", "my run", 'a "b" $c', "end\\", "\\'", "[a,b", "", "100%"],
)
def test_what_is_to_be_pasted_is_read_as_it_was_meant(text):
    shown = to_paste("run_dir", text)
    word = subprocess.run(
        ["bash", "-c", f"printf %s {shown}"], capture_output=True, text=True, check=True
    ).stdout
    assert OverridesParser.create().parse_override(word).value() == text
    assert (shown == f"run_dir={text}") == (text in ("plain/a-b", "100%", ""))


def test_refusal_ends_every_way_of_starting(start, tmp_path):
    """Before any rank works, with the same letter once; torchrun adds its own summary and knows
    exit code 1 only."""
    own = start("+nope=1", "launch.nproc_per_node=2")
    torchrun = start("launch.nproc_per_node=3", torchrun=2)
    assert [program.wait().code for program in (own, torchrun)] == [2, 1]
    keys = "launch, model, run_dir, device, value, fault, timeout_s, train"
    assert own.output == f"error: unknown key: ['nope']. The keys are {keys}.\n"
    assert len(torchrun.own_output()) == 1
    assert torchrun.own_output()[0].startswith(
        "error: launch.nproc_per_node (3) differs from the 2 ranks"
    )
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
    alone = detect_launcher({})
    assert ranks_here({"device": "cpu", "launch": {"nproc_per_node": 4}}, alone) == 4
    assert ranks_here({"device": "cuda"}, alone) == 1
    for config in (
        {"device": "auto", "launch": {"nproc_per_node": 4}},
        {"launch": {"nproc_per_node": 4}},
    ):
        with pytest.raises(ConfigError, match=r"4 ranks on this machine, but it has 1 GPU:"):
            ranks_here(config, alone)
    with pytest.raises(ConfigError, match="2 ranks on this machine"):
        ranks_here(
            {"device": "cuda"},
            Place("torchrun", rank=5, world_size=8, local_rank=1, local_world_size=2),
        )


# Two starts in one run folder


def test_a_second_start_in_a_run_folder_is_refused(start, tmp_path):
    """However both were started, before anything is changed, on all ranks; and never once the first
    was killed."""
    run = tmp_path / "run"
    ways = {"one": {}, "own": {}, "torchrun": {"torchrun": 2}}
    arguments = {way: ["launch.nproc_per_node=2"] if way == "own" else [] for way in ways}
    for way, how in ways.items():
        first = start("fault.kind=loop", f"run_dir={run}", "value=1", *arguments[way], **how)
        ranks = wait_for_ranks(tmp_path, 1 + (way != "one"))
        holder = ranks[0]["pid"] if way == "torchrun" else first.pid
        before = contents(run)
        others = [start(f"run_dir={run}", *arguments[way], **how) for way, how in ways.items()]
        others += by_hand(start, 2, f"run_dir={run}")
        assert [other.wait().code for other in others] == [2, 2, 1, 2, 2], [
            other.output for other in others
        ]
        letter = (
            rf"error: {run} is in use by another run \(host {socket.gethostname()}, pid {holder},"
            r" since 20\d\d-"
        )
        for other in others[:-1]:
            assert len(re.findall(letter, other.output)) == 1, other.output
        assert others[-1].output == ""
        assert contents(run) == before
        first.kill()
        assert start(f"run_dir={run}", *arguments[way], **how).wait().code == 0
        for file in run.glob("*"):
            shutil.rmtree(file) if file.is_dir() else file.unlink()


def contents(folder):
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_second_sweep_in_a_folder_is_refused_as_a_whole(start, tmp_path):
    sweep = ["--multirun", "value=1,2", f"hydra.sweep.dir={tmp_path / 'sweep'}"]
    first = start(*sweep, "fault.kind=loop")
    wait_for_ranks(tmp_path, 1)
    second = start(*sweep).wait()
    assert second.code == 2
    assert second.output.count(f"error: {tmp_path / 'sweep'} is in use by another run (host") == 1
    assert not (tmp_path / "sweep" / "sweep.csv").exists()
    first.kill()


def test_a_file_system_without_locks_is_told_once(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(
        fcntl, "lockf", mock.Mock(side_effect=OSError(errno.ENOLCK, "No locks available"))
    )
    with run_lock.held(tmp_path):
        pass
    assert (
        capfd.readouterr().err.count(
            f"warning: the file system of {tmp_path} has no locks (No locks available)"
        )
        == 1
    )


def test_a_lock_is_not_kept_by_a_process_that_was_forked(tmp_path):
    """As the workers of a loader are, which outlive a rank that was killed by some seconds."""
    context = multiprocessing.get_context("fork")
    began, kept = context.Event(), context.Event()

    def hold():
        with run_lock.held(tmp_path):
            context.Process(target=kept.wait, args=(60,)).start()
            began.set()
            time.sleep(60)

    holder = context.Process(target=hold)
    holder.start()
    began.wait()
    with pytest.raises(ConfigError, match=rf"pid {holder.pid}, since"), run_lock.held(tmp_path):
        pass
    holder.kill()
    with run_lock.held(tmp_path):
        kept.set()
