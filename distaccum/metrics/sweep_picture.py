"""Draws `sweep.png`: validation loss and samples/s against the swept keys."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LOSS_COLOR, RATE_COLOR, FAILED_COLOR = "#1f5fa8", "#b3541e", "#c02020"
# From this ratio of the largest to the smallest value on, the axis is logarithmic.
LOG_SPAN = 20.0


def draw_sweep(
    out: Path,
    overrides: Sequence[Mapping[str, str]],
    losses: Sequence[float | None],
    rates: Sequence[float | None],
    keys: Sequence[str],
) -> None:
    """Draw a column of two panels for each swept key: validation loss above, samples/s below.

    Each job is one mark. Numbers are on a numeric axis, which is logarithmic if they span a factor
    of LOG_SPAN. Other values are side by side in the order in which they first occur. A job without
    a loss, usually because it failed, is a red cross at the lower edge.

    Args:
        out: the PNG to write. An existing file is replaced.
        overrides: the values of each job by key.
        losses: the validation loss of each job (finite), or None if it failed or has none.
        rates: the samples/s of each job (finite), or None.
        keys: the keys to draw; if empty, the jobs are drawn in their order.
    """
    # Not pyplot, because it keeps a global list of figures and may need a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = {key: [values.get(key, "-") for values in overrides] for key in keys}
    columns = columns or {"job": [str(index) for index in range(len(overrides))]}
    figure = Figure(figsize=(max(6.0, 4.2 * len(columns)), 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, len(columns), sharex="col", sharey="row", squeeze=False, height_ratios=(2, 1))
    for column, (key, texts) in enumerate(columns.items()):
        places, are_numbers = _places(texts, panels[1][column])
        # With several keys, neighbors on one axis differ in the other keys too and are not joined.
        join = are_numbers and len(columns) == 1
        for axis, values, color in zip(panels[:, column], (losses, rates), (LOSS_COLOR, RATE_COLOR), strict=True):
            _draw(axis, places, values, color, join)
        _draw_missing(panels[0][column], [place for place, loss in zip(places, losses, strict=True) if loss is None])
        panels[1][column].set_xlabel(key, fontsize=12)
    panels[0][0].set_ylabel("validation loss", fontsize=12)
    panels[1][0].set_ylabel("samples/s", fontsize=12)
    panels[1][0].set_ylim(0, 1.1 * max((rate for rate in rates if rate is not None), default=0.0) or 1.0)
    panels[0][0].margins(y=0.12)  # room for the crosses below the lowest loss
    if None in losses:
        handles, labels = panels[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper right", fontsize=11, frameon=False)
    figure.align_ylabels()
    figure.savefig(out, dpi=150)


def _places(texts: Sequence[str], axis: Any) -> tuple[list[float], bool]:
    """Prepare the x axis of a column, and return the x of each value and whether x is numeric."""
    try:
        numbers = [float(text) for text in texts]
    except ValueError:
        numbers = []
    if numbers and all(math.isfinite(number) for number in numbers):
        if min(numbers) > 0 and max(numbers) / min(numbers) >= LOG_SPAN:
            axis.set_xscale("log")
        elif len(set(numbers)) <= 8:
            axis.set_xticks(sorted(set(numbers)))
        return numbers, True
    names = list(dict.fromkeys(texts))
    axis.set_xticks(range(len(names)), [name if len(name) <= 24 else f"{name[:21]}..." for name in names])
    axis.margins(x=0.15)
    return [float(names.index(text)) for text in texts], False


def _draw(axis: Any, places: Sequence[float], values: Sequence[float | None], color: str, join: bool) -> None:
    points = sorted((place, value) for place, value in zip(places, values, strict=True) if value is not None)
    xs, ys = [place for place, _ in points], [value for _, value in points]
    axis.plot(xs, ys, color=color, marker="o", markersize=6, linewidth=1.4 if join else 0.0)
    axis.grid(True, color="#dddddd", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=11)


def _draw_missing(axis: Any, places: Sequence[float]) -> None:
    heights = [0.03] * len(places)  # as a share of the panel's height, because these jobs have no loss
    axis.plot(
        places,
        heights,
        transform=axis.get_xaxis_transform(),
        color=FAILED_COLOR,
        marker="x",
        markersize=9,
        markeredgewidth=2.2,
        linewidth=0.0,
        label="no validation loss",
    )
