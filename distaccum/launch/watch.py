"""A thread of every rank that waits for the failure of any rank, so that each leaves its stack and nobody hangs."""

import contextlib
import faulthandler
import shutil
import threading
import time
import traceback
from pathlib import Path

from .board import Board
from .failure import leave, say

_OWN_WAY_OUT_S = 5.0  # what the main thread gets to leave by its own error
_LONGEST_WAY_OUT_S = 20.0  # after its stack was written; whatever still holds it, the timer of faulthandler ends it


def clear_stacks(run_dir: Path) -> None:
    """Remove what an earlier start has left in the same run folder. Before any rank is at work."""
    shutil.rmtree(run_dir / "stacks", ignore_errors=True)


def stack_file(run_dir: Path, rank: int) -> Path:
    """Where a rank writes its stack when any rank fails."""
    return run_dir / "stacks" / f"rank-{rank}.txt"


class Watch:
    """Waits, in a daemon thread, for the word on the board that a rank has failed.

    Then this rank writes the stacks of all its threads to RUN/stacks/rank-N.txt, gets some seconds to leave by its own
    error (gloo tells it that a connection is lost), and otherwise leaves with the exit code of the rank that failed.
    So a rank ends also where it hangs, in Python or in a collective, whatever the backend and whoever started it.

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
        """The job is over on all ranks. When this returns, nothing waits on the store any more."""
        self._thread.join()

    def write_own(self, error: BaseException) -> None:
        """This rank leaves after `error`: write its stack, and be gone after a while, come what may."""
        self._leaving = True
        self._write(f"rank {self._rank} leaves after this error", error)

    def _write(self, title: str, error: BaseException | None) -> None:
        """Append to this rank's file. What prevents that (a full disk) is not the failure to be shown."""
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
        self._write(f"rank {self._rank} when it learnt that {why}", None)
        self._board.note_stack()
        time.sleep(_OWN_WAY_OUT_S)
        if not self._leaving:
            say(f"[rank {self._rank}] leaves, because {why}; where it was at work: {self._file}")
            leave(first[1])
