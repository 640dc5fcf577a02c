"""Reads a plan's micros from a data set, ahead of the computation."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset

from distaccum.core.plan import Micro, Plan, Window
from distaccum.core.rng import random_key
from distaccum.core.window import MicroBatches
from distaccum.data.base import Dataset
from distaccum.launch.processes import tie_to_parent


class Loader:
    """The micros of one rank, window after window, from any position of the plan.

    Reading runs ahead by about one window (the plan's largest) and no more, in worker processes; nothing here depends
    on the rank but which micros it reads.
    """

    def __init__(
        self, dataset: Dataset, plan: Plan, rank: int, world_size: int, *, workers: int = 0, pin_memory: bool = False
    ) -> None:
        """Keep the arguments; `windows` opens the stream.

        Args:
            dataset: training samples.
            plan: which of them make which window.
            rank: this rank.
            world_size: ranks that share the windows.
            workers: processes that read ahead; 0 reads when asked.
            pin_memory: whether to read into pinned memory (for a GPU).
        """
        self._dataset = dataset
        self.plan = plan  # followed from the next call of `windows` on
        self._rank = rank
        self._world_size = world_size
        self._workers = workers
        self._pin_memory = pin_memory
        self._open: Generator[Any, None, None] | None = None
        self.waited_s = 0.0  # seconds that the computation waited for data so far

    def windows(self, step: int, start: int, last_step: int) -> Iterator[tuple[Window, MicroBatches]]:
        """The windows `step` to `last_step - 1` with this rank's micros, each knowing the one after it.

        Args:
            step: the first window's number.
            start: its position in the plan's stream of samples.
            last_step: where to stop: the number of steps of the whole training.
        """
        self.close()
        self._open = stream = self._stream(step, start, last_step - step)
        next(stream)  # opened here and not in the first window, whose memory is measured
        previous: tuple[Window, MicroBatches] | None = None
        for window in islice(self.plan.windows(step, start), last_step - step):
            current = (window, self._micro_batches(window, stream))
            if previous is not None:
                previous[1].upcoming = current[1]
                yield previous
            previous = current
        if previous is not None:
            yield previous

    def close(self) -> None:
        """End the processes that read ahead. A training that stops early calls it, or they end with the process."""
        if self._open is not None:
            self._open.close()
            self._open = None

    def _micro_batches(self, window: Window, stream: Iterator[Any]) -> MicroBatches:
        micros = window.deal(self._rank, self._world_size)
        counted = [self._dataset.counted(self.plan.samples(micro)) for micro in micros]
        known = all(weight is not None for weight in counted)
        content = islice(stream, len(micros))
        return MicroBatches(
            content if known else list(content),  # where weights depend on the content, it is read ahead on the host
            len(micros),
            step=window.step,
            weights=counted if known else None,
        )

    def _stream(self, step: int, start: int, num_windows: int) -> Generator[Any, None, None]:
        # How far to read ahead is fixed once, so where windows grow it is for the largest of them.
        largest = min(self.plan.largest_batch, self.plan.num_samples)
        per_window = -(-largest // (self.plan.largest_micro * self._world_size))
        loader: DataLoader[Any] = DataLoader(
            _MicroSource(self._dataset, self.plan),
            sampler=_Order(self.plan, step, start, num_windows, self._rank, self._world_size),
            batch_size=None,  # an item of the source is a whole micro
            num_workers=self._workers,
            # Whoever started the ranks: forked workers are there at once, and leave no named semaphores behind.
            multiprocessing_context="fork" if self._workers else None,
            worker_init_fn=_ended_by_its_rank_only if self._workers else None,
            prefetch_factor=-(-per_window // self._workers) + 1 if self._workers else None,
            pin_memory=self._pin_memory,
        )
        stream = iter(loader)
        yield None
        while True:
            began = time.perf_counter()
            micro = next(stream, None)
            self.waited_s += time.perf_counter() - began
            if micro is None:
                return
            yield micro


def _ended_by_its_rank_only(_: int) -> None:
    """In a worker: launchers signal all processes of a rank, which needs its workers until it has saved.

    A worker holds copies of the rank's connections, so that it must not outlive a rank that was killed.
    """
    tie_to_parent()
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_wait_for_its_rank, args=(os.getppid(),), daemon=True).start()


def _wait_for_its_rank(rank: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != rank:
        pass
    os._exit(0)


@dataclass(frozen=True)
class _Order(Sampler[Micro]):
    """The micros of one rank in the order in which they are computed."""

    plan: Plan
    step: int
    start: int
    num_windows: int
    rank: int
    world_size: int

    def __iter__(self) -> Iterator[Micro]:
        for window in islice(self.plan.windows(self.step, self.start), self.num_windows):
            yield from window.deal(self.rank, self.world_size)


@dataclass(frozen=True)
class _MicroSource(TorchDataset[Any]):
    """A data set whose index is a micro and whose item is the micro-batch."""

    dataset: Dataset
    plan: Plan

    def __getitem__(self, micro: Micro) -> Any:
        generator = torch.Generator().manual_seed(random_key(self.plan.seed, micro.step, micro.number))
        return self.dataset.batch(self.plan.samples(micro), generator)
