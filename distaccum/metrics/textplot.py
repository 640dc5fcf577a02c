"""Draws step functions in plain ASCII, which every log file can hold."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Mapping, Sequence

Points = Sequence[tuple[float, float]]


def plot(series: Mapping[str, Points], x_label: str, until: float, *, width: int = 80, height: int = 7) -> str:
    """Draw each series in a panel of its own, one above the other over a shared x axis.

    A value holds until the next point, so that the jumps of a schedule are drawn as jumps. Each
    column shows all values that occur in its part of the axis: "*" for a value, and "|" where the
    curve only passes from one value to another.

    Args:
        series: points (x, y) by the title of the panel, which names y and its unit. x must
            increase, and y must be finite.
        x_label: name and unit of x.
        until: the x where the last value of each series ends, larger than all x.
        width: columns of the whole text.
        height: lines of a panel whose values differ. A constant takes one line.

    Returns:
        The lines of the plot, joined by newlines.

    Raises:
        ValueError: a series has no points or points out of order, or there is too little room.
    """
    for name, points in series.items():
        xs = [x for x, _ in points]
        if not xs or any(a >= b for a, b in zip(xs, [*xs[1:], until], strict=True)):
            raise ValueError(
                f"{name!r} cannot be plotted: it needs points whose x increase and stay below until={until}, "
                f"got {len(xs)} point(s) with x = {xs[:10]}."
            )
    labels = [_number(edge(y for _, y in points)) for points in series.values() for edge in (min, max)]
    margin = max(map(len, labels)) + 2
    columns = width - margin
    if columns < 10 or height < 2:
        raise ValueError(
            f"There is no room to plot in {width} columns, of which the labels take {margin}, and {height} lines. "
            f"Give at least {margin + 10} columns (width) and 2 lines (height)."
        )
    start = min(points[0][0] for points in series.values())
    edges = [start + (until - start) * i / columns for i in range(columns + 1)]
    lines = []
    for name, points in series.items():
        lines += [name, *_panel(points, edges, margin, height)]
    lines.append("+".rjust(margin) + "-" * columns)
    first, last = _number(start), f"{_number(until)} {x_label}"
    lines.append(" " * margin + first + last.rjust(columns - len(first)))
    return "\n".join(line.rstrip() for line in lines)


def _panel(points: Points, edges: Sequence[float], margin: int, height: int) -> list[str]:
    """Return the lines of one panel, the highest values first."""
    low, high = min(y for _, y in points), max(y for _, y in points)
    rows = height if high > low else 1
    grid = [[" "] * (len(edges) - 1) for _ in range(rows)]
    previous: int | None = None
    for column, values in enumerate(_columns(points, edges)):
        hit = [round((y - low) / (high - low) * (rows - 1)) if high > low else 0 for y in values]
        if not hit:
            continue
        passed = hit if previous is None else [*hit, previous]
        for row in range(min(passed), max(passed) + 1):
            grid[row][column] = "|"
        if previous is not None and previous not in hit:
            grid[previous][column] = " "  # already drawn in the previous column
        for row in hit:
            grid[row][column] = "*"
        previous = hit[-1]
    labels = {rows - 1: _number(high), 0: _number(low)}
    return [f"{labels.get(row, ''):>{margin - 2}} |{''.join(grid[row])}" for row in reversed(range(rows))]


def _columns(points: Points, edges: Sequence[float]) -> list[list[float]]:
    """Return, for each column between two edges, the values that occur in it, in their order."""
    xs = [x for x, _ in points]
    columns = []
    for left, right in itertools.pairwise(edges):
        held = bisect.bisect_right(xs, left) - 1  # index of the point whose value holds at the left edge
        stop = bisect.bisect_left(xs, right)
        columns.append([y for _, y in points[max(held, 0) : stop]])
    return columns


def _number(value: float) -> str:
    if value == int(value) and abs(value) < 1e7:
        return f"{int(value):,}"
    return f"{value:.3g}"
