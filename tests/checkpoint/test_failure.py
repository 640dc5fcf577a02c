"""Saves that fail or are killed: the old state or the new one, and an error that all ranks
share."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import resource
import signal
import sys
import time

import pytest
import torch
from disks import small_disk
from states import ALONE, CPU, full_of, load_alone, names, same_bits, save_alone
from worlds import World as Ranks

from distaccum.checkpoint import folder as files
from distaccum.checkpoint.store import Checkpoints
from distaccum.errors import CheckpointError, ConfigError
from distaccum.parallel.world import World

# audit events of what changes a folder, besides `open`
CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir"}


def test_keep_and_best(tmp_path):
    checkpoints = Checkpoints(tmp_path, ALONE, keep=2)
    for step in range(1, 7):
        checkpoints.save(step, full_of(step), {}, best=step in (1, 3))
    assert names(tmp_path) == ["best", "latest", *(f"step-0000000{step}" for step in (3, 5, 6))]
    assert (tmp_path / "best").read_text() == "step-00000003\n"
    assert (tmp_path / "latest").read_text() == "step-00000006\n"
    assert [saved.step for saved in checkpoints.saved()] == [1, 2, 3, 4, 5, 6]
    assert checkpoints.saved() == []


def test_a_name_is_never_used_again(tmp_path):
    save_alone(tmp_path, 1, 1, 1)
    assert names(tmp_path) == ["latest", "step-00000001", "step-00000001-2", "step-00000001-3"]
    for other in ("step-1", "step-00000001-old", "step-00000000.bak", "notes"):
        (tmp_path / other).mkdir()
    save_alone(tmp_path, 2, keep=1)
    assert names(tmp_path) == [
        "latest",
        "notes",
        "step-00000000.bak",
        "step-00000001-old",
        "step-00000002",
        "step-1",
    ]


def test_keep_at_least_one(tmp_path):
    with pytest.raises(ConfigError, match="At least one checkpoint must be kept, got keep=0"):
        Checkpoints(tmp_path, ALONE, keep=0)


def test_an_old_one_that_cannot_be_removed_is_told(tmp_path, monkeypatch):
    checkpoints = save_alone(tmp_path, 1, keep=1)
    checkpoints.saved()
    monkeypatch.setattr(
        files, "remove", lambda path: (_ for _ in ()).throw(PermissionError(13, "not yours"))
    )
    checkpoints.save(2, full_of(2), {})
    (saved,) = checkpoints.saved()
    assert saved.remarks == (
        (
            f"the old checkpoint {tmp_path / 'step-00000001'} could not be removed: [Errno 13] not "
            "yours"
        ),
    )
    assert saved.message().endswith(saved.remarks[0])


@contextlib.contextmanager
def small_files(limit_bytes):
    """No file may grow beyond this in this process: a real error of the kernel, wherever tests
    run."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def fill_up(folder, asynchronous, mounted, only_rank):
    world = World.of(CPU)
    checkpoints = Checkpoints(folder, world, keep=2, asynchronous=asynchronous)

    def save(step):
        # 240 KB, of which one rank writes most
        checkpoints.save(step, full_of(step, 20_000), {"step": step}, best=True)
        checkpoints.wait()

    save(1)
    limit = contextlib.nullcontext()
    if not mounted and only_rank in (None, world.rank):
        limit = small_files(10_000)
    if mounted and world.rank == 0:
        (folder / "ballast").write_bytes(bytes((1 << 20) * 7 // 10))
    torch.distributed.barrier()
    with limit, pytest.raises(CheckpointError) as error:
        save(2)
    torch.distributed.barrier()
    left = names(folder)
    torch.distributed.barrier()
    if mounted and world.rank == 0:
        (folder / "ballast").unlink()
    torch.distributed.barrier()
    save(3)
    found = checkpoints.newest()
    return (
        str(error.value),
        left,
        found.step,
        same_bits(load_alone(found), full_of(3, 20_000)),
        checkpoints.passed_over,
    )


@pytest.mark.parametrize("asynchronous", [False, True], ids=["synchronous", "asynchronous"])
def test_a_full_disk(two_ranks: Ranks, tmp_path, asynchronous):
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        folder = disk or tmp_path / "checkpoints"
        told = two_ranks.run(fill_up, folder, asynchronous, disk is not None, None)
    assert told[0] == told[1]
    message, left, step, differ, passed_over = told[0]
    assert f"The checkpoint of step 2 was not saved in {folder}: rank" in message
    assert ("No space left on device" if disk else "File too large") in message
    assert message.endswith("The last good one is step-00000001, which is unchanged.")
    assert [name for name in left if name != "ballast"] == ["best", "latest", "step-00000001"]
    assert (step, differ, passed_over) == (3, [], [])


@pytest.mark.parametrize("asynchronous", [False, True], ids=["synchronous", "asynchronous"])
def test_one_rank_that_cannot_write(two_ranks: Ranks, tmp_path, asynchronous):
    rank = 0  # the one that writes the larger tensor
    told = two_ranks.run(fill_up, tmp_path, asynchronous, False, rank)
    assert told[0] == told[1]
    message, left, step, differ, passed_over = told[0]
    assert (
        f"in {tmp_path}: rank {rank}: OSError: [Errno 27] File too large. The last good" in message
    )
    assert left == ["best", "latest", "step-00000001"]
    assert (step, differ, passed_over) == (3, [], [])


@pytest.mark.parametrize("point", ["rename", "replace"])
def test_a_failure_while_it_is_put_in_place(tmp_path, monkeypatch, point):
    """After the folder has its name the checkpoint is there, whatever becomes of the pointer."""
    checkpoints = save_alone(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(
            f"pathlib.Path.{point}",
            lambda *args: (_ for _ in ()).throw(PermissionError("not today")),
        )
        with pytest.raises(CheckpointError, match="PermissionError: not today") as error:
            checkpoints.save(2, full_of(2), {})
    there = ["step-00000001"] if point == "rename" else ["step-00000001", "step-00000002"]
    assert names(tmp_path) == ["latest", *there]
    assert "The last good one is step-00000001" in str(error.value)
    checkpoints.save(3, full_of(3), {})
    assert checkpoints.newest().step == 3


def killed_at(folder, point, report):
    """Save step 3 beside steps 1 and 2, and die at the `point`-th change of the folder."""
    checkpoints = Checkpoints(folder, ALONE, keep=1)
    changes = 0

    def die(event, arguments):
        nonlocal changes
        writes = (
            event == "open"
            and isinstance(arguments[2], int)
            and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        )
        if not (event in CHANGES or writes) or changes < 0:
            return
        changes += 1
        if changes == point:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(die)
    checkpoints.save(3, full_of(3), {"step": 3}, best=True)
    changes = -1
    report.send("saved")


def begin(function, *arguments):
    """A process that can be killed; it is forked from where torch is imported already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["torch", "torch.distributed.fsdp", "torch.testing", "distaccum"]
    )
    ours, theirs = context.Pipe()
    process = context.Process(target=function, args=(*arguments, theirs), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def test_killed_before_each_change_of_the_folder(tmp_path):
    found, saved = [], False
    for point in range(1, 100):
        folder = tmp_path / str(point)
        save_alone(folder, 1, 2, keep=2)
        process, report = begin(killed_at, folder, point)
        with contextlib.suppress(EOFError):
            saved = report.recv() == "saved"
        process.join(30)
        assert process.exitcode == (0 if saved else -signal.SIGKILL)
        checkpoints = Checkpoints(folder, ALONE, keep=1)
        checkpoints.clean()
        assert not any(folder.glob("*.part"))
        newest = checkpoints.newest()
        assert checkpoints.passed_over == []
        # not one half is to be seen
        assert {entry.trouble for entry in files.entries(folder)} == {""}
        assert newest.facts == {"step": newest.step}
        assert same_bits(load_alone(newest), full_of(newest.step)) == []
        found.append(newest.step)
        if saved:
            break
    assert found == sorted(found)  # the old state, then the new one
    assert found[0] == 2
    assert found[-1] == 3
    assert len(found) > 10


def save_for_ever(folder, report):
    checkpoints = Checkpoints(folder, ALONE, keep=2)
    checkpoints.clean()
    newest = checkpoints.newest()
    step = newest.step if newest else 0
    report.send("go")
    while True:
        step += 1
        checkpoints.save(step, full_of(step, 50_000), {"step": step}, best=step % 3 == 0)
        report.send(step)


def test_killed_at_any_moment(tmp_path):
    delays = random.Random(20261121)
    last = 0
    for _ in range(20):
        process, report = begin(save_for_ever, tmp_path)
        assert report.recv() == "go"
        time.sleep(delays.uniform(0.0, 0.08))  # when, not until
        process.kill()
        process.join(30)
        told = last
        with contextlib.suppress(EOFError):
            while True:
                told = report.recv()
        checkpoints = Checkpoints(tmp_path, ALONE, keep=2)
        newest = checkpoints.newest()
        assert checkpoints.passed_over == []
        assert {entry.trouble for entry in files.entries(tmp_path)} <= {""}
        last = newest.step if newest else 0
        assert last in (told, told + 1)  # what save() returned from is there
        if newest is not None:
            assert newest.facts == {"step": last}
            assert same_bits(load_alone(newest), full_of(last, 50_000)) == []
    assert last > 3


def test_clean_removes_only_what_is_on_its_way(tmp_path):
    save_alone(tmp_path, 1)
    for name in ("step-00000002.part", "step-00000001-2.part", "mine.part", "step-2.part"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    (tmp_path / "latest.part").write_text("step-0000")
    told = Checkpoints(tmp_path, ALONE, keep=1).clean()
    assert [line.split(":")[0] for line in told] == [
        f"removed {tmp_path / name}"
        for name in ("latest.part", "step-00000001-2.part", "step-00000002.part")
    ]
    assert names(tmp_path) == ["latest", "mine.part", "step-00000001", "step-2.part"]


def test_an_error_of_the_background_is_raised_once_by_the_next_save(tmp_path):
    checkpoints = save_alone(tmp_path, 1, asynchronous=True)
    with small_files(1000):
        checkpoints.save(2, full_of(2), {})
        with pytest.raises(CheckpointError, match="of step 2 was not saved"):
            checkpoints.save(3, full_of(3), {})
    checkpoints.wait()
    checkpoints.save(4, full_of(4), {})
    checkpoints.wait()
    assert [saved.step for saved in checkpoints.saved()] == [1, 4]
    assert checkpoints.newest().step == 4
