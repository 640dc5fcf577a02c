"""Signals to the process that the user has started: they are for the ranks, which save and end."""

import json
import signal
import time

import pytest

from .programs import alive, found, seen, wait_for_ranks, wait_until_gone

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


def saved(program):
    """The signals that each rank got before it saved."""
    files = found(program.folder, "saved*")
    return [set(json.loads(file.read_text())) for file in files]


@pytest.fixture
def folders(tmp_path):
    made = [tmp_path / name for name in "abcdefgh"]
    for folder in made:
        folder.mkdir()
    return made


def test_signals_reach_our_own_ranks_which_save(start, folders):
    programs = [
        start("fault.kind=save", "launch.nproc_per_node=2", folder=folder) for folder in folders[:4]
    ]
    for program, number in zip(programs, SIGNALS, strict=True):
        wait_for_ranks(program.folder, 2)
        program.signal(number)
    for program, number in zip(programs, SIGNALS, strict=True):
        assert program.wait(30).code == 0, program.output
        assert program.output == ""
        assert saved(program) == [{number}] * 2


def test_ranks_that_handle_no_signal_end_by_it(start, folders):
    programs = [
        start("fault.kind=loop", "launch.nproc_per_node=2", folder=folder) for folder in folders[:4]
    ]
    alone = [start("fault.kind=loop", folder=folder) for folder in folders[4:]]
    for program, number in zip(programs + alone, SIGNALS * 2, strict=True):
        wait_for_ranks(program.folder, 1 + (program in programs))
        program.signal(number)
    for program, number in zip(programs, SIGNALS, strict=True):
        assert program.wait(15).code == 128 + number, program.output
        assert "orch" not in program.output
        assert "Traceback" not in program.output
        wait_until_gone([rank["pid"] for rank in seen(program.folder)])
    assert [program.wait(15).code for program in alone] == [
        -signal.SIGTERM,
        130,
        -signal.SIGUSR1,
        -signal.SIGUSR2,
    ]


def test_signal_while_ranks_start_ends_them(start, tmp_path):
    program = start("fault.kind=save", "launch.nproc_per_node=2", cold=True)
    children = f"/proc/{program.pid}/task/{program.pid}/children"
    while len(pids := _words(children)) < 2:  # they are importing torch
        assert program.code is None, program.output
        time.sleep(0.01)
    program.signal(signal.SIGTERM)
    assert program.wait(15).code == 128 + signal.SIGTERM, program.output
    assert program.output == ""
    assert seen(tmp_path) == []
    wait_until_gone([int(pid) for pid in pids])


def _words(path):
    with open(path) as file:
        return file.read().split()


def test_sweep_ends_after_the_job_that_saves(start, folders):
    sweep = ("--multirun", "value=1,2", "fault.kind=save")
    programs = [
        start(*sweep, "launch.nproc_per_node=2", folder=folders[0]),
        start(*sweep, folder=folders[1]),
        start(*sweep, torchrun=2, folder=folders[2]),
    ]
    numbers = (signal.SIGUSR1, signal.SIGINT, signal.SIGTERM)
    for program, count, number in zip(programs, (2, 1, 2), numbers, strict=True):
        wait_for_ranks(program.folder, count)
        program.signal(number)
    assert [program.wait(30).code for program in programs] == [138, 130, 1]
    for program, number, count in zip(programs, numbers, (2, 1, 2), strict=True):
        assert {rank["number"] for rank in seen(program.folder)} == {0}
        assert saved(program) == [{number}] * count
        (table,) = program.folder.rglob("sweep.csv")
        text = table.read_text()
        assert text.count(f"interrupted,{128 + number}") == 1, text
        assert "lowest validation loss" not in program.output
        assert not any(alive(rank["pid"]) for rank in seen(program.folder))
