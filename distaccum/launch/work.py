"""Runs the task on one of several ranks, then waits for all ranks or exits after a failure."""

import re
import signal
import threading
from typing import NoReturn

from .board import Board, PeerFailedError
from .failure import exit_code, fail, is_lost_peer, is_timeout, is_users, leave, report, say, shorten
from .job import Job, Task
from .watch import Watch, stack_file

_TIMEOUT_PATIENCE_S = 1.5  # how long a rank that timed out waits for the others to time out
_LOST_PEER_PATIENCE_S = 3.0  # longer: a rank that times out breaks the others' connections
_STACKS_PATIENCE_S = 1.0
_STORE_PATIENCE_S = 9.0  # more than all of these together


def run_on_rank(job: Job, board: Board, task: Task) -> None:
    """Run the task on one of several ranks and return when all ranks have finished it.

    After any failure it does not return but ends the process. Meanwhile SIGINT ends the process at
    once (unless the task handles it): Python's own handler would wait for the current collective
    and then print a traceback on every rank.
    """
    watch = Watch(board, job.run_dir, job.rank)
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        try:
            task(job)
        except SystemExit as error:
            if exit_code(error) != 0:
                raise
        board.meet()
    except PeerFailedError as error:
        watch.write_own(error)
        leave(error.code)
    except BaseException as error:
        _fail(error, job, board, watch)
    watch.end()
    # A handler of the task must last until the process ends.
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, before)


def _fail(error: BaseException, job: Job, board: Board, watch: Watch) -> NoReturn:
    """End a rank whose task failed. Call it while the error is being handled."""
    if not is_users(error):  # the user's mistake is the same on all ranks
        watch.write_own(error)
    no_answer = threading.Timer(_STORE_PATIENCE_S, _leave_without_store, (error, job.rank))
    no_answer.start()
    text = None
    patience_s = 0.0
    if is_timeout(error):
        board.note_in_collective()
        text = _who_is_missing(error, job, board)
    elif is_lost_peer(error):  # lets the rank whose failure broke the connection report first
        board.note_in_collective()
        text = f"another rank is gone (it was killed, or its machine is lost): {shorten(error)}"
        patience_s = _LOST_PEER_PATIENCE_S
    first = board.claim(exit_code(error), patience_s)
    if first[0] == job.rank and not is_users(error):
        board.wait_for_stacks(_STACKS_PATIENCE_S)
    no_answer.cancel()
    fail(error, job.rank, first, text)


def _leave_without_store(error: BaseException, rank: int) -> NoReturn:
    """Exit when the store does not answer, so that no other rank can be asked.

    With the network cut, the store's host neither answers nor closes the connection.
    """
    report(error, f"[rank {rank}] ")
    say(f"[rank {rank}] exits without an answer from the other ranks: the host of the job's store does not answer")
    leave(exit_code(error))


def _who_is_missing(error: BaseException, job: Job, board: Board) -> str:
    """Return the message for a collective that took too long, with the missing ranks."""
    found = re.search(r"(\d+) ?ms|\(ms\)=(\d+)", str(error))
    limit = f"={int(found[1] or found[2]) / 1000:g}" if found else ""
    text = f"a collective took longer than train.timeout_s{limit}"
    try:
        missing = board.missing_in_collective(_TIMEOUT_PATIENCE_S)
    except RuntimeError as lost:
        return f"{text}, and the store of the job is gone ({shorten(lost)})"
    if not missing:
        stacks = job.run_dir / "stacks"
        return f"{text}: all ranks are in a collective, but not in the same one; their stacks are in {stacks}"
    ranks = ", ".join(map(str, missing))
    files = ", ".join(str(stack_file(job.run_dir, rank)) for rank in missing)
    if len(missing) == 1:
        return f"{text}: rank {ranks} did not join it; its stack is in {files}"
    return f"{text}: ranks {ranks} did not join it; their stacks are in {files}"
