"""Draws `curve.png` from `metrics.jsonl`: training loss, validation loss and learning rate."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distaccum.metrics.picture import open_picture, save_picture
from distaccum.metrics.run_log import read_metrics, standing

Points = list[tuple[int, float]]  # (step, value) with ascending steps and finite values

TRAIN, VALIDATION, BASELINE, RATE = "#4477aa", "#cc3311", "#555555", "#228833"
# From this number of training points on, the losses of single steps look like noise, and a running
# median is drawn on top of them.
MIN_POINTS_FOR_MEDIAN = 60


def draw_curve(
    metrics_path: Path, out: Path, baseline: float | None = None, unit: str = "nats per token"
) -> bool:
    """Draw the losses and the learning rate of a run into a PNG of about 1350 x 1050 pixels.

    The loss and the learning rate are read from records of the kind "step", and the validation loss
    from the kind "validation". If a resumed run repeated a step, the newer record counts. Values
    that are null or not finite are left out.

    Args:
        metrics_path: a `metrics.jsonl`. The run may have been killed, and the file may be missing.
        out: the PNG to write. An existing file is replaced.
        baseline: a loss in the same unit, drawn as a dashed line; None: no line.
        unit: the unit of the losses, for the axis label.

    Returns:
        True if the PNG was written; False, without writing a file, if there is no loss to draw.
    """
    records = standing(read_metrics(metrics_path)) if metrics_path.exists() else []
    train = _points(records, "step", "loss")
    validation = _points(records, "validation", "loss")
    if not train and not validation:
        return False
    figure = open_picture(9, 7)
    loss_axis, rate_axis = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    _draw_losses(loss_axis, train, validation, baseline)
    loss_axis.set_ylabel(f"loss ({unit})", fontsize=13)
    _draw_rates(rate_axis, _points(records, "step", "lr"))
    # The legend is above the axes, where it cannot hide a curve.
    figure.legend(fontsize=12, loc="outside upper center", ncols=2, frameon=False)
    save_picture(figure, out)
    return True


def _points(records: Sequence[dict[str, object]], kind: str, field: str) -> Points:
    newest: dict[int, float] = {}
    for record in records:
        step, value = record.get("step"), record.get(field)
        # A skipped window has the number of the previous step.
        if record["kind"] == kind and not record.get("skipped") and isinstance(value, (int, float)):
            assert isinstance(step, int), record
            newest[step] = value
    return sorted((step, value) for step, value in newest.items() if math.isfinite(value))


def _plot(axis: Any, points: Points, **style: Any) -> None:
    if len(points) == 1:
        style["marker"] = "o"  # a line through a single point is invisible
    axis.plot([step for step, _ in points], [value for _, value in points], **style)


def _draw_losses(axis: Any, train: Points, validation: Points, baseline: float | None) -> None:
    losses, marks = [value for _, value in train], [value for _, value in validation]
    if len(train) >= MIN_POINTS_FOR_MEDIAN:
        window = len(train) // 25 | 1
        _plot(axis, train, color=TRAIN, linewidth=1.2, alpha=0.35, label="training loss, each step")
        smooth = _running_median(train, window)
        _plot(
            axis,
            smooth,
            color=TRAIN,
            linewidth=2.2,
            label=f"training loss, median of {window} steps",
        )
    elif train:
        _plot(axis, train, color=TRAIN, linewidth=1.6, label="training loss")
    if validation:
        label = f"validation loss (last {marks[-1]:.3f})"
        _plot(
            axis, validation, color=VALIDATION, linewidth=1.8, marker="o", markersize=6, label=label
        )
    if baseline is not None:
        marks.append(baseline)
        label = f"baseline by frequency alone ({baseline:.3f})"
        axis.axhline(baseline, color=BASELINE, linestyle="--", linewidth=1.6, label=label)
    low, high, num_above = loss_limits(losses, marks)
    axis.set_ylim(low, high)
    if num_above:
        text = f"{num_above} training losses are above the plotted range"
        axis.set_title(text, fontsize=11, loc="right", color="#555555")


def _draw_rates(axis: Any, rates: Points) -> None:
    _plot(axis, rates, color=RATE, linewidth=2)
    axis.set_ylim(bottom=0)
    axis.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    axis.set_ylabel("learning rate", fontsize=13)
    axis.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axis.set_xlabel("step (optimizer updates)", fontsize=13)


def loss_limits(train: Sequence[float], marks: Sequence[float]) -> tuple[float, float, int]:
    """Return the y range of the loss plot and the number of training losses above it.

    The range covers all values except spikes, which would flatten the rest of the curve. A spike is
    a training loss that is more than twice as far above the lowest value as 98 % of the training
    losses and all marks are.

    Args:
        train: training losses.
        marks: values that are always visible: validation losses and the baseline.

    Returns:
        The lower limit, the upper limit, and the number of training losses above the upper limit.
    """
    values = [*train, *marks]
    low = min(values)
    usual = max([*marks, *sorted(train)[: math.ceil(0.98 * len(train))]])
    high = max(value for value in values if value - low <= 2 * (usual - low))
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin, sum(value > high + margin for value in train)


def _running_median(points: Points, window: int) -> Points:
    """Return the running median over `window` (odd) points, centered on each point.

    Near both ends the window shrinks, so that it stays centered. A mean of the last points would
    lag behind a falling loss and look worse than the validation loss, and one spike would move a
    mean for a whole window. At most about 500 points are returned: more cannot be seen in the plot,
    and a run of a million steps would take minutes to sort.
    """
    values = [value for _, value in points]
    smooth = []
    for index in sorted({*range(0, len(points), max(1, len(points) // 500)), len(points) - 1}):
        reach = min(window // 2, index, len(points) - 1 - index)
        smooth.append(
            (points[index][0], statistics.median(values[index - reach : index + reach + 1]))
        )
    return smooth
