"""Starts jobs in one of three ways: in this process, on our own ranks, or on ranks of a launcher.

In each case Hydra runs once and every rank gets what it composed. With launch=slurm nothing is
started here.
"""

import os
import time
from collections.abc import Callable, Sequence
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
from .ranks import Place, detect_launcher, ranks_here, warn_without_srun
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
    check_words: Callable[[Sequence[str]], None] | None = None,
    objective: str = "validation_loss",
    summarise: Summarise | None = None,
    program: Program | None = None,
    keeps_folder: bool = True,
) -> int:
    """Run what the command line asks for; return the exit code with which the process must end.

    In a sweep (`--multirun`) each job has its own processes, so that a job that fails in any way
    neither ends nor disturbs the others. A single run under torchrun, or of one rank, works in the
    existing processes.

    Args:
        argv: Hydra's arguments: overrides, `--multirun`, `--cfg job`, `--help` ...
        config_dir: The folder of `config.yaml`.
        check: Called once with each composed configuration before any rank works on it; raises
            ConfigError.
        task: The work, which runs on every rank. It must be a function of a module, so that it can
            be sent to new processes.
        check_words: Called with the words of the command line before Hydra reads them; raises
            ConfigError. Rank 0 only.
        objective: The name of the number in a job's result (see `write_result`) that the sweeper
            gets. It gets None for a job that failed or whose number is not finite: Optuna marks
            that trial as failed.
        summarise: Called once, on rank 0, at the end of a sweep in which a job was started, also
            after a signal.
        program: What a batch job starts for a configuration with launch=slurm. None runs such a
            configuration here.
        keeps_folder: Whether the work leaves files in its run folder. Then no other start may work
            in that folder at the same time.

    Returns:
        The exit code: 0 without an error, and 128 + signal after a signal. For one job: 2 when the
        configuration was refused (an error message on rank 0) and 1 for other errors. For a sweep:
        1 when any of its jobs failed or was refused, and 2 when Hydra could not compose it.

        A process that is one of several ranks does not return: it exits here, without the
        interpreter's own shutdown (see `failure.leave`). torchrun itself exits with 1 after any
        failure, and prints its own summary.
    """
    try:
        place = detect_launcher(os.environ)
    except ConfigError as error:
        return report(error)
    if place.started_by == "torchrun":
        tie_to_parent()
    os.environ.update(place.rendezvous())
    # A single rank under torchrun has a board too: a restart may have more or fewer ranks.
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

    try:
        if check_words is not None:
            check_words(argv)
    except ConfigError as error:
        code = report(error)
    else:
        code = hydra_once.run(argv, config_dir, on_job, objective, at_end)
    if board is None:
        return code
    if code:
        write_error_file(f"exit code {code}", "see the error message above")
    if code > 128:  # the others may be working on a job, not waiting for orders
        board.claim(code, patience_s=0.0)
    board.end(code)
    return leave(code)


def _run(order: Order, task: Task, place: Place, board: Board | None) -> Ended:
    """Run one job on all its ranks. For rank 0."""
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
    """Work on the orders of rank 0 until it publishes the last one. For the other ranks."""
    try:
        while not isinstance(received := board.receive(), int):
            order, store = received
            if order.sweep is None:
                run_on_rank(place.job(order, store), board, task)
                continue
            with signals_raise():
                run_in_child(order, place, board, task)
        if received:
            time.sleep(0.5)  # the launcher names the first rank that exits; let it be rank 0
        code = received
    except PeerFailedError as error:
        code = error.code
    except RuntimeError as error:
        if not is_lost_peer(error):
            raise
        say(f"[rank {place.rank}] exits because the store of the job is gone ({shorten(error)})")
        leave(1)
    except (KeyboardInterrupt, SystemExit) as error:
        code = exit_code(error)
        board.claim(code, patience_s=0.0)
    board.bye()
    leave(code)
