"""A small plot in plain ASCII, which survives any log file."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Mapping, Sequence

Points = Sequence[tuple[float, float]]


def plot(series: Mapping[str, Points], x_label: str, until: float, *, width: int = 80, height: int = 7) -> str:
    """One panel for each series, one above the other over the same x axis.

    A value holds until the next point: a schedule is a function of the step, and its jumps are drawn as jumps. A column
    shows all values that occur in its part of the axis: "*" where there is one, "|" where the curve only passes from
    one to another.

    Args:
        series: points (x, y) by what y is, with its unit: the title of the panel. x must increase, y be finite.
        x_label: what x is, with its unit.
        until: where the last value of each series ends, above all x.
        width: columns of the text in all.
        height: lines of a panel whose values differ. One value takes one line.

    Raises:
        ValueError: for no points, points out of order, or too little room.
    """
    for name, points in series.items():
        xs = [x for x, _ in points]
        if not xs or any(a >= b for a, b in zip(xs, [*xs[1:], until], strict=True)):
            raise ValueError(f"{name!r}: the plot needs points whose x increase and stay below until={until}")
    labels = [_number(edge(y for _, y in points)) for points in series.values() for edge in (min, max)]
    margin = max(map(len, labels)) + 2
    columns = width - margin
    if columns < 10 or height < 2:
        raise ValueError(f"no room to plot: {width} columns, of which the labels take {margin}, and {height} lines")
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
    """The lines of one panel, the highest values first."""
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
            grid[previous][column] = " "  # it was drawn a column before
        for row in hit:
            grid[row][column] = "*"
        previous = hit[-1]
    labels = {rows - 1: _number(high), 0: _number(low)}
    return [f"{labels.get(row, ''):>{margin - 2}} |{''.join(grid[row])}" for row in reversed(range(rows))]


def _columns(points: Points, edges: Sequence[float]) -> list[list[float]]:
    """The values that occur between each two edges, in their order; none before the first point."""
    xs = [x for x, _ in points]
    columns = []
    for left, right in itertools.pairwise(edges):
        held = bisect.bisect_right(xs, left) - 1  # the point whose value holds at the left edge
        stop = bisect.bisect_left(xs, right)
        columns.append([y for _, y in points[max(held, 0) : stop]])
    return columns


def _number(value: float) -> str:
    if value == int(value) and abs(value) < 1e7:
        return f"{int(value):,}"
    return f"{value:.3g}"
