"""Starts jobs in one of three ways: in this process, on our own ranks, or on ranks of a launcher.

In each case Hydra runs once, on rank 0, and every rank gets what it composed. With launch=slurm
nothing is started here.
"""

import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NoReturn

import hydra

from distaccum.metrics.sweep import Sweep

from ..errors import ConfigError
from . import own_ranks, runner
from .failure import first_line, leave, report, say, write_error_file
from .grace import GRACE, Grace
from .job import Check, Ended, Job, Task, value_of
from .overrides import override
from .peers import LIMIT_KEY, LIMIT_S, MissingRankError, Peers, agent_holds_store, asked_limit_s
from .processes import tie_to_parent
from .rank import clear_stacks, run_on_rank
from .ranks import Place, detect_launcher, ranks_here, warn_without_srun
from .run_lock import held
from .slurm_submit import Program, Submission
from .sweep import Outcomes, Summarise


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
    grace: Grace = GRACE,
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
        grace: How long ranks wait for each other when one fails.

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
    peers = _connect(place, grace, argv)
    if peers is not None and peers.rank != 0:
        _follow(place, peers, task)
    if agent_holds_store() and peers is not None:
        argv = _continued(argv, peers)
    submission = None if program is None else Submission(program, check, place)
    outcomes = Outcomes(objective)

    def on_job(job: Job) -> Ended:
        check(job.config)
        if submission is not None and submission.wants(job):
            runner.keep_composed(job)
            return submission.add(job)
        count = ranks_here(job.config, place)
        if program is not None:
            warn_without_srun(os.environ, count)
        with ExitStack() as until_done:
            if keeps_folder:
                until_done.enter_context(held(job.run_dir))
                runner.keep_composed(job)
                if agent_holds_store() and peers is not None:
                    peers.kept.set(
                        "folder", str(job.run_dir if job.sweep is None else outcomes.folder)
                    )
            if job.sweep is not None or (peers is None and count > 1):
                return own_ranks.start(job, count, task, grace)
            if peers is None:
                task(job)
            else:
                _run_with_peers(job, place, peers, task)
        return Ended(0, None)

    with ExitStack() as until_end:
        code = 0
        try:
            if check_words is not None:
                check_words(argv)
            runner.check_words(argv)
            if runner.MULTIRUN & set(argv):
                place.check_sweep()
            with runner.arguments(argv):
                run = runner.hydra_task(on_job, outcomes, until_end)
                folder = str(config_dir.absolute())
                hydra.main(config_path=folder, config_name="config", version_base="1.3")(run)()
        except BaseException as error:
            code = runner.ended(error, outcomes)
        if outcomes.jobs:
            at_end: Callable[[Sweep], int | None] | None = summarise
            if submission is not None and submission.in_sweep:
                at_end = submission.submit_sweep
            code = _end_sweep(outcomes, outcomes.exit_code(code), at_end)
        else:
            code = code or runner.refuse_empty_sweep(argv)
    if peers is None:
        return code
    if code:
        write_error_file(f"exit code {code}")
    peers.end(json.dumps({"end": code}), code)
    return leave(code)


def _connect(place: Place, grace: Grace, argv: list[str]) -> Peers | None:
    """Connect this rank to the others that a launcher has started; None if none has."""
    if place.started_by == "torchrun":
        tie_to_parent()
    os.environ.update(place.rendezvous())
    # A single rank under torchrun has a store too: a restart may have more or fewer ranks.
    if place.world_size == 1 and not agent_holds_store():
        return None
    try:
        return Peers(place, grace, asked_limit_s(argv))
    except MissingRankError as error:
        write_error_file(str(error))
        leave(report(error))


def _continued(argv: list[str], peers: Peers) -> list[str]:
    """Return Hydra's arguments for this start, with the folder of an earlier start added.

    torchrun starts the ranks again with `--max-restarts`, and when nodes come or go. They are
    returned unchanged if there was no earlier start or if the user has given a folder.
    """
    number = peers.kept.add("starts", 1) - 1
    given = ("run_dir=", "hydra.run.dir=", "hydra.sweep.dir=")
    if not peers.kept.check(["folder"]) or any(word.startswith(given) for word in argv):
        return argv
    folder = peers.kept.get("folder").decode()
    say(f"restart {number}: continues in {folder}")
    key = "hydra.sweep.dir" if runner.MULTIRUN & set(argv) else "run_dir"
    return [*argv, override(key, folder)]


def _run_with_peers(job: Job, place: Place, peers: Peers, task: Task) -> None:
    """Send a job to the other ranks and run it here too. For rank 0."""
    clear_stacks(job.run_dir)
    word = {"job": [job.config, str(job.run_dir), job.overrides]}
    peers.share(json.dumps(word), value_of(job.config, LIMIT_KEY) or LIMIT_S)
    run_on_rank(place.job(job, peers.job_store()), peers, task)


def _follow(place: Place, peers: Peers, task: Task) -> NoReturn:
    """Do what rank 0 says: run a job, or exit. For the other ranks."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's own handler would wait for rank 0
    try:
        word = json.loads(peers.receive())
    except RuntimeError as error:
        why = f"the store of the job is gone ({first_line(error)})"
        say(f"[rank {place.rank}] exits because {why}")
        leave(1)
    code = word.get("end", 0)
    if "job" in word:
        config, run_dir, overrides = word["job"]
        job = Job(config, Path(run_dir), overrides, number=0, sweep=None)
        run_on_rank(place.job(job, peers.job_store()), peers, task)
    elif code:
        time.sleep(peers.grace.rank_0_s)
    peers.note("left")
    leave(code)


def _end_sweep(outcomes: Outcomes, code: int, at_end: Callable[[Sweep], int | None] | None) -> int:
    """Report a sweep, or submit it, and return its exit code."""
    if at_end is None:
        return code
    try:
        return at_end(Sweep(outcomes.folder, tuple(outcomes.jobs))) or code
    except Exception as error:
        refused = report(error)
        return code or refused
