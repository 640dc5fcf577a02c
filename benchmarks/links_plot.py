"""Plots step time against link rate, from the results of benchmarks/links.py.

python benchmarks/links_plot.py FOUND.json OUT.png
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

from links_names import COMPUTE

# One hue for arms that communicate once per window, one for those that do so several times. The
# arms of distaccum have the full color.
COLORS = {
    "DDP naive": "#cc3311", "DDP no_sync": "#222222", "Accelerate": "#888888", "Fabric": "#aaaaaa",
    "ours DDP": "#1f5fa8", "FSDP2 each micro-batch": "#e08a5a", "FSDP2 last micro-batch": "#b3541e",
    "ours FSDP2 boundary": "#88bb66", "ours FSDP2 gather_once": "#228833",
}  # fmt: skip
OVERLAP_COLOR = "#4477aa"
SPACE = 0.047  # between two labels, as a share of the panel's height


def median_s(samples: list[dict[str, list[float]]]) -> float:
    """Return the median over rounds of the slowest rank's seconds."""
    return statistics.median(max(sample["seconds"]) for sample in samples)


def bound_s(found: dict[str, Any], name: str) -> float:
    """Return the lower bound of an arm's step time at a rate: max(compute, bytes / rate)."""
    sent = statistics.median(max(sample["bytes"]) for sample in found["samples"][name])
    return max(median_s(found["samples"][COMPUTE]), sent / found["bytes_per_s"])


def draw(found: dict[str, Any], out: Path) -> None:
    """Draw a panel per number of hosts, with a line per arm and its bound as a dashed line."""
    # Not pyplot, because it keeps a global list of figures and may need a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    worlds = found["worlds"]
    figure = Figure(figsize=(8.5 * len(worlds), 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(worlds), sharey=True, squeeze=False)[0]
    for axis, (number, world) in zip(panels, worlds.items(), strict=True):
        _panel(axis, world["rates"])
        axis.set_title(f"{number} hosts", fontsize=13)
        axis.set_xlabel("rate of the link, payload in Mbit/s", fontsize=12)
        axis.grid(True, color="#dddddd", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=11)
    settings = found["settings"]
    what = f"{found['parameters'] / 1e6:.1f}M parameters, K = {settings['num_micro_batches']}"
    panels[0].set_ylabel(f"seconds per optimizer step ({what})", fontsize=12)
    figure.supxlabel("dashed: max(compute, bytes sent / rate)", fontsize=11, color="#555555")
    figure.savefig(out, dpi=150)


def _panel(axis: Any, rates: dict[str, Any]) -> None:
    axis.set_xscale("log")
    axis.set_yscale("log")
    columns = sorted(rates.values(), key=lambda one: one["bytes_per_s"])
    xs = [one["bytes_per_s"] * 8e-6 for one in columns]
    ends: dict[str, float] = {}
    for name in columns[0]["samples"]:
        if name == COMPUTE:
            continue
        color = COLORS.get(name, OVERLAP_COLOR)
        style = {"linewidth": 2.2 if name.startswith("ours") else 1.4}
        seconds = [median_s(one["samples"][name]) for one in columns]
        axis.plot(xs, seconds, color=color, marker="o", markersize=4, **style)
        axis.plot(
            xs,
            [bound_s(one, name) for one in columns],
            color=color,
            linestyle="--",
            linewidth=0.9,
            alpha=0.6,
        )
        ends[name] = seconds[0]
    axis.set_xticks(
        xs,
        [
            f"{x:,.0f}" + ("\n(no limit)" if one is rates.get("unlimited") else "")
            for x, one in zip(xs, columns, strict=True)
        ],
    )
    axis.minorticks_off()
    low, high = axis.get_ylim()
    ticks = [m * 10.0**e for e in range(-3, 3) for m in (1, 2, 5) if low <= m * 10.0**e <= high]
    axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_ylim(low, high)
    span = math.log(xs[-1] / xs[0]) if len(xs) > 1 else 1.0
    axis.set_xlim(xs[0] * math.exp(-0.62 * span), xs[-1] * math.exp(0.05 * span))
    # Labels are left of the lines at the slowest rate, where the lines are farthest apart.
    heights = {name: math.log(y / low) / math.log(high / low) for name, y in ends.items()}
    for name, place in _apart(heights).items():
        color = COLORS.get(name, OVERLAP_COLOR)
        leader = {
            "arrowstyle": "-",
            "color": color,
            "linewidth": 0.6,
            "shrinkB": 3,
            "relpos": (1, 0.5),
        }
        axis.annotate(
            name, (xs[0], ends[name]), (0.30, place), textcoords=axis.transAxes, ha="right",
            va="center", fontsize=10, color=color, arrowprops=leader,
        )  # fmt: skip


def _apart(heights: dict[str, float]) -> dict[str, float]:
    """Return places from 0 to 1 near the heights, in their order and at least SPACE apart."""
    order = sorted(heights, key=lambda name: heights[name])
    places: list[float] = []
    for i, name in enumerate(order):
        room_above = 1 - SPACE * (len(order) - i)
        lowest = places[-1] + SPACE if places else 0.02
        places.append(max(lowest, min(heights[name], room_above)))
    return dict(zip(order, places, strict=True))


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
