"""Reads a plan's micro-batches from a data set, ahead of the computation."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from itertools import chain, islice, pairwise
from typing import Any

import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from distaccum.core.plan import MicroBatch, Plan, Window
from distaccum.core.rng import random_key
from distaccum.core.window import MicroBatches
from distaccum.data.base import Dataset
from distaccum.launch.processes import tie_to_parent


@dataclass
class LoaderConfig:
    """Configures how samples are read."""

    workers: int
    pin_memory: bool | None


class Loader:
    """Yields the micro-batches of one rank, window by window, from any position of the plan.

    Worker processes read ahead by about one window (the plan's largest) and no more. The rank
    determines only which micro-batches are read.
    """

    def __init__(
        self,
        dataset: Dataset,
        plan: Plan,
        rank: int,
        world_size: int,
        *,
        workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        """Store the arguments; `windows` starts reading.

        Args:
            dataset: training samples.
            plan: decides which samples make which window.
            rank: this rank.
            world_size: number of ranks that share the windows.
            workers: number of processes that read ahead; 0: this process reads when a micro-batch
                is needed.
            pin_memory: whether to read into pinned memory (for a GPU).
        """
        self._dataset = dataset
        self.plan = plan  # may be replaced; the next call of `windows` uses it
        self._rank = rank
        self._world_size = world_size
        self._workers = workers
        self._pin_memory = pin_memory
        self._open: Generator[Any, None, None] | None = None
        self.waited_s = 0.0  # seconds that the computation has waited for data

    def windows(
        self, step: int, start: int, last_step: int
    ) -> Iterator[tuple[Window, MicroBatches]]:
        """Yield the windows `step` to `last_step - 1` with this rank's micro-batches.

        The micro-batches of each window have those of the next window in `upcoming`.

        Args:
            step: number of the first window.
            start: position of the first window in the plan's stream of samples.
            last_step: where to stop: the number of steps of the whole training.
        """
        self.close()
        self._open = stream = self._stream(step, start, last_step - step)
        next(stream)  # started here, not in the first window, whose memory is measured
        planned = islice(self.plan.windows(step, start), last_step - step)
        windows = ((window, self._micro_batches(window, stream)) for window in planned)
        for current, following in pairwise(chain(windows, [None])):
            assert current is not None, "only the last one is followed by nothing"
            if following is not None:
                current[1].upcoming = following[1]
            yield current

    def close(self) -> None:
        """End the processes that read ahead.

        Call this after a training that stops early; otherwise they end with this process.
        """
        if self._open is not None:
            self._open.close()
            self._open = None

    def _micro_batches(self, window: Window, stream: Iterator[Any]) -> MicroBatches:
        micro_batches = window.of_rank(self._rank, self._world_size)
        counted = [
            self._dataset.num_targets(self.plan.samples(micro_batch))
            for micro_batch in micro_batches
        ]
        known = all(denominator is not None for denominator in counted)
        content = islice(stream, len(micro_batches))
        return MicroBatches(
            # denominators depend on the content, so it is read first
            (content if known else list(content)),
            len(micro_batches),
            step=window.step,
            denominators=counted if known else None,
        )

    def _stream(self, step: int, start: int, num_windows: int) -> Generator[Any, None, None]:
        # A DataLoader cannot change how far it reads ahead, so this is for the largest window.
        largest = min(self.plan.largest_batch, self.plan.num_samples)
        per_window = -(-largest // (self.plan.largest_micro_batch * self._world_size))
        order = chain.from_iterable(
            window.of_rank(self._rank, self._world_size)
            for window in islice(self.plan.windows(step, start), num_windows)
        )
        loader: DataLoader[Any] = DataLoader(
            _MicroBatchSource(self._dataset, self.plan),
            sampler=order,
            batch_size=None,  # an item of the source is a whole micro-batch
            num_workers=self._workers,
            # Fork, however the ranks were started: it is fast and leaves no named semaphores.
            multiprocessing_context="fork" if self._workers else None,
            worker_init_fn=_ended_by_its_rank_only if self._workers else None,
            prefetch_factor=-(-per_window // self._workers) + 1 if self._workers else None,
            pin_memory=self._pin_memory,
        )
        stream = iter(loader)
        yield None
        while True:
            began = time.perf_counter()
            micro_batch = next(stream, None)
            self.waited_s += time.perf_counter() - began
            if micro_batch is None:
                return
            yield micro_batch


def _ended_by_its_rank_only(_: int) -> None:
    """Make a worker process end only when its rank ends it or is gone.

    Launchers signal all processes of a rank, but the rank needs its workers until it has saved. A
    worker holds copies of the rank's connections, so it must not outlive a rank that was killed.
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
class _MicroBatchSource(TorchDataset[Any]):
    """Adapts a data set to DataLoader: an index is a planned micro-batch, the item its content."""

    dataset: Dataset
    plan: Plan

    def __getitem__(self, micro_batch: MicroBatch) -> Any:
        generator = torch.Generator().manual_seed(
            random_key(self.plan.seed, micro_batch.step, micro_batch.number)
        )
        return self.dataset.batch(self.plan.samples(micro_batch), generator)
