"""Starts the ranks of a job on this machine, with one elastic launch for each job."""

import atexit
import logging
import os
import signal
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from .failure import leave, say
from .grace import Grace
from .job import Ended, Job, Task, value_of
from .peers import Peers
from .processes import signals_forwarded, tie_to_parent
from .rank import clear_stacks, run_on_rank
from .ranks import detect_launcher


def start(job: Job, num_ranks: int, task: Task, grace: Grace) -> Ended:
    """Start `num_ranks` processes that run `task`, wait for all, and return how the job ended.

    `task` must be picklable. A rank that fails shows its error itself. After a failure that is not
    the user's mistake, all ranks are started again in the same run folder, up to
    `launch.max_restarts` times.

    A signal to this process is forwarded to the ranks, which may take the time they need. Ranks
    that save and exit with 0 have done their job. A sweep ends in either case.

    Raises:
        SystemExit: The ranks ended by a signal, or a sweep got one; 128 + signal.
    """
    restarts = value_of(job.config, "launch.max_restarts") or 0
    with signals_forwarded() as came, _surroundings(num_ranks):
        for restart in range(1, restarts + 2):
            clear_stacks(job.run_dir)
            ended = _start_once(job, num_ranks, task, grace, came)
            if came and job.sweep is not None:
                raise SystemExit(128 + came[0])
            if ended.code in (0, 2) or came or restart > restarts:
                break
            say(f"restart {restart}: continues in {job.run_dir}")
    return ended


def _start_once(job: Job, num_ranks: int, task: Task, grace: Grace, came: list[int]) -> Ended:
    with tempfile.TemporaryDirectory(prefix="distaccum-") as folder:
        launch = elastic_launch(
            LaunchConfig(
                min_nodes=1,
                max_nodes=1,
                nproc_per_node=num_ranks,
                run_id=uuid.uuid4().hex,
                rdzv_backend="c10d",
                rdzv_endpoint="localhost:0",
                local_addr="localhost",
                max_restarts=0,  # torch would also repeat what the user must correct
                monitor_interval=0.1,
                start_method="spawn",
                signals_to_handle="SIGHUP,SIGQUIT",  # 30 s after one, torch kills the ranks
                logs_specs=DefaultLogsSpecs(log_dir=folder),
            ),
            _rank,
        )
        try:
            launch(job, os.getpid(), task, grace)
        except SignalException as error:
            raise SystemExit(128 + int(error.sigval)) from None
        except BrokenPipeError:  # a rank ended while it was being started
            if came:
                raise SystemExit(128 + came[0]) from None
            raise
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            if -failure.exitcode in came:
                raise SystemExit(128 - failure.exitcode) from None
            if failure.exitcode < 0:
                text = (
                    f"was ended by {failure.signal_name()} (possibly manually, or by the system "
                    "for lack of memory)"
                )
                say(f"[rank {rank}] {text}")
                return Ended(1, f"rank {rank} {text}")
            # Without an error file, torch's message is only advice for users of torchrun.
            if not os.path.exists(failure.error_file):
                return Ended(failure.exitcode, f"exit code {failure.exitcode}")
            message: Any = failure.message  # a text, or a dict with one
            text = message["message"] if isinstance(message, dict) else message
            return Ended(failure.exitcode, str(text))
    return Ended(0, None)


def _rank(job: Job, parent: int, task: Task, grace: Grace) -> None:
    """Run one rank in its own process."""
    tie_to_parent(parent)
    place = detect_launcher(os.environ)
    peers = Peers(place, grace, start_id="only")  # the agent has made the store for this start
    run_on_rank(place.job(job, peers.job_store()), peers, task)
    atexit.register(leave, 0)  # after torch has reported to the parent that this rank is done


@contextmanager
def _surroundings(num_ranks: int) -> Iterator[None]:
    """Prepare this process for torch's launcher and undo all changes afterwards."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGQUIT)}
    threads_given = "OMP_NUM_THREADS" in os.environ
    if not threads_given:
        os.environ["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // num_ranks))
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # the ranks show their errors; torch would log each again
    try:
        yield
    finally:
        logging.disable(disabled)
        if not threads_given:
            del os.environ["OMP_NUM_THREADS"]
        for number, handler in handlers.items():
            signal.signal(number, handler)
