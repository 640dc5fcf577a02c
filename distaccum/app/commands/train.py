"""`distaccum train`."""

from __future__ import annotations

import json
import os
from pathlib import Path

from distaccum.app.build import Training, build, ranks
from distaccum.app.config import typed
from distaccum.app.preemption import Preemption
from distaccum.app.task import told
from distaccum.errors import RecordError
from distaccum.launch import Job
from distaccum.launch.overrides import to_paste
from distaccum.launch.result import write_result

# In the run folder of a run that was stopped and can go on; whoever starts it again reads no more than its presence.
PREEMPTED = "PREEMPTED"


def train(job: Job) -> None:
    """Train on this rank as the job says. Every rank of the job runs this.

    Raises:
        ConfigError: on all ranks alike, for what only shows with the data and the ranks at hand.
    """
    config = typed(job.config)
    if config.logger.group is None:
        config.logger.group = job.sweep
    with Preemption(config.train.max_minutes, tell=job.rank == 0) as preemption, ranks(config, job) as world:
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
            _end_stopped(job.run_dir, training, stopped)
        elif report is not None:
            _end(job.run_dir, training, config.checkpoint.goes_on)


def _end(run_dir: Path, training: Training, goes_on: bool) -> None:
    trainer, report, baseline = training.trainer, training.report, training.baseline
    assert report is not None
    means = trainer.progress.heldout
    report.note(told(training.problem, means, baseline, training.evaluated))
    heldout = {f"heldout_{name}": value for name, value in means.items()}
    unit = f"nats per {training.problem.unit}"
    not_written = [] if trainer.saver is None else list(trainer.saver.failed)
    trouble = None
    try:
        write_result(run_dir, {**heldout, **trainer.totals()})
    except OSError as error:
        trouble = f"result.json ({error.strerror})"
        not_written.append(trouble)
    code = 0 if trouble is None or goes_on else 1
    report.end(f"all {trainer.progress} done", heldout, code, baseline, unit, not_written)
    if code:
        raise RecordError(
            f"The training finished ({trainer.progress}), but {run_dir}/{trouble} could not be written. Its numbers "
            "are printed above."
        )


def _end_stopped(run_dir: Path, training: Training, reason: str) -> None:
    trainer, report = training.trainer, training.report
    assert report is not None
    step = trainer.progress.step
    if trainer.saver is None:
        told = f"stopped by {reason} after step {step}; nothing was saved (checkpoint.keep=0)"
    else:
        again = to_paste("run_dir", str(run_dir))
        told = f"stopped by {reason} after step {step} and saved; start it again with {again} to go on"
        draft = run_dir / f"{PREEMPTED}.draft"
        try:
            draft.write_text(json.dumps({"step": step, "reason": reason}) + "\n")
            os.replace(draft, run_dir / PREEMPTED)
        except OSError as error:
            report.end(told, {"step": step}, 1, training.baseline, not_written=[f"{PREEMPTED} ({error.strerror})"])
            raise RecordError(f"{told}; {run_dir / PREEMPTED} could not be written ({error.strerror}).") from None
    report.end(told, {"step": step}, 0, training.baseline)
