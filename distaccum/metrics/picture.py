"""Opens and saves the pictures of a run and of a sweep, which share one style."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def open_picture(width: float, height: float) -> Any:
    """Return an empty matplotlib figure of this size in inches."""
    # Not pyplot, because it keeps a global list of figures and may need a display.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_picture(figure: Any, out: Path) -> None:
    """Give all axes of a figure their style, and save it as a PNG of 150 pixels per inch."""
    for axis in figure.axes:
        axis.grid(True, color="#dddddd", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=12)
    figure.align_ylabels()
    figure.savefig(out, dpi=150)
