"""One rank of several, at work: the task, then the meeting of all ranks, or the way out."""

import signal

from .board import Board, PeerFailedError
from .failure import exit_code, fail, is_lost_peer, leave
from .job import Job, Task


def run_on_rank(job: Job, board: Board, task: Task) -> None:
    """Run the task on one rank of several and return when all ranks have done so. On any failure: does not return.

    Meanwhile SIGINT ends the process at once (unless the task handles it): Python's own handling would wait for the
    collective that just runs, and then print a traceback on every rank.
    """
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        try:
            task(job)
        except SystemExit as error:
            if exit_code(error) != 0:
                raise
        board.meet()
    except PeerFailedError as error:
        leave(error.code)
    except BaseException as error:
        # Who lost a connection waits for the word of the rank whose failure broke it.
        first = board.claim(exit_code(error), patience_s=2.0 if is_lost_peer(error) else 0.0)
        fail(error, job.rank, first)
    signal.signal(signal.SIGINT, before)
