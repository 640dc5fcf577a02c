"""Runs that are started again and again, in processes that cost a second: what they did is read
from what they wrote.

Each rank is forked from a server that has imported everything (see processes.py) and calls
`train(job)`; only the launcher is left out, whose tests are elsewhere.
"""

from __future__ import annotations

import faulthandler
import hashlib
import json
import os
import random
import string
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from faults import Fault, installed
from processes import forked

import distaccum.app.commands.train
from distaccum.app.build import make_plan
from distaccum.app.commands.check import check
from distaccum.app.config import config_dir, typed
from distaccum.app.task import build_task
from distaccum.checkpoint.store import Checkpoint
from distaccum.core.batch_size import BatchArithmetic, solve
from distaccum.core.plan import Plan
from distaccum.launch import Job
from distaccum.metrics.run_log import read_metrics, standing
from distaccum.parallel.world import World
from distaccum.step import micro_batches
from distaccum.step.accumulator import Accumulator

LIMIT_S = 60.0  # of one attempt
GRACE_S = 4.0  # after the first rank has failed, until a launcher would end the others
ALONE = World(0, 1, torch.device("cpu"), None)
# 21 samples an epoch and 8 a window: two full windows and one of 5 samples, which is 3
# micro-batches, so that with 4 ranks one has none. 8 steps are two epochs and two windows.
NUM_SAMPLES, STEPS = 21, 8
TINY = (
    "data=path", "data.seq_len=16", "data.validation_fraction=0.2", "model.num_layers=1",
    "model.width=16", "model.num_heads=2", "model.dropout=0.1", "accum.effective_batch_size=8",
    "accum.micro_batch_size=2", "optim.lr=0.01",
    "optim.clip_norm=0.5", "optim.schedule.warmup=2", f"train.steps={STEPS}",
    "train.validate_every_steps=4", "train.validation_samples=4", "train.log_every_steps=4",
    "checkpoint.every.steps=2", "checkpoint.every.minutes=null",
    "loader.workers=0", "device=cpu",
)  # fmt: skip


def write_text(folder: Path) -> list[str]:
    """A tiny text of which each sample is another one, and the overrides that read it."""
    letters = random.Random(0)
    file = folder / "text.txt"
    # A fifth of the bytes are held out; what is left is a few tokens more than the samples need.
    file.write_text(
        "".join(letters.choice(string.ascii_letters) for _ in range(16 * NUM_SAMPLES * 5 // 4 + 8))
    )
    return [f"data.path={file}", f"data.cache_dir={folder / 'cache'}"]


@cache
def compose(*overrides: str) -> dict[str, Any]:
    """What the command line composes, checked as it does."""
    import hydra
    from omegaconf import OmegaConf

    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(config_dir())):
        plain = OmegaConf.to_container(
            hydra.compose("config", list(overrides)), resolve=True, enum_to_str=True
        )
    check(plain)  # type: ignore[arg-type]
    return json.loads(json.dumps(plain))


@dataclass(frozen=True)
class Attempt:
    """How one start ended."""

    codes: list[int]  # by rank; -9 for SIGKILL
    texts: list[str]  # what each rank printed
    seconds: float

    def __str__(self) -> str:
        ends = enumerate(zip(self.codes, self.texts, strict=True))
        told = [f"rank {rank}: exit code {code}\n{text}" for rank, (code, text) in ends]
        return "\n".join(told)


class Run:
    """One run folder, started as often as one likes."""

    def __init__(self, folder: Path, *overrides: str) -> None:
        self.overrides = overrides
        self.folder = folder
        self.run_dir = folder / "run"
        self.attempts: list[Attempt] = []
        self.run_dir.mkdir(parents=True, exist_ok=True)

    def start(
        self,
        ranks: int,
        *more: str,
        faults: Sequence[Fault] = (),
        meanwhile: Callable[[list[int]], None] | None = None,
        around: Callable[[Path, int], AbstractContextManager[None]] | None = None,
    ) -> Attempt:
        """Start it on so many ranks and wait for the end.

        Args:
            ranks: how many.
            more: overrides of this start.
            faults: of this start.
            meanwhile: called with the ranks' process ids as soon as they are started.
            around: a function of a module; what it gives for (the attempt's folder, rank) is
                entered on each rank.
        """
        config = compose(*self.overrides, *more)
        place = self.folder / "attempts" / str(len(self.attempts) + 1)
        place.mkdir(parents=True)
        daemon = config["loader"]["workers"] == 0  # others may have children
        began = time.monotonic()
        processes = [
            forked(
                _rank, config, self.run_dir, place, rank, ranks, list(faults), around, daemon=daemon
            )
            for rank in range(ranks)
        ]
        if meanwhile is not None:
            meanwhile([process.pid for process in processes])
        deadline, killed, late = began + LIMIT_S, False, False
        while any(process.exitcode is None for process in processes):
            left = deadline - time.monotonic()
            if left <= 0:
                # With one that has failed the others only had its grace; without, they had all the
                # time there is.
                killed, late = True, late or not any(process.exitcode for process in processes)
                for process in processes:
                    process.kill()
                deadline = time.monotonic() + 10
            wait(
                [process.sentinel for process in processes if process.exitcode is None],
                timeout=max(0.0, left),
            )
            if not killed and any(process.exitcode for process in processes):
                deadline = min(deadline, time.monotonic() + GRACE_S)
        seconds = time.monotonic() - began
        texts = [
            path.read_text() if path.exists() else ""
            for path in (place / f"rank-{r}.txt" for r in range(ranks))
        ]
        attempt = Attempt([process.exitcode for process in processes], texts, seconds)
        self.attempts.append(attempt)
        if late:
            raise AssertionError(f"the ranks did not end within {LIMIT_S} s:\n{attempt}")
        return attempt

    def finish(self, ranks: int, *more: str) -> Run:
        """Start it without faults; it must succeed."""
        attempt = self.start(ranks, *more)
        assert attempt.codes == [0] * ranks, str(attempt)
        return self

    # What was written.

    @property
    def step(self) -> int:
        """Of the checkpoint that `latest` names; 0 where there is none."""
        pointer = self.run_dir / "checkpoints" / "latest"
        return int(pointer.read_text().split("-")[1]) if pointer.exists() else 0

    def checkpoint(self) -> Checkpoint:
        return Checkpoint.open(self.run_dir, ALONE)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All of the newest checkpoint."""
        checkpoint = self.checkpoint()
        into = {
            name: torch.empty(info.shape, dtype=info.dtype)
            for name, info in checkpoint.tensors.items()
        }
        checkpoint.load(into)
        return into

    def sha256(self, prefix: str = "") -> str:
        """Over all tensors of the newest checkpoint, name by name; those of the model with
        `model.`."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.tensors().items()):
            if name.startswith(prefix):
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
                digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def records(self, kind: str) -> list[dict[str, Any]]:
        """Of metrics.jsonl, what stands."""
        return [
            record
            for record in standing(read_metrics(self.run_dir / "metrics.jsonl"))
            if record["kind"] == kind
        ]

    def notes(self) -> str:
        """All that was said, also in starts that were killed."""
        told = read_metrics(self.run_dir / "metrics.jsonl")
        return "\n".join(
            str(record["text"]) for record in told if record["kind"] in ("note", "resume")
        )

    def trajectory(self) -> list[tuple[int, float, float, float]]:
        """(step, loss, gradient norm, learning rate) of each step."""
        return [(r["step"], r["loss"], r["grad_norm"], r["lr"]) for r in self.records("step")]

    def computed(self) -> dict[int, list[tuple[int, ...]]]:
        """By step the rows of input that the last start which made it has really computed, over all
        ranks, sorted."""
        found: dict[int, list[tuple[int, ...]]] = {}
        for number in range(1, len(self.attempts) + 1):
            now: dict[int, list[tuple[int, ...]]] = {}
            for path in (self.folder / "attempts" / str(number)).glob("used-*.jsonl"):
                for line in path.read_text().splitlines():
                    told = json.loads(line)
                    now.setdefault(told["step"], []).extend(tuple(row) for row in told["rows"])
            found.update(now)
        return {step: sorted(rows) for step, rows in sorted(found.items())}

    def samples(self) -> dict[int, list[int]]:
        """The same as the samples' numbers."""
        numbers = {row: number for number, row in enumerate(rows_of(*self.overrides))}
        return {
            step: sorted(numbers[row] for row in rows) for step, rows in self.computed().items()
        }

    def acted(self, *faults: Fault) -> bool:
        """Whether all of these faults have happened."""
        return all(fault.acted(self.run_dir) for fault in faults)


@cache
def rows_of(*overrides: str) -> list[tuple[int, ...]]:
    """The input of each training sample; all differ."""
    train = build_task(typed(compose(*overrides))).train
    rows = [
        tuple(row.tolist())
        for row in train.batch(range(len(train)), torch.Generator())["input_ids"]
    ]
    assert len(set(rows)) == len(rows) == NUM_SAMPLES
    return rows


def plan_of(*overrides: str) -> Plan:
    """What the run should do."""
    config = typed(compose(*overrides))
    arithmetic: BatchArithmetic = solve(
        1, config.accum.effective_batch_size, config.accum.micro_batch_size
    )
    return make_plan(config, build_task(config), arithmetic)


def assert_each_sample_once(run: Run, steps: int = STEPS) -> None:
    """In the steps that the plan says; none lost, none doubled within an epoch."""
    plan, used = plan_of(*run.overrides), run.samples()
    assert sorted(used) == list(range(1, steps + 1))
    windows = [plan.window()]
    while len(windows) < steps:
        windows.append(plan.window(windows[-1].step + 1, windows[-1].next_start))
    for window in windows:
        planned = [
            number for micro_batch in window.micro_batches for number in plan.samples(micro_batch)
        ]
        assert used[window.step + 1] == sorted(planned), f"step {window.step + 1}"
    for epoch in range(windows[-1].epoch):  # all but the last, which does not end
        counts = Counter(n for w in windows if w.epoch == epoch for n in used[w.step + 1])
        assert counts == dict.fromkeys(range(NUM_SAMPLES), 1), f"epoch {epoch}"


def wait_for(path: Path, limit_s: float = 30.0) -> None:
    """Until a file is there."""
    end = time.monotonic() + limit_s
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not come"
        time.sleep(0.005)


def _rank(
    config: dict[str, Any],
    run_dir: Path,
    place: Path,
    rank: int,
    ranks: int,
    faults: list[Fault],
    around: Any,
) -> None:
    """What each process does."""
    from distaccum.launch.failure import report

    descriptor = os.open(place / f"rank-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    # where a rank stands that will not end in time
    faulthandler.dump_traceback_later(0.75 * LIMIT_S)
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.FileStore(str(place / "store"), ranks) if ranks > 1 else None
    config = {**config, "run_dir": str(run_dir)}
    job = Job(config, run_dir, [], 0, None, rank, ranks, rank, ranks, rank, store)
    code = 0
    try:
        # The picture of the curve takes a second to import and the prediction of memory half of a
        # run's time, and nothing here looks at them.
        with ExitStack() as stack:
            stack.enter_context(mock.patch("distaccum.metrics.report.draw_curve"))
            stack.enter_context(mock.patch("distaccum.app.build.predicted", return_value=None))
            stack.enter_context(installed(faults, run_dir, rank, ranks))
            stack.enter_context(_used(place, rank))
            if around is not None:
                stack.enter_context(around(place, rank))
            distaccum.app.commands.train.train(job)
    except Exception as error:
        code = report(error)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextmanager
def _used(place: Path, rank: int) -> Iterator[None]:
    """Note what this rank computes, a line when a step is done."""
    rows: list[list[int]] = []
    check_micro_batch, step = micro_batches._check, Accumulator.step

    def checking(objective: Any, window: Any, index: int, micro_batch: Any) -> None:
        # called for each micro-batch that counts, just before its forward
        check_micro_batch(objective, window, index, micro_batch)
        if "input_ids" in micro_batch:
            rows.extend(micro_batch["input_ids"].tolist())

    def stepping(self: Any, window: Any, asking: Any = None) -> Any:
        rows.clear()
        record = step(self, window, asking)
        with (place / f"used-{rank}.jsonl").open("a") as file:
            file.write(json.dumps({"step": window.step + 1, "rows": rows}) + "\n")
        return record

    with (
        mock.patch.object(micro_batches, "_check", checking),
        mock.patch.object(Accumulator, "step", stepping),
    ):
        yield


class Undisturbed:
    """Runs of `TINY` without faults, each computed when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._runs: dict[tuple[Any, ...], Run] = {}
        self.overrides = (*TINY, *write_text(folder))

    def of(self, ranks: int, *more: str) -> Run:
        """Of so many ranks, with these overrides."""
        key = (ranks, *more)
        if key not in self._runs:
            folder = self._folder / f"run-{len(list(self._folder.iterdir()))}"
            self._runs[key] = Run(folder, *self.overrides, *more).finish(ranks)
        return self._runs[key]
