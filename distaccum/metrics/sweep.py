"""Reports the results of a sweep as a table, and as `sweep.csv` and `sweep.png` in its folder."""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

from distaccum.errors import in_one_line
from distaccum.metrics.console import Console
from distaccum.metrics.picture import open_picture, save_picture
from distaccum.metrics.table import table

LOSS, RATE = "validation_loss", "samples_per_s"  # names in the results of a job
LOSS_COLOR, RATE_COLOR, FAILED_COLOR = "#1f5fa8", "#b3541e", "#c02020"
# From this ratio of the largest to the smallest value on, an axis is logarithmic.
LOG_SPAN = 20.0


@dataclass(frozen=True)
class JobOutcome:
    """Describes what became of one job of a sweep."""

    number: int
    overrides: tuple[str, ...]  # "key=value": what was swept, and what all jobs have in common
    run_dir: Path
    status: Literal["done", "failed", "interrupted"]
    exit_code: int
    error: str | None  # one line: the error of the first rank that failed
    result: Mapping[str, float | int | str | None]  # final numbers; empty without a result

    @property
    def values(self) -> dict[str, str]:
        """Return the overrides by key; a deleted key (`~key`) has the value "deleted"."""
        written = {}
        for override in self.overrides:
            key, equals, value = override.partition("=")
            written[key.lstrip("+~")] = value if equals and not key.startswith("~") else "deleted"
        return written

    def finite(self, name: str) -> float | None:
        """Return a number of the result, or None if it is missing or not finite."""
        value = self.result.get(name)
        return float(value) if isinstance(value, int | float) and math.isfinite(value) else None

    def figure(self, name: str, form: str) -> str:
        """Format a number of the result; a missing one becomes "-"."""
        value = self.result.get(name)
        return format(value, form) if isinstance(value, int | float) else "-"

    @property
    def loss(self) -> float | None:
        """Return the validation loss, or None if it is not finite or the job was not completed."""
        return self.finite(LOSS) if self.status == "done" else None


@dataclass(frozen=True)
class Sweep:
    """Describes a sweep that has ended. Jobs that were not started are not in it."""

    folder: Path  # absolute
    jobs: tuple[JobOutcome, ...]  # at least one, in the order in which they ran


def report_sweep(sweep: Sweep, stream: TextIO | None = None) -> None:
    """Print a table of the jobs, and write `sweep.csv` and `sweep.png` beside the jobs' folders.

    Call it on one rank only. The table is printed first, because the files may fail. A failure is
    reported in one line. There is no plot if no successful job has a validation loss.

    Args:
        sweep: the sweep that has ended.
        stream: where to print; None: standard output.
    """
    console = Console(stream)
    console.line(described(sweep.jobs))
    try:
        write_csv(sweep.folder / "sweep.csv", sweep.jobs)
    except OSError as error:
        console.line(
            f"sweep.csv was not written ({error.strerror}); the table above has its numbers"
        )
    try:
        if any(job.loss is not None for job in sweep.jobs):
            draw_sweep(sweep.folder / "sweep.png", sweep.jobs)
    except Exception as error:
        console.line(
            f"sweep.png was not drawn ({in_one_line(error)}); the numbers are in sweep.csv"
        )
    console.line(f"sweep folder: {sweep.folder}")


def described(jobs: Sequence[JobOutcome]) -> str:
    """Return a table with one line per job, between a line of counts and a line for the best job.

    The columns are the number of the job, the keys that differ between jobs, validation loss,
    samples/s, and the status with the first error.
    """
    keys = swept_keys(jobs)
    figures = {LOSS: ("validation loss", ".4f"), RATE: ("samples/s", ".1f")}
    shown = [name for name in figures if any(name in job.result for job in jobs)]
    columns = ["job", *keys, *(figures[name][0] for name in shown), "status"]
    rows = []
    for job in jobs:
        values = [_short(job.values.get(key, "-")) for key in keys]
        numbers = [job.figure(name, figures[name][1]) for name in shown]
        status = job.status if job.error is None else f"{job.status}: {job.error}"
        rows.append([str(job.number), *values, *numbers, status])
    statuses = Counter(job.status for job in jobs)
    counts = ", ".join(f"{count} {status}" for status, count in statuses.items())
    lines = [
        f"sweep: {len(jobs)} {'job' if len(jobs) == 1 else 'jobs'}, {counts}",
        table(columns, rows, texts=len(columns)),
    ]
    losses = {job.number: job.loss for job in jobs if job.loss is not None}
    if losses:
        best = min(losses, key=losses.__getitem__)
        lines.append(f"lowest validation loss: {losses[best]:.4f}, job {best}")
    return "\n".join(lines)


def write_csv(path: Path, jobs: Sequence[JobOutcome]) -> None:
    """Write one row per job with its number, all overridden keys, how it ended and all results."""
    keys = list(dict.fromkeys(key for job in jobs for key in job.values))
    names = list(dict.fromkeys([LOSS, RATE, *(name for job in jobs for name in job.result)]))
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["job", *keys, "status", "exit_code", *names, "error", "run_dir"])
        for job in jobs:
            values, results = map(job.values.get, keys), map(job.result.get, names)
            writer.writerow(
                [job.number, *values, job.status, job.exit_code, *results, job.error, job.run_dir]
            )


def swept_keys(jobs: Sequence[JobOutcome]) -> list[str]:
    """Return the keys whose values differ between jobs, in the order in which they were given."""
    keys = dict.fromkeys(key for job in jobs for key in job.values)
    return [key for key in keys if len({job.values.get(key) for job in jobs}) > 1]


def draw_sweep(out: Path, jobs: Sequence[JobOutcome]) -> None:
    """Draw a column of two panels for each swept key: validation loss above, samples/s below.

    Each job is one mark. Numbers are on a numeric axis, which is logarithmic if they span a factor
    of LOG_SPAN. Other values are side by side in the order in which they first occur. A job without
    a loss, usually because it failed, is a red cross at the lower edge. If no key differs, the jobs
    are drawn in their order.

    Args:
        out: the PNG to write. An existing file is replaced.
        jobs: the jobs of the sweep.
    """
    columns = {key: [job.values.get(key, "-") for job in jobs] for key in swept_keys(jobs)}
    columns = columns or {"job": [str(job.number) for job in jobs]}
    losses, rates = [job.loss for job in jobs], [job.finite(RATE) for job in jobs]
    figure = open_picture(max(6.0, 4.2 * len(columns)), 6.5)
    panels = figure.subplots(
        2, len(columns), sharex="col", sharey="row", squeeze=False, height_ratios=(2, 1)
    )
    for (above, below), (key, texts) in zip(panels.T, columns.items(), strict=True):
        places, are_numbers = _places(texts, below)
        # With several keys, neighbors on one axis differ in the other keys too and are not joined.
        line = "-" if are_numbers and len(columns) == 1 else ""
        _draw(above, places, losses, color=LOSS_COLOR, linestyle=line)
        _draw(below, places, rates, color=RATE_COLOR, linestyle=line)
        failed = [place for place, loss in zip(places, losses, strict=True) if loss is None]
        # Heights are shares of the panel, because these jobs have no loss.
        x_of_data = above.get_xaxis_transform()
        above.plot(
            failed, [0.03] * len(failed), "x", color=FAILED_COLOR, markersize=9, transform=x_of_data
        )
        below.set_xlabel(key, fontsize=12)
    panels[0][0].set_ylabel("validation loss", fontsize=12)
    panels[0][0].margins(y=0.12)  # room for the crosses below the lowest loss
    panels[1][0].set_ylabel("samples/s", fontsize=12)
    panels[1][0].set_ylim(bottom=0)
    if None in losses:
        figure.legend(
            [panels[0][0].lines[1]],
            ["no validation loss"],
            loc="outside upper right",
            frameon=False,
        )
    save_picture(figure, out)


def _draw(axis: Any, places: Sequence[float], values: Sequence[float | None], **style: Any) -> None:
    points = sorted(
        (place, value) for place, value in zip(places, values, strict=True) if value is not None
    )
    axis.plot([place for place, _ in points], [value for _, value in points], marker="o", **style)


def _places(texts: Sequence[str], axis: Any) -> tuple[list[float], bool]:
    """Prepare the x axis of a column, and return the x of each value and whether x is numeric."""
    try:
        numbers = [float(text) for text in texts]
    except ValueError:
        numbers = [math.nan]
    if all(math.isfinite(number) for number in numbers):
        if min(numbers) > 0 and max(numbers) / min(numbers) >= LOG_SPAN:
            axis.set_xscale("log")
        elif len(set(numbers)) <= 8:
            axis.set_xticks(sorted(set(numbers)))
        return numbers, True
    names = list(dict.fromkeys(texts))
    axis.set_xticks(
        range(len(names)), [name if len(name) <= 24 else f"{name[:21]}..." for name in names]
    )
    axis.margins(x=0.15)
    return [float(names.index(text)) for text in texts], False


def _short(text: str) -> str:
    """Shorten a long number to five significant digits; sweep.csv has all digits."""
    try:
        return text if len(text) <= 10 else f"{float(text):.5g}"
    except ValueError:
        return text
