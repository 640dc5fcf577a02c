"""`launch`: one entry for the three ways of starting (one process, our own ranks, ranks that others started).

Whatever the way, Hydra runs once, and every rank gets what it composed.
"""

import os
import time
from pathlib import Path

from . import hydra_once, own_ranks
from .board import Board, PeerFailedError
from .failure import is_lost_peer, leave, say, shorten, write_error_file
from .job import Check, Order, Task
from .ranks import Place, ranks_here, recognise, tie_to_parent
from .work import run_on_rank


def launch(
    argv: list[str],
    *,
    config_dir: Path,
    check: Check,
    task: Task,
) -> int:
    """Run what the command line asks for; the exit code with which the process must end.

    Args:
        argv: Hydra's arguments: overrides, `--multirun`, `--cfg job`, `--help` ...
        config_dir: the folder of `config.yaml`.
        check: gets each composed configuration before any rank works on it, once, and raises ConfigError.
        task: the work. A function of a module, so that it can be sent to new processes. Runs on every rank.

    Returns:
        0; 2 when the configuration was refused (a letter on rank 0); 1 for other errors; 128 + signal. A process that
        is one of several ranks does not return: it ends here, past the interpreter's own end (see `failure.leave`).
        torchrun itself knows 1 only, and prints a summary of its own.
    """
    place = recognise(os.environ)
    if place.started_by == "torchrun":
        tie_to_parent()
    if place.world_size == 1:
        return _lead(argv, config_dir, check, task, place=place, board=None)
    board = Board(place)
    if place.rank != 0:
        _follow(place, board, task)
    code = _lead(argv, config_dir, check, task, place=place, board=board)
    if code:
        write_error_file(f"exit code {code}", "the error message stands above")
    board.end(code)
    return leave(code)


def _lead(argv: list[str], config_dir: Path, check: Check, task: Task, *, place: Place, board: Board | None) -> int:
    """Rank 0: run Hydra and each of its jobs; the exit code."""

    def on_job(order: Order) -> int:
        check(order.config)
        count = ranks_here(order.config, place)
        if board is not None:
            run_on_rank(place.job(order, board.publish(order)), board, task)
        elif count > 1:
            return own_ranks.start(order, count, task)
        else:
            task(place.job(order, None))
        return 0

    return hydra_once.run(argv, config_dir, on_job)


def _follow(place: Place, board: Board, task: Task) -> None:
    """The other ranks: do what rank 0 publishes until it says that it was the last. Does not return."""
    try:
        while not isinstance(received := board.receive(), int):
            order, store = received
            run_on_rank(place.job(order, store), board, task)
    except PeerFailedError as error:
        leave(error.code)
    except RuntimeError as error:
        if not is_lost_peer(error):
            raise
        say(f"[rank {place.rank}] leaves, because the store of the job is gone ({shorten(error)})")
        leave(1)
    except KeyboardInterrupt:
        leave(130)
    if received:
        time.sleep(0.5)  # let the launcher see rank 0's exit first: it names the first one
    leave(received)
