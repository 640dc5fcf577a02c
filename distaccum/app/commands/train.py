"""Implements `distaccum train`."""

from __future__ import annotations

import json
from pathlib import Path

from distaccum.app.build import Training, build, ranks
from distaccum.app.config import typed
from distaccum.app.preemption import Preemption
from distaccum.app.task import message
from distaccum.errors import RecordError
from distaccum.launch import Job, write_result
from distaccum.launch.job import write_whole
from distaccum.launch.overrides import to_paste
from distaccum.metrics import Report

# This file marks a run folder whose run was stopped and can be resumed. Launchers only check
# whether it exists.
PREEMPTED = "PREEMPTED"


def train(job: Job) -> None:
    """Train on this rank as the job specifies.

    Call it on every rank of the job.

    Raises:
        ConfigError: on all ranks, for mistakes that only show with the data and the ranks.
        RecordError: on rank 0, if the result or the mark of a stopped run could not be written.
    """
    config = typed(job.config)
    if config.logger.group is None:
        config.logger.group = job.sweep
    with (
        Preemption(config.train.max_minutes, announce=job.rank == 0) as preemption,
        ranks(config, job) as world,
    ):
        training = build(config, job, world, preemption)
        trainer, report = training.trainer, training.report
        if report is not None:
            (job.run_dir / PREEMPTED).unlink(missing_ok=True)
        try:
            stopped = trainer.run()
        except BaseException as error:
            if report is not None:
                reason = f"{type(error).__name__}: {error}"
                report.end(reason, {"step": trainer.progress.step}, 1, training.baseline)
            raise
        if report is not None and stopped is not None:
            _end_stopped(job.run_dir, training, report, stopped)
        elif report is not None:
            _end(job.run_dir, training, report, config.checkpoint.goes_on)


def _end(run_dir: Path, training: Training, report: Report, goes_on: bool) -> None:
    trainer, baseline = training.trainer, training.baseline
    means = trainer.progress.validation
    report.note(message(training.task, means, baseline, training.evaluated))
    validation = {f"validation_{name}": value for name, value in means.items()}
    not_written = [] if trainer.saver is None else list(trainer.saver.failed)
    code = 0
    try:
        write_result(run_dir, {**validation, **trainer.totals()})
    except OSError as error:
        not_written.append(f"result.json ({error.strerror})")
        code = 0 if goes_on else 1
    unit = f"nats per {training.task.unit}"
    report.end(f"all {trainer.progress} done", validation, code, baseline, unit, not_written)
    if code:
        raise RecordError(
            f"The training finished ({trainer.progress}), but {run_dir}/{not_written[-1]} could "
            "not be written. Its numbers are printed above."
        )


def _end_stopped(run_dir: Path, training: Training, report: Report, reason: str) -> None:
    step, baseline = training.trainer.progress.step, training.baseline
    if training.trainer.saver is None:
        text = f"Stopped by {reason} after step {step}; no checkpoint saved (checkpoint.keep=0)."
    else:
        again = to_paste("run_dir", str(run_dir))
        text = (
            f"Stopped by {reason} after step {step}; checkpoint saved. To resume, run again with "
            f"{again}"
        )
        try:
            write_whole(run_dir / PREEMPTED, json.dumps({"step": step, "reason": reason}) + "\n")
        except OSError as error:
            report.end(
                text, {"step": step}, 1, baseline, not_written=[f"{PREEMPTED} ({error.strerror})"]
            )
            raise RecordError(
                f"{run_dir / PREEMPTED} could not be written ({error.strerror}). {text}"
            ) from None
    report.end(text, {"step": step}, 0, baseline)
