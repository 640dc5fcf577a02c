"""Draws step functions in plain ASCII, which every log file can hold."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Mapping, Sequence

from distaccum.metrics.format import text

Points = Sequence[tuple[float, float]]


def plot(
    series: Mapping[str, Points], x_label: str, until: float, *, width: int = 80, height: int = 7
) -> str:
    """Draw each series in a panel of its own, one above the other over a shared x axis.

    A value holds until the next point, so that the jumps of a schedule are drawn as jumps. Each
    column shows all values that occur in its part of the axis: "*" for a value, and "|" where the
    curve only passes from one value to another.

    Args:
        series: points (x, y) by the title of the panel, which names y and its unit. Every series
            begins at x = 0, and its x increase.
        x_label: name and unit of x.
        until: the x where the last value of each series ends, larger than all x.
        width: columns of the whole text.
        height: lines of a panel whose values differ. A constant takes one line.

    Returns:
        The lines of the plot, joined by newlines.
    """
    labels = [text(edge(y for _, y in points)) for points in series.values() for edge in (min, max)]
    margin = max(map(len, labels)) + 2
    columns = width - margin
    edges = [until * column / columns for column in range(columns + 1)]
    lines = []
    for name, points in series.items():
        lines += [name, *_panel(points, edges, margin, height)]
    lines.append("+".rjust(margin) + "-" * columns)
    lines.append(" " * margin + "0" + f"{text(until)} {x_label}".rjust(columns - 1))
    return "\n".join(line.rstrip() for line in lines)


def _panel(points: Points, edges: Sequence[float], margin: int, height: int) -> list[str]:
    """Return the lines of one panel, the highest values first."""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    low, high = min(ys), max(ys)
    top = height - 1 if high > low else 0
    rows = [round((y - low) / (high - low) * top) if top else 0 for y in ys]
    columns = []
    previous = rows[0]
    for left, right in itertools.pairwise(edges):
        first = bisect.bisect_right(xs, left) - 1  # its value holds at the left edge
        hit = rows[first : bisect.bisect_left(xs, right)]
        passed = range(min(previous, *hit) + 1, max(previous, *hit))
        drawn = dict.fromkeys(passed, "|") | dict.fromkeys(hit, "*")
        columns.append([drawn.get(row, " ") for row in range(top + 1)])
        previous = hit[-1]
    labels = {top: text(high), 0: text(low)}
    lines = [
        f"{labels.get(row, ''):>{margin - 2}} |{''.join(column[row] for column in columns)}"
        for row in range(top + 1)
    ]
    return lines[::-1]
