"""A small table in plain text."""

from __future__ import annotations

from collections.abc import Sequence

Cell = str | int | float | None


def table(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """Lines of equal columns, two spaces apart, under a header and a rule.

    The first column is words, to the left; the others are numbers, to the right. An int is written with its thousands
    apart, a float with three digits, None as "-"; a text (`human.size(num_bytes)`) as it is.

    Args:
        columns: the headers, units included.
        rows: each as long as `columns`.
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
