"""Watches for the failure of any rank, in a thread of every rank.

So each rank writes its stack, and none hangs.
"""

import contextlib
import faulthandler
import shutil
import threading
import time
import traceback
from pathlib import Path

from .board import Board
from .failure import leave, say

_OWN_WAY_OUT_S = 5.0  # time for the main thread to exit by its own error
_LONGEST_WAY_OUT_S = 20.0  # after the stack was written; then faulthandler's timer ends the process


def clear_stacks(run_dir: Path) -> None:
    """Remove the stacks that an earlier start left in the run folder. Call it before ranks work."""
    shutil.rmtree(run_dir / "stacks", ignore_errors=True)


def stack_file(run_dir: Path, rank: int) -> Path:
    """Return the file to which a rank writes its stack when any rank fails."""
    return run_dir / "stacks" / f"rank-{rank}.txt"


class Watch:
    """Waits in a daemon thread until the board reports that a rank has failed.

    Then it writes the stacks of all threads of this rank to RUN/stacks/rank-N.txt and gives this
    rank some seconds to exit by its own error (gloo reports a lost connection). If that does not
    happen, it exits with the exit code of the rank that failed. So a rank ends even if it hangs, in
    Python or in a collective, whatever the backend and the launcher.

    The thread blocks in the store, without polling, and ends with the job.
    """

    def __init__(self, board: Board, run_dir: Path, rank: int) -> None:
        self._board = board
        self._rank = rank
        self._file = stack_file(run_dir, rank)
        self._lock = threading.Lock()
        self._leaving = False
        self._thread = threading.Thread(target=self._run, name="distaccum watch", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Wait for the end of the thread, after the job is over on all ranks.

        Then nothing waits on the store any more.
        """
        self._thread.join()

    def write_own(self, error: BaseException) -> None:
        """Write the stack of this rank, which exits after `error`.

        This also starts a timer that ends the process if it does not exit in time.
        """
        self._leaving = True
        self._write(f"rank {self._rank} exits after this error", error)

    def _write(self, title: str, error: BaseException | None) -> None:
        """Append to this rank's file. A full disk is ignored: it is not the failure to be shown."""
        with self._lock, contextlib.suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            file = self._file.open("a")  # never closed: the timer below writes to it
            file.write(f"{title}\n")
            if error is not None:
                file.write("".join(traceback.format_exception(error)))
            file.write("all threads of this rank\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
            faulthandler.dump_traceback_later(_LONGEST_WAY_OUT_S, exit=True, file=file)
            self._last = file

    def _run(self) -> None:
        try:
            first = self._board.wait_until_over()
            if first is None:
                return
            why = f"rank {first[0]} failed first"
        except RuntimeError:
            first, why = (-1, 1), "the store of the job is gone"
        if first[0] == self._rank:
            return
        self._write(f"rank {self._rank} when it learned that {why}", None)
        self._board.note_stack()
        time.sleep(_OWN_WAY_OUT_S)
        if not self._leaving:
            say(f"[rank {self._rank}] exits because {why}; its stack is in {self._file}")
            leave(first[1])
