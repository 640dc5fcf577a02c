"""One rank of a sweep under torchrun: each job in a process of its own, so that a job that fails ends nothing else."""

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
from .ranks import Place, recognise
from .signals import signals_forwarded
from .work import run_on_rank

_POLL_S = 0.1
_PEER_FAILED_GRACE_S = 3.0  # what waits for a rank that is gone has nothing to save


def run_in_child(order: Order, place: Place, board: Board, task: Task) -> Ended:
    """Run the task on this rank in a new process; every rank calls this. How the job ended, the same on every rank.

    Returns when all ranks are done with the job. When the process of one rank fails, those of the others are ended.
    PeerFailedError when another rank leaves the sweep.

    Signals to this process go to the job's, which may save and end; then they are SystemExit with 128 + signal, on
    which the sweep ends. torchrun kills its ranks, and with them their jobs, 30 s after it got SIGTERM or SIGINT: what
    may need longer to reach the end of its window should get the signal itself (srun, launch.nproc_per_node).
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
    os.environ["TORCHELASTIC_ERROR_FILE"] = error_file  # torchrun's own is for an error that ends the whole sweep
    place = recognise(os.environ)
    board = Board(place, job)
    run_on_rank(place.job(order, board.job_store()), board, task)
    leave(0)


def _how_it_ended(code: int, rank: int, error_file: Path) -> Ended:
    if code < 0:
        text = f"was ended by {signal.Signals(-code).name} (by hand, or for lack of memory)"
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
    """A process started in here keeps SIGINT until it asks for it: a traceback while it imports helps nobody."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
