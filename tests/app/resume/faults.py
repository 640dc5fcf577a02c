"""Faults as data: what goes wrong, on which rank, at which step, where in it. Installed from
outside.

Named functions of the package are wrapped for the duration; the package itself knows nothing of it.
Before a fault acts, it is on disk as RUN/faults/rank-N-step-M.json, so that a test can tell a fault
that came from one that did not.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import distaccum.app.commands.train
import distaccum.app.trainer
import distaccum.checkpoint.folder
import distaccum.checkpoint.store
from distaccum.step import micro_batches
from distaccum.step.accumulator import Accumulator
from distaccum.step.consensus import Consensus

PLACES = (
    "start",  # all ranks have met, nothing is built
    "forward",  # of the step's first micro-batch
    "backward",  # in the backward of the first micro-batch
    "reduce",  # gradients are summed, the ranks have not concluded
    "update",  # all ranks have agreed to update, and this one has not done so
    "evaluate",  # after the step
    "save",  # while this rank's file is written
    "publish",  # rank 0: all files are written, and the folder does not have its name
    "pointer",  # rank 0: it has its name, and `latest` does not point to it
)
SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2")
KINDS = (
    "kill",
    "kill_all",
    "raise",
    "hang",
    "slow",
    "nan",
    "oom",
    "corrupt",
    "fill_disk",
    *SIGNALS,
)
HANG_S = 600.0
SLOW_S = 0.5


@dataclass(frozen=True)
class Fault:
    """One fault. `step` is the one being made, from 1; for evaluate to pointer the one just made; 0
    at the start."""

    rank: int
    step: int
    at: str
    kind: str
    times: int = 1  # in so many starts of the run, the first ones that reach the place

    def __post_init__(self) -> None:
        if self.at not in PLACES or self.kind not in KINDS:
            raise ValueError(f"{self}: at is one of {PLACES}, kind one of {KINDS}")
        if self.kind == "nan" and self.at not in ("forward", "backward"):
            raise ValueError(f"{self}: numbers become nan at forward or backward")
        if self.kind == "fill_disk" and self.at != "save":
            raise ValueError(f"{self}: the disk is full at save")

    def record(self, run_dir: Path) -> Path:
        """What is there once it has acted: JSON, the fault and how often."""
        return run_dir / "faults" / f"rank-{self.rank}-step-{self.step}.json"

    def acted(self, run_dir: Path) -> int:
        """In how many starts it has acted."""
        try:
            told = json.loads(self.record(run_dir).read_text())
        except FileNotFoundError:
            return 0
        return int(told["acted"]) if Fault(**told["fault"]) == self else 0


@contextlib.contextmanager
def installed(faults: Sequence[Fault], run_dir: Path, rank: int, world_size: int) -> Iterator[None]:
    """Let the faults of this rank happen inside. Enter it on every rank, before the ranks meet."""
    assert len({fault.record(run_dir) for fault in faults}) == len(faults), (
        "one fault a rank and step"
    )
    folder = run_dir / "faults"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"pid-{rank}").write_text(str(os.getpid()))
    own = _Faults([fault for fault in faults if fault.rank == rank], run_dir, world_size)
    with contextlib.ExitStack() as stack:

        def wrap(owner: Any, name: str, wrapper: Callable[[Any], Any]) -> None:
            stack.enter_context(mock.patch.object(owner, name, wrapper(getattr(owner, name))))

        wrap(distaccum.app.commands.train, "build", own.before("start", lambda: 0))
        wrap(distaccum.app.trainer, "evaluate", own.before("evaluate", lambda: own.step))
        wrap(Consensus, "finish", own.before("reduce", lambda: own.step))
        wrap(Accumulator, "step", own.stepping)
        wrap(micro_batches, "sums_of", own.forward)
        wrap(micro_batches, "joined", own.backward)
        wrap(distaccum.checkpoint.store, "write_file", own.writing)
        wrap(distaccum.checkpoint.folder, "publish", own.publishing)
        wrap(distaccum.checkpoint.folder, "sync_folder", own.syncing)
        yield


def flip_byte(checkpoint: Path) -> None:
    """Damage the largest file of a checkpoint by one bit, in its middle."""
    shard = max(checkpoint.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    with shard.open("r+b") as file:
        file.seek(shard.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
        file.flush()
        os.fsync(file.fileno())


class _Faults:
    """Those of one rank, and where it is."""

    def __init__(self, faults: Sequence[Fault], run_dir: Path, world_size: int) -> None:
        self._waiting = [fault for fault in faults if fault.acted(run_dir) < fault.times]
        self._run_dir = run_dir
        self._world_size = world_size
        self._publishing = threading.local()
        self.step = 0

    def reach(self, at: str, step: int) -> bool:
        """Act if there is a fault here; whether numbers shall become nan."""
        for fault in self._waiting:
            if (fault.at, fault.step) == (at, step):
                self._waiting.remove(fault)
                self._note(fault)
                return self._act(fault)
        return False

    def before(self, at: str, step: Callable[[], int]) -> Callable[[Any], Any]:
        def wrapper(inner: Any) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                self.reach(at, step())
                return inner(*args, **kwargs)

            return call

        return wrapper

    def stepping(self, inner: Any) -> Any:
        hooked: set[int] = set()

        def update(*_: Any) -> None:
            self.reach("update", self.step)

        def call(accumulator: Any, window: Any, asking: Any = None) -> Any:
            self.step = window.step + 1
            if id(accumulator) not in hooked:
                hooked.add(id(accumulator))
                accumulator.optimizer.register_step_pre_hook(update)
            return inner(accumulator, window, asking)

        return call

    def forward(self, inner: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            poisoned = self.reach("forward", self.step)
            sums = inner(*args, **kwargs)
            return [value * float("nan") for value in sums] if poisoned else sums

        return call

    def backward(self, inner: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            loss = inner(*args, **kwargs)
            if loss.requires_grad:
                loss.register_hook(
                    lambda grad: grad * float("nan") if self.reach("backward", self.step) else None
                )
            return loss

        return call

    def writing(self, inner: Any) -> Any:
        def call(path: Path, tensors: Any, read: Any) -> Any:
            count = 0

            def half_way(name: str) -> Any:
                nonlocal count
                count += 1
                if count == (len(tensors) + 1) // 2:
                    self.reach("save", _step_of(path.parent.name))
                return read(name)

            return inner(path, tensors, half_way)

        return call

    def publishing(self, inner: Any) -> Any:
        def call(folder: Path, name: str, pointers: Any) -> Any:
            self.reach("publish", _step_of(name))
            self._publishing.now = (folder, name)
            try:
                return inner(folder, name, pointers)
            finally:
                self._publishing.now = None

        return call

    def syncing(self, inner: Any) -> Any:
        def call(path: Path) -> Any:
            folder, name = getattr(self._publishing, "now", None) or (None, "")
            if path == folder:  # the first of these calls comes between the rename and the pointers
                self._publishing.now = None
                self.reach("pointer", _step_of(name))
            return inner(path)

        return call

    def _note(self, fault: Fault) -> None:
        told = {"fault": asdict(fault), "acted": fault.acted(self._run_dir) + 1, "pid": os.getpid()}
        path = fault.record(self._run_dir)
        with path.with_suffix(".draft").open("w") as file:
            file.write(json.dumps(told) + "\n")
            file.flush()
            os.fsync(file.fileno())
        path.with_suffix(".draft").replace(path)

    def _act(self, fault: Fault) -> bool:
        if fault.kind in ("kill", "kill_all"):
            others = range(self._world_size) if fault.kind == "kill_all" else ()
            pids = [int((self._run_dir / "faults" / f"pid-{rank}").read_text()) for rank in others]
            for pid in [*(pid for pid in pids if pid != os.getpid()), os.getpid()]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        elif fault.kind in SIGNALS:
            os.kill(os.getpid(), signal.Signals[fault.kind])
        elif fault.kind == "raise":
            raise ArithmeticError("the culprit's own error")
        elif fault.kind == "oom":
            raise torch.OutOfMemoryError("out of memory, says the test")
        elif fault.kind == "fill_disk":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        elif fault.kind in ("hang", "slow"):
            time.sleep(HANG_S if fault.kind == "hang" else SLOW_S)
        elif fault.kind == "corrupt":
            folder = self._run_dir / "checkpoints"
            flip_byte(folder / (folder / "latest").read_text().strip())
        return fault.kind == "nan"


def _step_of(name: str) -> int:
    found = re.match(r"step-(\d+)", name)
    assert found is not None, name
    return int(found[1])


def faults_of(config: dict[str, Any]) -> tuple[list[Fault], dict[str, Any]]:
    """The key `faults` of a composed configuration, and the configuration without it."""
    left = dict(config)
    return [Fault(**fault) for fault in left.pop("faults", [])], left


def train_with_faults(job: Any) -> None:
    """`distaccum train` on this rank, with the faults of the job's configuration."""
    faults, config = faults_of(job.config)
    with installed(faults, job.run_dir, job.rank, job.world_size):
        distaccum.app.commands.train.train(replace(job, config=config))
