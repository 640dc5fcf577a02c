"""Runs one rank of a sweep under torchrun, with a process of its own for each job.

A job that fails therefore ends only its own processes.
"""

import multiprocessing
import os
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

from .board import Board
from .failure import leave, read_error_file, say
from .job import Ended, Order, Task
from .processes import tie_to_parent
from .ranks import Place, detect_launcher
from .signals import signals_forwarded
from .work import run_on_rank

_POLL_S = 0.1
_PEER_FAILED_GRACE_S = 3.0  # a process that waits for a lost rank has nothing to save


def run_in_child(order: Order, place: Place, board: Board, task: Task) -> Ended:
    """Run the task on this rank in a new process and return how the job ended.

    Every rank calls this. It returns the same result on every rank, once all ranks are done with
    the job. When the process of one rank fails, those of the others are ended.

    Signals to this process are forwarded to the job's process, which may save and exit. torchrun
    kills its ranks, and with them their jobs, 30 s after it gets SIGTERM or SIGINT. For a job that
    may need longer to reach the end of its window, use srun or launch.nproc_per_node, where signals
    do not pass through torchrun.

    Raises:
        PeerFailedError: Another rank is leaving the sweep.
        SystemExit: A signal was forwarded; 128 + signal. The sweep ends.
    """
    job = board.job_name()
    with tempfile.TemporaryDirectory(prefix="distaccum-") as folder:
        error_file = Path(folder) / "error.json"
        child = multiprocessing.get_context("spawn").Process(
            target=_child, args=(order, job, os.getpid(), task, str(error_file))
        )
        with signals_forwarded() as came:
            with _sigint_held_back():
                child.start()
            try:
                while child.exitcode is None and board.failed_job(job) is None:
                    child.join(_POLL_S)
                if child.exitcode and -child.exitcode in came:
                    raise SystemExit(128 - child.exitcode)
                if child.exitcode:
                    board.fail_job(job, _how_it_ended(child.exitcode, place.rank, error_file))
            finally:
                _end(child)
    board.meet()
    if came:
        raise SystemExit(128 + came[0])
    return board.failed_job(job) or Ended(0, None)


def _child(order: Order, job: str, parent: int, task: Task, error_file: str) -> None:
    tie_to_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    # torchrun's own error file is for an error that ends the whole sweep.
    os.environ["TORCHELASTIC_ERROR_FILE"] = error_file
    place = detect_launcher(os.environ)
    board = Board(place, job)
    run_on_rank(place.job(order, board.job_store()), board, task)
    leave(0)


def _how_it_ended(code: int, rank: int, error_file: Path) -> Ended:
    if code < 0:
        text = f"was ended by {signal.Signals(-code).name} (possibly manually, or by the system for lack of memory)"
        say(f"[rank {rank}] {text}")
        return Ended(1, f"rank {rank} {text}")
    return Ended(code, read_error_file(error_file) or f"exit code {code}")


def _end(child: BaseProcess) -> None:
    child.terminate()
    child.join(_PEER_FAILED_GRACE_S)
    if child.exitcode is None:
        child.kill()
        child.join()


@contextmanager
def _sigint_held_back() -> Iterator[None]:
    """Start processes with SIGINT blocked until they unblock it themselves.

    Otherwise an interrupted import would print a useless traceback.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
