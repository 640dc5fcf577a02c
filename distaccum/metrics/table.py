"""Formats small tables as plain text."""

from __future__ import annotations

from collections.abc import Sequence

Cell = str | int | float | None


def table(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """Format a table with a header line, a rule and aligned columns that are two spaces apart.

    The first column is aligned left, the others are aligned right. An int is written with thousands
    separators, a float with three significant digits, None as "-", and a text is not changed.

    Args:
        columns: the headers, with units.
        rows: the cells of each row, as many as `columns` has headers.
    """
    lines = [list(columns), *([_text(cell) for cell in row] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _text(cell: Cell) -> str:
    if cell is None:
        return "-"
    if isinstance(cell, str):
        return cell
    return f"{cell:,}" if isinstance(cell, int) else f"{cell:.3g}"
