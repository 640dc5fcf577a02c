"""A loader over a plan whose windows grow: the samples of the plan, and read far enough ahead."""

from __future__ import annotations

import multiprocessing
import os
import select
import signal
import subprocess
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from distaccum.core.batch_schedule import BatchSchedule, Ramp, ScheduleUnit
from distaccum.core.plan import Plan
from distaccum.data import loader as under_test
from distaccum.data.loader import Loader

SCHEDULE = BatchSchedule(((0, 4), (40, 22)), ScheduleUnit.samples, Ramp.linear)


class Numbers:
    """Each sample is its own number."""

    tokens_per_sample = None

    def __len__(self) -> int:
        return 100

    def num_targets(self, samples: Sequence[int]) -> int:
        return len(samples)

    def batch(self, samples: Sequence[int], generator: torch.Generator) -> list[int]:
        return list(samples)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[DataLoader[Any]]:
    """The loaders of torch that were opened."""
    made: list[DataLoader[Any]] = []

    def record(*args: Any, **keywords: Any) -> DataLoader[Any]:
        made.append(DataLoader(*args, **keywords))
        return made[-1]

    monkeypatch.setattr(under_test, "DataLoader", record)
    return made


def read(
    plan: Plan, rank: int, world_size: int, workers: int, step: int = 0, start: int = 0
) -> list[list[list[int]]]:
    """The samples of each micro-batch of each window, up to step 12."""
    loader = Loader(Numbers(), plan, rank, world_size, workers=workers)
    found = [list(micro_batches) for _, micro_batches in loader.windows(step, start, 12)]
    loader.close()
    return found


@pytest.mark.parametrize("world_size", [1, 3])
def test_growing_windows_hold_the_plan_s_samples_from_any_step(world_size: int) -> None:
    plan = Plan(100, 4, 4, seed=1, schedule=SCHEDULE)
    windows = [plan.window(step, plan.start_of(step)) for step in range(12)]
    # at 0, 4, 8, 16, 28, 44
    assert [w.effective_batch_size for w in windows[:6]] == [4, 4, 8, 12, 16, 22]
    assert {w.epoch for w in windows} == {0, 1}
    for rank in range(world_size):
        expected = [
            [plan.samples(micro_batch) for micro_batch in w.of_rank(rank, world_size)]
            for w in windows
        ]
        assert read(plan, rank, world_size, workers=0) == expected
        for step in (3, 7):
            assert read(plan, rank, world_size, 0, step, windows[step].start) == expected[step:]


def test_workers_read_the_largest_window_ahead(opened: list[DataLoader[Any]]) -> None:
    plan = Plan(100, 4, 4, seed=1, schedule=SCHEDULE)
    assert read(plan, 0, 1, workers=2) == read(plan, 0, 1, workers=0)
    largest = 6  # micro-batches: 22 samples in micro-batches of 4
    # One micro-batch per worker more than that: the first of the window after it.
    assert opened[0].prefetch_factor == largest / 2 + 1


def test_no_more_than_an_epoch_is_read_ahead(opened: list[DataLoader[Any]]) -> None:
    read(Plan(100, 10**6, 20), 0, 1, workers=2)
    assert opened[0].prefetch_factor == -(-5 // 2) + 1


def test_only_its_rank_ends_a_worker() -> None:
    """Launchers signal all processes of a rank; it needs the worker until it has saved."""
    others = set(multiprocessing.active_children())
    loader = Loader(Numbers(), Plan(100, 10, 2), 0, 1, workers=1)
    windows = loader.windows(0, 0, 10)
    found = [list(next(windows)[1])]
    (worker,) = set(multiprocessing.active_children()) - others
    for name in ("TERM", "INT", "USR1", "USR2"):
        # another process than this one
        subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
    found += [list(micro_batches) for _, micro_batches in windows]
    assert sorted(n for window in found for micro_batch in window for n in micro_batch) == list(
        range(100)
    )
    assert worker.is_alive()
    worker.terminate()
    worker.join(10)
    assert worker.exitcode == 0
    loader.close()


def test_a_killed_rank_leaves_no_worker() -> None:
    """A worker holds copies of the rank's connections: others would wait for it in place of the
    rank."""
    ours, theirs = multiprocessing.Pipe()
    rank = multiprocessing.get_context("fork").Process(target=read_and_wait, args=(theirs,))
    rank.start()
    worker = ours.recv()
    assert rank.pid is not None
    os.kill(rank.pid, signal.SIGKILL)
    os.waitpid(rank.pid, 0)  # not join(): that waits for the worker too
    handle = os.pidfd_open(worker)
    assert select.select([handle], [], [], 1)[0], "still there; torch alone would end it after 5 s"
    os.close(handle)


def read_and_wait(pipe: Connection) -> None:
    loader = Loader(Numbers(), Plan(100, 10, 2), 0, 1, workers=1)
    others = set(multiprocessing.active_children())
    windows = loader.windows(0, 0, 10)
    list(next(windows)[1])
    (worker,) = set(multiprocessing.active_children()) - others
    pipe.send(worker.pid)
    pipe.recv()
