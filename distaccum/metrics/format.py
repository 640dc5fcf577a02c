"""Formats numbers for people: few digits and a unit."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

Field = float | int | str | None  # the value of a record's field, or of a cell in a table


def text(value: Field, digits: int = 3) -> str:
    """Format a value: whole numbers with thousands separators, others with this many digits.

    None becomes "-", and a text is not changed.
    """
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:.{digits}g}"


def count(number: float) -> str:
    """Format a count: 999 -> "999", 1234 -> "1.23K", 12345678 -> "12.3M", and then G, T and P."""
    value, unit = _reduced(number, 1000.0, ("", "K", "M", "G", "T", "P"), digits=0)
    return f"{value:.3g}{unit}"


def size(num_bytes: float) -> str:
    """Format bytes in powers of 1024: 512 -> "512 B", 4300000 -> "4.1 MiB"."""
    value, unit = _reduced(num_bytes, 1024.0, ("B", "KiB", "MiB", "GiB", "TiB", "PiB"), digits=1)
    return f"{value:.{0 if unit == 'B' else 1}f} {unit}"


def rate(per_second: float) -> str:
    """Format a rate per second: 12345.6 -> "12.3K/s", 0.5 -> "0.5/s"."""
    return count(per_second) + "/s"


def duration(seconds: float) -> str:
    """Format a time span: 0.25 -> "0.25s", 92 -> "1m 32s", 7500 -> "2h 05m", 100000 -> "1d 03h"."""
    if seconds < 9.995 or not math.isfinite(seconds):
        return f"{seconds:.2f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d {whole % 86400 // 3600:02d}h"


def step_texts(fields: Mapping[str, Field]) -> dict[str, str]:
    """Return the texts that a progress line shows for a step, by name and in display order.

    Args:
        fields: as in `Report.step`. Fields without a column in the progress line are left out.
    """
    texts = {}
    for name, word, write in _STEP_COLUMNS:
        value = fields.get(name)
        if isinstance(value, (int, float)):
            texts[word] = write(value)
        elif name in _ALWAYS_SHOWN:
            texts[word] = "-"
    if fields.get("skipped"):
        texts["skipped"] = str(fields["skipped"])
    return texts


def _reduced(value: float, base: float, units: tuple[str, ...], digits: int) -> tuple[float, str]:
    """Divide by `base` until the number, rounded as it will be printed, is below `base`.

    So 999999 becomes "1M" and not "1e+03K".
    """
    for unit in units[:-1]:
        if not math.isfinite(value) or abs(round(value, digits)) < base:
            return value, unit
        value /= base
    return value, units[-1]


# Name of a step's field, its word in the progress line, and the function that formats it. Other
# fields are recorded but not shown.
_STEP_COLUMNS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("epoch", "epoch", "{:.4g}".format),
    ("loss", "loss", "{:.4f}".format),
    ("grad_norm", "grad", "{:.3g}".format),
    ("lr", "lr", "{:.2e}".format),
    ("samples_per_s", "samples", rate),
    ("tokens_per_s", "tokens", rate),
    ("data_wait_share", "data", "{:.0%}".format),
    ("comm_share", "comm", "{:.0%}".format),
    ("peak_memory_bytes", "mem", size),
)
# Shown as "-" when the value is None, so that the columns of a skipped window stay aligned.
_ALWAYS_SHOWN = ("loss", "grad_norm")
