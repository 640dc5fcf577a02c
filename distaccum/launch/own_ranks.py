"""Ranks that we start ourselves on this machine: one elastic launch for each job."""

import atexit
import logging
import os
import signal
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig as ElasticConfig
from torch.distributed.launcher.api import elastic_launch

from .board import Board
from .failure import error_message, leave, say
from .job import Ended, Order, Task
from .ranks import recognise, tie_to_parent
from .work import run_on_rank


def start(order: Order, num_ranks: int, task: Task) -> Ended:
    """Start `num_ranks` processes, run `task` on each, wait for all; how it ended. `task` must be picklable.

    A rank that fails has shown its error itself. A signal to this process ends the ranks, and then is SystemExit with
    128 + signal, which also ends a sweep.
    """
    word = uuid.uuid4().hex
    with tempfile.TemporaryDirectory(prefix="distaccum-") as folder, _surroundings(num_ranks):
        launch = elastic_launch(
            ElasticConfig(
                min_nodes=1,
                max_nodes=1,
                nproc_per_node=num_ranks,
                run_id=word,
                rdzv_backend="c10d",
                rdzv_endpoint="localhost:0",
                local_addr="localhost",
                max_restarts=0,
                monitor_interval=0.1,
                start_method="spawn",
                logs_specs=DefaultLogsSpecs(log_dir=folder),
            ),
            _rank,
        )
        try:
            launch(order, word, os.getpid(), task)
        except SignalException as error:
            raise SystemExit(128 + int(error.sigval)) from None
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            if failure.exitcode < 0:
                text = f"was ended by {failure.signal_name()} (by hand, or for lack of memory)"
                say(f"[rank {rank}] {text}")
                return Ended(1, f"rank {rank} {text}")
            told = os.path.exists(failure.error_file)  # if not, torch's message is advice for its own users
            return Ended(failure.exitcode, error_message(failure.message) if told else f"exit code {failure.exitcode}")
    return Ended(0, None)


def _rank(order: Order, word: str, parent: int, task: Task) -> None:
    """What each process does."""
    tie_to_parent(parent)
    place = recognise(os.environ)
    board = Board(place, word)
    run_on_rank(place.job(order, board.job_store() if place.world_size > 1 else None), board, task)
    atexit.register(leave, 0)  # after torch has told the parent that this rank is done


@contextmanager
def _surroundings(num_ranks: int) -> Iterator[None]:
    """What torch's launcher needs or changes in this process, put back afterwards."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    handlers[signal.SIGQUIT] = signal.getsignal(signal.SIGQUIT)
    threads_given = "OMP_NUM_THREADS" in os.environ
    if not threads_given:
        os.environ["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // num_ranks))
    logging.disable(logging.CRITICAL)  # the ranks show their errors; torch would log each of them again
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
        if not threads_given:
            del os.environ["OMP_NUM_THREADS"]
        for number, handler in handlers.items():
            signal.signal(number, handler)
