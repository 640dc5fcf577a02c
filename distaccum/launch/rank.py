"""Runs the task on one of several ranks, which ends when any rank has failed."""

import contextlib
import faulthandler
import re
import shutil
import signal
import threading
import time
import traceback
from pathlib import Path
from typing import NoReturn

from .failure import (
    exit_code,
    first_line,
    is_lost_peer,
    is_timeout,
    is_users,
    leave,
    record,
    report,
    say,
    write_error_file,
)
from .job import Job, Task
from .peers import Peers


def run_on_rank(job: Job, peers: Peers, task: Task) -> None:
    """Run the task on one of several ranks and return when all ranks have finished it.

    After any failure it does not return but ends the process. From here on SIGINT ends the process
    at once (unless the task handles it): Python's own handler would wait for the current collective
    and then print a traceback on every rank.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    watch = Watch(peers, job.run_dir)
    try:
        task(job)
    except BaseException as error:
        if exit_code(error):
            _fail(error, job, peers, watch)
    watch.finish()


def clear_stacks(run_dir: Path) -> None:
    """Remove the stacks that an earlier start left in the run folder. Call it before ranks work."""
    shutil.rmtree(run_dir / "stacks", ignore_errors=True)


def stack_file(run_dir: Path, rank: int) -> Path:
    """Return the file to which a rank writes its stack when any rank fails."""
    return run_dir / "stacks" / f"rank-{rank}.txt"


class Watch:
    """Waits in a daemon thread for the failure of any rank.

    Then it writes the stacks of all threads of this rank to RUN/stacks/rank-N.txt and gives this
    rank some seconds to exit by its own error (gloo reports a lost connection). If that does not
    happen, it exits with the exit code of the rank that failed. So a rank ends even if it hangs, in
    Python or in a collective, whatever the backend and the launcher.

    The thread blocks in the store, without polling, and ends with the job.
    """

    def __init__(self, peers: Peers, run_dir: Path) -> None:
        self._peers = peers
        self._file = stack_file(run_dir, peers.rank)
        self._lock = threading.Lock()
        self._failed = self._finished = False
        self.thread = threading.Thread(target=self._run, name="distaccum watch", daemon=True)
        self.thread.start()

    def finish(self) -> None:
        """Record that this rank has done its work, and wait until all have."""
        self._finished = True
        with contextlib.suppress(RuntimeError):  # the store is gone; the thread ends the process
            self._peers.finish()
        self.thread.join()

    def write_own(self, error: BaseException) -> None:
        """Write the stack of this rank, which exits after `error`."""
        self._failed = True
        self._write(f"rank {self._peers.rank} exits after this error", error)

    def _write(self, title: str, error: BaseException | None = None) -> None:
        """Append to this rank's file, and start a timer that ends the process.

        A full disk is ignored: it is not the failure to be shown.
        """
        with self._lock, contextlib.suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._open = file = self._file.open("a")  # never closed: the timer writes to it
            trace = "" if error is None else "".join(traceback.format_exception(error))
            file.write(f"{title}\n{trace}all threads of this rank\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
            faulthandler.dump_traceback_later(self._peers.grace.process_s, exit=True, file=file)

    def _run(self) -> None:
        peers = self._peers
        try:
            first = peers.wait_until_over()
            why = f"rank {first[0]} failed first" if first is not None else ""
        except RuntimeError:
            first, why = (-1, 1), "the store of the job is gone"
        if first is None or first[0] == peers.rank:
            return
        self._write(f"rank {peers.rank} when it learned that {why}")
        with contextlib.suppress(RuntimeError):
            peers.note("stacks")
        if not self._failed:
            time.sleep(peers.grace.first_s if self._finished else peers.grace.own_error_s)
        if self._failed:
            return
        if not self._finished:
            say(f"[rank {peers.rank}] exits because {why}; its stack is in {self._file}")
        leave(first[1])


def _fail(error: BaseException, job: Job, peers: Peers, watch: Watch) -> NoReturn:
    """End a rank whose task failed. Call it while the error is being handled.

    Only the rank that failed first shows its error and writes torchelastic's error file. The other
    ranks wait, so that the launcher sees its exit first, and print one line if they are still alive
    by then.
    """
    grace, code, by_user = peers.grace, exit_code(error), is_users(error)
    if not by_user:  # the user's mistake is the same on all ranks
        watch.write_own(error)
    no_answer = threading.Timer(grace.store_s, _leave_without_store, (error, job.rank))
    no_answer.start()
    text, patience_s = None, 0.0
    if is_timeout(error):
        found = re.search(r"(\d+) ?ms|\(ms\)=(\d+)", str(error))
        limit = f"={int(found[1] or found[2]) / 1000:g}" if found else ""
        text = f"a collective took longer than train.timeout_s{limit}"
    elif is_lost_peer(error):
        text = "another rank is gone (it was killed, or its machine is lost): " + first_line(error)
        patience_s = grace.lost_peer_s
    try:
        if text is not None:
            peers.note("in collective")
        if is_timeout(error):
            text = f"{text}: {_who_is_missing(job.run_dir, peers)}"
        first = peers.claim(code, patience_s)
        if first[0] == job.rank and not by_user:
            peers.missing("stacks", grace.stacks_s, allowed=1)
    except RuntimeError:  # the store ended with its host; no rank can be asked
        first = (job.rank, code)
        watch.thread.join(grace.stacks_s)
    no_answer.cancel()
    if first[0] != job.rank:
        time.sleep(grace.first_s)
        if not by_user:
            why = first_line(error)
            say(f"[rank {job.rank}] exits because rank {first[0]} failed first ({why})")
    elif text is not None:
        say(f"[rank {job.rank}] {text}")
        write_error_file(text, text)
    elif not isinstance(error, SystemExit | KeyboardInterrupt):
        report(error, f"[rank {job.rank}] ")
        record(error)
    leave(first[1])


def _leave_without_store(error: BaseException, rank: int) -> NoReturn:
    """Exit when the store does not answer, so that no other rank can be asked.

    With the network cut, the store's host neither answers nor closes the connection.
    """
    report(error, f"[rank {rank}] ")
    say(
        f"[rank {rank}] exits without an answer from the other ranks: the host of the job's store "
        "does not answer"
    )
    leave(exit_code(error))


def _who_is_missing(run_dir: Path, peers: Peers) -> str:
    """Name the ranks that are not in a collective, when the others have timed out."""
    missing = peers.missing("in collective", peers.grace.timeout_s, allowed=1)
    if not missing:
        return (
            "all ranks are in a collective, but not in the same one; their stacks are in "
            f"{run_dir / 'stacks'}"
        )
    ranks = ", ".join(map(str, missing))
    files = ", ".join(str(stack_file(run_dir, rank)) for rank in missing)
    one = len(missing) == 1
    named, have = (
        (f"rank {ranks}", "its stack is") if one else (f"ranks {ranks}", "their stacks are")
    )
    return f"{named} did not join it; {have} in {files}"
