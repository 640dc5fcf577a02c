"""Runs arms in turns on one GPU, each in a process of its own that waits between its turns.

So each arm has its own memory peak and its own global state, and an arm that fails does not affect
the others. While an arm waits, it keeps its model and its optimizer and returns all other memory to
the GPU.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from gpu_alarm import SYNC, alarm, counting
from gpu_arms import ARMS, NEEDS, MicroBatchSet, Sizes, Training, adamw
from gpu_ranks import in_short

from distaccum.parallel.world import PendingRows

LR = 3e-4
NUM_DISTINCT_WINDOWS = 4
MOST_WINDOWS = 10_000


@dataclass(frozen=True)
class Order:
    """Asks an arm to train on some windows."""

    untimed: int  # windows that fill caches first, at least 1
    timed: int  # windows that are measured, at least 1
    watch: bool = False  # count host syncs; in distaccum, raise for those inside a window


@dataclass(frozen=True)
class Turn:
    """Holds the result of an order."""

    seconds: float  # of all timed windows together
    peak_bytes: int | None  # during the timed windows; None: not on a GPU
    losses: list[float]  # of all windows, untimed ones included
    norms: list[float]  # of all windows, untimed ones included
    reads: int  # tables that distaccum copied to the host during the timed windows
    syncs: int | None  # host syncs during the timed windows; None: not watched


@dataclass(frozen=True)
class Job:
    """Describes one arm to its process."""

    arm: str
    device_type: str
    sizes: Sizes
    num_micro_batches: int
    backend: str | None
    log: str  # path of the file that receives its output


class GoneError(Exception):
    """Signals that an arm failed or did not answer in time."""


def start_method(device_type: str) -> str:
    """Return "spawn" for CUDA, which cannot be forked, and "fork" for the CPU, to save imports."""
    return "spawn" if device_type == "cuda" else "fork"


def preload(device_type: str) -> None:
    """Import in the parent what the process of each arm would import, if they are forked."""
    if start_method(device_type) == "fork":
        for module in (
            "torch._dynamo",
            *sorted({name for names in NEEDS.values() for name in names}),
        ):
            if find_spec(module.split(".")[0]) is not None:
                import_module(module)
        torch.set_num_threads(1)
        # Imports more modules, and creates what all compilations share.
        torch.compile(torch.neg, backend="eager")(torch.ones(1))


class Arm:
    """Controls the process of one arm from its parent."""

    def __init__(self, job: Job) -> None:
        """Start the process, which imports its packages and makes its model on the host."""
        context: Any = multiprocessing.get_context(start_method(job.device_type))
        self.job = job
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=work, args=(job, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def ready(self, limit_s: float) -> None:
        """Wait until the process has imported its packages and made its model.

        Raises:
            GoneError: as in `turn`.
        """
        self._answer(limit_s)

    def turn(self, order: Order, limit_s: float) -> Turn:
        """Let the arm train, and return the result.

        Raises:
            GoneError: the arm failed or did not answer within `limit_s`. Its process was ended.
        """
        turn = self._answer(limit_s, order)
        assert isinstance(turn, Turn)
        return turn

    def _answer(self, limit_s: float, *orders: Order) -> Any:
        try:
            for order in orders:
                self._pipe.send(order)
            answered = self._pipe.poll(max(0.0, limit_s))
            answer: Any = (
                self._pipe.recv()
                if answered
                else f"no answer within the {limit_s:.0f} s that were left"
            )
        except (EOFError, OSError):
            self._process.join(5)
            last = Path(self.job.log).read_text(errors="replace").strip().splitlines()[-1:]
            answer = " | ".join(
                [f"its process ended with exit code {self._process.exitcode}", *last]
            )
        if isinstance(answer, str):  # an error
            self.end()
            raise GoneError(answer)
        return answer

    def end(self) -> None:
        """End the process, whatever state it is in."""
        self._process.kill()
        self._process.join(10)
        self._pipe.close()


def work(job: Job, pipe: Connection) -> None:
    """Run an arm in its process: train whenever an order arrives."""
    descriptor = os.open(job.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    try:
        device = (
            torch.device(job.device_type, 0) if job.device_type == "cuda" else torch.device("cpu")
        )
        if device.type == "cpu":
            torch.set_num_threads(1)
        model, turns = job.sizes.model(), Turns(job, pipe, device)
        micro_batches = MicroBatchSet(
            job.sizes,
            NUM_DISTINCT_WINDOWS * job.num_micro_batches,
            MOST_WINDOWS * job.num_micro_batches,
            device,
        )
        for module in NEEDS.get(job.arm, []):
            import_module(module)
        pipe.send(None)  # ready
        turns.wait()  # the model is on the host until the first order
        model = model.to(device)
        training = Training(
            model, adamw(model, LR), device, micro_batches, job.num_micro_batches, turns.report,
            job.backend
        )  # fmt: skip
        ARMS[job.arm](training)
        raise RuntimeError("the training loop ended before it was stopped")
    except BaseException as error:
        pipe.send(in_short(error))
        os._exit(1)


class Turns:
    """Divides the loop of an arm into turns; the loop calls `report` after each window."""

    def __init__(self, job: Job, pipe: Connection, device: torch.device) -> None:
        """Count the reads of tables from now on."""
        self._job, self._pipe, self._device = job, pipe, device
        self._order = Order(1, 1)
        self._losses: list[float] = []
        self._norms: list[float] = []
        self._watch = ExitStack()
        self._found: Any = None
        self._reads = _count_reads()
        self._began = 0.0

    def wait(self) -> None:
        """Wait for the next order."""
        self._losses, self._norms = [], []
        self._order = self._pipe.recv()

    def report(self, loss: float, norm: float) -> None:
        """Record a window; begin or end the measurement, and wait between two orders."""
        self._losses.append(loss)
        self._norms.append(norm)
        order = self._order
        if len(self._losses) == order.untimed:
            self._begin()
        elif len(self._losses) == order.untimed + order.timed:
            self._pipe.send(self._end())
            self.wait()

    def _begin(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            if self._order.watch and self._job.arm == "distaccum":
                arm, self._found = self._watch.enter_context(alarm())
                arm()
            elif self._order.watch:
                self._found = self._watch.enter_context(counting())
        self._reads.clear()
        self._began = time.perf_counter()

    def _end(self) -> Turn:
        if self._device.type == "cuda" and not self._order.watch:
            torch.cuda.synchronize(self._device)
        seconds = time.perf_counter() - self._began
        self._watch.close()
        found, self._found = self._found, None
        syncs = (
            None
            if found is None
            else sum(x if isinstance(x, int) else SYNC in str(x.message) for x in found)
        )
        peak = None
        if self._device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self._device)
            torch.cuda.empty_cache()  # for the other arms
        return Turn(seconds, peak, self._losses, self._norms, len(self._reads), syncs)


def _count_reads() -> list[None]:
    """Return a list that grows by one with every table that an accumulator copies to the host."""
    reads: list[None] = []
    original = PendingRows.read

    def read(self: PendingRows, *others: torch.Tensor) -> Any:
        reads.append(None)
        return original(self, *others)

    PendingRows.read = read  # type: ignore[method-assign]
    return reads
