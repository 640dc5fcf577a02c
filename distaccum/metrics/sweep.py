"""Reports the results of a sweep as a table, and as `sweep.csv` and `sweep.png` in its folder."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, TextIO

from distaccum.metrics.console import Console
from distaccum.metrics.sweep_picture import draw_sweep

LOSS, RATE = "validation_loss", "samples_per_s"  # names in the results of a job


class JobLike(Protocol):
    """Describes one job of a sweep that has ended."""

    @property
    def number(self) -> int:
        """Return the number of the job within the sweep."""

    @property
    def overrides(self) -> Sequence[str]:
        """Return the overrides of the job, such as "optim.lr=0.001"."""

    @property
    def run_dir(self) -> Path:
        """Return the run folder of the job."""

    @property
    def status(self) -> str:
        """Return "done", or a word for what went wrong, such as "failed" or "interrupted"."""

    @property
    def exit_code(self) -> int:
        """Return the exit code of the job."""

    @property
    def error(self) -> str | None:
        """Return the first error of the job in one line, or None."""

    @property
    def result(self) -> Mapping[str, float | int | str | None]:
        """Return the final numbers: `validation_loss` (lower is better), `samples_per_s`, etc."""


class SweepLike(Protocol):
    """Describes a sweep that has ended."""

    @property
    def folder(self) -> Path:
        """Return the folder of the sweep, which receives the files."""

    @property
    def jobs(self) -> Sequence[JobLike]:
        """Return the jobs, at least one, in the order in which they ran."""


def report_sweep(sweep: SweepLike, stream: TextIO | None = None) -> None:
    """Print a table of the jobs, and write `sweep.csv` and `sweep.png` beside the jobs' folders.

    Call it on one rank only. The table is printed first, because the files may fail. A failure is
    reported in one line. There is no plot if no successful job has a validation loss.

    Args:
        sweep: the sweep that has ended.
        stream: where to print; None: standard output.
    """
    console = Console(stream)
    console.line(table(sweep.jobs))
    try:
        write_csv(sweep.folder / "sweep.csv", sweep.jobs)
    except OSError as error:
        console.line(f"sweep.csv was not written ({error.strerror}); the table above has its numbers")
    losses = [_finite(job, LOSS) if job.status == "done" else None for job in sweep.jobs]
    rates = [_finite(job, RATE) for job in sweep.jobs]
    try:
        if losses.count(None) < len(losses):
            written = [overrides_of(job) for job in sweep.jobs]
            draw_sweep(sweep.folder / "sweep.png", written, losses, rates, swept_keys(sweep.jobs))
    except Exception as error:
        console.line(f"sweep.png was not drawn ({type(error).__name__}: {error}); the numbers are in sweep.csv")
    console.line(f"sweep folder: {sweep.folder}")


def table(jobs: Sequence[JobLike]) -> str:
    """Return a table with one line per job, between a line of counts and a line for the best job.

    The columns are the number of the job, the keys that differ between jobs, validation loss,
    samples/s, and the status with the first error.
    """
    keys = swept_keys(jobs)
    figures = {LOSS: ("validation loss", ".4f"), RATE: ("samples/s", ".1f")}
    figures = {name: figure for name, figure in figures.items() if any(name in job.result for job in jobs)}
    rows = [["job", *keys, *(words for words, _ in figures.values()), "status"]]
    for job in jobs:
        written = overrides_of(job)
        values = [_short(written.get(key, "-")) for key in keys]
        rows.append(
            [str(job.number), *values, *(_number(job, name, form) for name, (_, form) in figures.items()), _status(job)]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    statuses = [job.status for job in jobs]
    counts = ", ".join(f"{statuses.count(status)} {status}" for status in dict.fromkeys(statuses))
    lines.insert(0, f"sweep: {len(jobs)} {'job' if len(jobs) == 1 else 'jobs'}, {counts}")
    losses = {job.number: loss for job in jobs if job.status == "done" and (loss := _finite(job, LOSS)) is not None}
    if losses:
        best = min(losses, key=losses.__getitem__)
        lines.append(f"lowest validation loss: {losses[best]:.4f}, job {best}")
    return "\n".join(lines)


def write_csv(path: Path, jobs: Sequence[JobLike]) -> None:
    """Write one row per job with its number, all overridden keys, how it ended and all results."""
    keys = list(dict.fromkeys(key for job in jobs for key in overrides_of(job)))
    names = list(dict.fromkeys([LOSS, RATE, *(name for job in jobs for name in job.result)]))
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["job", *keys, "status", "exit_code", *names, "error", "run_dir"])
        for job in jobs:
            written = overrides_of(job)
            values = [written.get(key) for key in keys]
            results = [job.result.get(name) for name in names]
            writer.writerow([job.number, *values, job.status, job.exit_code, *results, job.error, job.run_dir])


def overrides_of(job: JobLike) -> dict[str, str]:
    """Return the overrides of a job by key; a deleted key (`~key`) has the value "deleted"."""
    written = {}
    for override in job.overrides:
        key, equals, value = override.partition("=")
        written[key.lstrip("+~")] = value if equals and not key.startswith("~") else "deleted"
    return written


def swept_keys(jobs: Sequence[JobLike]) -> list[str]:
    """Return the keys whose values differ between jobs, in the order in which they were given."""
    written = [overrides_of(job) for job in jobs]
    keys = dict.fromkeys(key for values in written for key in values)
    return [key for key in keys if len({values.get(key) for values in written}) > 1]


def _short(text: str) -> str:
    """Shorten a long number to five significant digits; sweep.csv has all digits."""
    try:
        return text if len(text) <= 10 else f"{float(text):.5g}"
    except ValueError:
        return text


def _status(job: JobLike) -> str:
    if job.error is None:
        return job.status
    return f"{job.status}: {job.error}"


def _finite(job: JobLike, name: str) -> float | None:
    value = job.result.get(name)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _number(job: JobLike, name: str, form: str) -> str:
    value = job.result.get(name)
    return format(value, form) if isinstance(value, int | float) else "-"
