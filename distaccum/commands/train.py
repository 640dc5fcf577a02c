"""`distaccum train`."""

from __future__ import annotations

from distaccum.build import build, ranks
from distaccum.config import typed
from distaccum.launch import Job
from distaccum.launch.result import write_result
from distaccum.problem import told


def train(job: Job) -> None:
    """Train on this rank as the job says. Every rank of the job runs this.

    Raises:
        ConfigError: on all ranks alike, for what only shows with the data and the ranks at hand.
    """
    config = typed(job.config)
    if config.logger.group is None:
        config.logger.group = job.sweep
    with ranks(config, job) as world:
        training = build(config, world, job.run_dir)
        trainer, report, baseline = training.trainer, training.report, training.baseline
        try:
            means = trainer.run()
        except BaseException as error:
            if report is not None:
                report.end(f"{type(error).__name__}: {error}", {"step": trainer.progress.step}, 1, baseline)
            raise
        if report is None:
            return
        report.note(told(training.problem, means, baseline, training.evaluated))
        heldout = {f"heldout_{name}": value for name, value in means.items()}
        report.end(
            f"all {trainer.rhythm.steps} steps done", heldout, 0, baseline, f"nats per {training.problem.unit}"
        )  # fmt: skip
        write_result(job.run_dir, {**heldout, **trainer.totals()})
