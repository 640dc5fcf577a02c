"""`launch`: one entry for the three ways of starting (one process, our own ranks, ranks that others started).

Whatever the way, Hydra runs once, and every rank gets what it composed. With launch=slurm nothing is started here.
"""

import os
import time
from pathlib import Path
from typing import NoReturn

from ..errors import ConfigError
from . import hydra_once, own_ranks
from .board import Board, PeerFailedError, agent_holds_store
from .failure import exit_code, is_lost_peer, leave, report, say, shorten, write_error_file
from .job import Check, Ended, Order, Task
from .job_child import run_in_child
from .meeting import MissingRankError, asked_limit_s
from .processes import tie_to_parent
from .ranks import Place, ranks_here, recognise, warn_without_srun
from .restarts import Restarts
from .run_lock import held
from .slurm_submit import Program, Submission
from .sweep import Summarise, Sweep, signals_raise
from .watch import clear_stacks
from .work import run_on_rank


def launch(
    argv: list[str],
    *,
    config_dir: Path,
    check: Check,
    task: Task,
    objective: str = "heldout_loss",
    summarise: Summarise | None = None,
    program: Program | None = None,
    keeps_folder: bool = True,
) -> int:
    """Run what the command line asks for; the exit code with which the process must end.

    In a sweep (`--multirun`) each job has processes of its own, so that a job that fails, whatever its way, neither
    ends nor disturbs the others. A single run under torchrun, or of one rank, works in the processes that are there.

    Args:
        argv: Hydra's arguments: overrides, `--multirun`, `--cfg job`, `--help` ...
        config_dir: the folder of `config.yaml`.
        check: gets each composed configuration before any rank works on it, once, and raises ConfigError.
        task: the work. A function of a module, so that it can be sent to new processes. Runs on every rank.
        objective: the name of the number in a job's result (see `write_result`) that the sweeper gets. A job that
            failed, or whose number is not finite, gives it nothing: Optuna marks that trial as failed.
        summarise: called once, on rank 0, at the end of a sweep of which a job was started, also after a signal.
        program: what a batch job starts for a configuration with launch=slurm; None to run it here all the same.
        keeps_folder: whether the work leaves something in its run folder. Then no other start may be at work there.

    Returns:
        0; for one job 2 when the configuration was refused (a letter on rank 0) and 1 for other errors; for a sweep 1
        when any of its jobs failed or was refused, and 2 when Hydra could not compose it; 128 + signal. A process that
        is one of several ranks does not return: it ends here, past the interpreter's own end (see `failure.leave`).
        torchrun itself knows 1 only, and prints a summary of its own.
    """
    try:
        place = recognise(os.environ)
    except ConfigError as error:
        return report(error)
    if place.started_by == "torchrun":
        tie_to_parent()
    os.environ.update(place.rendezvous())
    # One rank under torchrun has a board as well: at a restart there may be more or fewer.
    try:
        has_board = place.world_size > 1 or agent_holds_store()
        board = Board(place, limit_s=asked_limit_s(argv)) if has_board else None
    except MissingRankError as error:
        write_error_file(str(error), "see the error message above")
        leave(report(error))
    if board is not None and place.rank != 0:
        _follow(place, board, task)

    restarts = Restarts(board) if board is not None and agent_holds_store() else None
    if restarts is not None:
        argv = restarts.begin(argv)
    submission = None if program is None else Submission(program, check, place, os.environ)

    def on_job(order: Order) -> Ended:
        check(order.config)
        if submission is not None and submission.wants(order):
            hydra_once.keep_composed(order)
            return submission.add(order)
        if program is not None:
            warn_without_srun(os.environ, ranks_here(order.config, place))
        if not keeps_folder:
            return _run(order, task, place, board)
        with held(Path(order.run_dir)):
            hydra_once.keep_composed(order)
            if restarts is not None:
                restarts.remember(order)
            return _run(order, task, place, board)

    def at_end(sweep: Sweep) -> None:
        if submission is not None and submission.has_sweep:
            submission.submit_sweep(sweep)
        elif summarise is not None:
            summarise(sweep)

    code = hydra_once.run(argv, config_dir, on_job, objective, at_end)
    if board is None:
        return code
    if code:
        write_error_file(f"exit code {code}", "see the error message above")
    if code > 128:  # the others may be at work on a job, and not look for orders
        board.claim(code, patience_s=0.0)
    board.end(code)
    return leave(code)


def _run(order: Order, task: Task, place: Place, board: Board | None) -> Ended:
    """Rank 0: one job on all its ranks."""
    count = ranks_here(order.config, place)
    if board is not None:
        clear_stacks(Path(order.run_dir))
        store = board.publish(order)
        if order.sweep is None:
            run_on_rank(place.job(order, store), board, task)
            return Ended(0, None)
        try:
            return run_in_child(order, place, board, task)
        except PeerFailedError as error:
            raise SystemExit(error.code) from None  # the sweep has lost a rank
    if order.sweep is not None or count > 1:
        return own_ranks.start(order, count, task)
    task(place.job(order, None))
    return Ended(0, None)


def _follow(place: Place, board: Board, task: Task) -> NoReturn:
    """The other ranks: do what rank 0 publishes until it says that it was the last."""
    try:
        while not isinstance(received := board.receive(), int):
            order, store = received
            if order.sweep is None:
                run_on_rank(place.job(order, store), board, task)
                continue
            with signals_raise():
                run_in_child(order, place, board, task)
        if received:
            time.sleep(0.5)  # let the launcher see rank 0's exit first: it names the first one
        code = received
    except PeerFailedError as error:
        code = error.code
    except RuntimeError as error:
        if not is_lost_peer(error):
            raise
        say(f"[rank {place.rank}] leaves, because the store of the job is gone ({shorten(error)})")
        leave(1)
    except (KeyboardInterrupt, SystemExit) as error:
        code = exit_code(error)
        board.claim(code, patience_s=0.0)
    board.bye()
    leave(code)
