"""Arms that take turns on one GPU: each in a process of its own, standing still between its turns.

So each arm has its own peak of memory and its own global state, and an arm that fails takes no other with it. While it
stands still it holds its model and its optimizer, and gives back all other memory to the GPU.
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
from gpu_arms import ARMS, NEEDS, Micros, Sizes, Training, adamw
from gpu_ranks import in_short

from distaccum.parallel.world import Shared

LR = 3e-4
NUM_DISTINCT_WINDOWS = 4
MOST_WINDOWS = 10_000


@dataclass(frozen=True)
class Order:
    """Train so many windows: first those that fill caches, then those that are measured."""

    untimed: int  # at least 1
    timed: int  # at least 1
    watch: bool = False  # count host syncs, and raise for those of ours that are inside a window


@dataclass(frozen=True)
class Turn:
    """What was found; all windows since the order are in `losses` and `norms`."""

    seconds: float  # of all timed windows
    peak_bytes: int | None  # on a GPU, during them
    losses: list[float]
    norms: list[float]
    reads: int  # tables that ours brought to the host
    syncs: int | None  # host syncs during the timed windows, where they were watched


@dataclass(frozen=True)
class Job:
    """One arm, as its process is told."""

    arm: str
    device_type: str
    sizes: Sizes
    num_micros: int
    backend: str | None
    log: str  # what it prints goes there


class GoneError(Exception):
    """The arm failed, or gave no answer in time."""


def start_method(device_type: str) -> str:
    """CUDA cannot be forked; on the CPU a fork saves imports."""
    return "spawn" if device_type == "cuda" else "fork"


def preload(device_type: str) -> None:
    """Import what the processes of all arms would each import."""
    if start_method(device_type) == "fork":
        for module in ("torch._dynamo", *sorted({name for names in NEEDS.values() for name in names})):
            if find_spec(module.split(".")[0]) is not None:
                import_module(module)
        torch.set_num_threads(1)
        torch.compile(torch.neg, backend="eager")(torch.ones(1))  # imports more, and makes what all compilations share


class Arm:
    """An arm as its parent sees it."""

    def __init__(self, job: Job) -> None:
        """Start its process, which reads its packages and makes its model on the host."""
        context: Any = multiprocessing.get_context(start_method(job.device_type))
        self.job = job
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=work, args=(job, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def ready(self, limit_s: float) -> None:
        """Wait until it has read its packages and made its model; GoneError as in `turn`."""
        self._answer(limit_s)

    def turn(self, order: Order, limit_s: float) -> Turn:
        """Let it train.

        Raises:
            GoneError: with the reason; the process is ended.
        """
        turn = self._answer(limit_s, order)
        assert isinstance(turn, Turn)
        return turn

    def _answer(self, limit_s: float, *orders: Order) -> Any:
        try:
            for order in orders:
                self._pipe.send(order)
            answered = self._pipe.poll(max(0.0, limit_s))
            answer: Any = self._pipe.recv() if answered else f"no answer within the {limit_s:.0f} s that were left"
        except (EOFError, OSError):
            self._process.join(5)
            last = Path(self.job.log).read_text(errors="replace").strip().splitlines()[-1:]
            answer = " | ".join([f"its process ended with exit code {self._process.exitcode}", *last])
        if isinstance(answer, str):  # what went wrong
            self.end()
            raise GoneError(answer)
        return answer

    def end(self) -> None:
        """End the process, whatever it does."""
        self._process.kill()
        self._process.join(10)
        self._pipe.close()


def work(job: Job, pipe: Connection) -> None:
    """What the process of an arm does."""
    descriptor = os.open(job.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    try:
        device = torch.device(job.device_type, 0) if job.device_type == "cuda" else torch.device("cpu")
        if device.type == "cpu":
            torch.set_num_threads(1)
        model, stand = job.sizes.model(), Stand(job, pipe, device)
        micros = Micros(job.sizes, NUM_DISTINCT_WINDOWS * job.num_micros, MOST_WINDOWS * job.num_micros, device)
        for module in NEEDS.get(job.arm, []):
            import_module(module)
        pipe.send(None)  # ready
        stand.wait()  # the model is on the host until then
        model = model.to(device)
        training = Training(
            model, adamw(model, LR), device, micros, job.num_micros, stand.tell, job.backend
        )  # fmt: skip
        ARMS[job.arm](training)
        raise RuntimeError("the loop ended by itself")
    except BaseException as error:
        pipe.send(in_short(error))
        os._exit(1)


class Stand:
    """Where an arm stands between its turns; its loop calls `tell` after each window."""

    def __init__(self, job: Job, pipe: Connection, device: torch.device) -> None:
        """Nothing is ordered yet."""
        self._job, self._pipe, self._device = job, pipe, device
        self._order = Order(1, 1)
        self._losses: list[float] = []
        self._norms: list[float] = []
        self._watch = ExitStack()
        self._found: Any = None
        self._reads = _count_reads()
        self._began = 0.0

    def wait(self) -> None:
        """For the next order."""
        self._losses, self._norms = [], []
        self._order = self._pipe.recv()

    def tell(self, loss: float, norm: float) -> None:
        """After a window: note it, and begin or end what is measured."""
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
        syncs = None if found is None else sum(x if isinstance(x, int) else SYNC in str(x.message) for x in found)
        peak = None
        if self._device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self._device)
            torch.cuda.empty_cache()  # for the others
        return Turn(seconds, peak, self._losses, self._norms, len(self._reads), syncs)


def _count_reads() -> list[None]:
    """Grows by one with every table that an accumulator brings to the host."""
    reads: list[None] = []
    original = Shared.read

    def read(self: Shared, *others: torch.Tensor) -> Any:
        reads.append(None)
        return original(self, *others)

    Shared.read = read  # type: ignore[method-assign]
    return reads
