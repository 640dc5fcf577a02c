"""Formats small tables as plain text."""

from __future__ import annotations

from collections.abc import Sequence

from distaccum.metrics.format import Field, text


def table(columns: Sequence[str], rows: Sequence[Sequence[Field]], *, texts: int = 1) -> str:
    """Format a table with a header line, a rule and aligned columns that are two spaces apart.

    Args:
        columns: the headers, with units.
        rows: the cells of each row, as many as `columns` has headers; see `text`.
        texts: this many columns hold texts and are aligned left; the others are aligned right.
    """
    lines = [list(columns), *([text(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    aligned = ["<"] * texts + [">"] * (len(columns) - texts)
    form = "  ".join(f"{{:{side}{width}}}" for side, width in zip(aligned, widths, strict=True))
    return "\n".join(form.format(*line).rstrip() for line in lines)
