"""Plots and tables in plain text."""

from __future__ import annotations

from distaccum.metrics.table import table
from distaccum.metrics.textplot import plot


def test_a_step_function_is_drawn_as_one() -> None:
    """Ten columns for ten steps: each value where it holds, jumps upright, nothing in between."""
    text = plot({"samples": [(0, 8), (4, 16), (7, 8)]}, "steps", 10, width=14, height=3)
    assert text.splitlines() == [
        "samples",
        "16 |    ***",
        "   |    |  |",
        " 8 |****   ***",
        "   +----------",
        "    0 10 steps",
    ]


def test_a_short_value_is_not_lost() -> None:
    """One step in a thousand has another value; its column shows both."""
    text = plot({"y": [(0, 0), (500, 3), (501, 0)]}, "steps", 1000, width=13, height=4)
    assert text.splitlines()[1:5] == ["3 |     *", "  |     |", "  |     |", "0 |**********"]


def test_panels_share_the_axis() -> None:
    text = plot(
        {"lr": [(i, i / 50) for i in range(100)], "samples": [(0, 16)]}, "steps", 100, height=5
    )
    lines = text.splitlines()
    assert [line for line in lines if line.strip() in ("lr", "samples")] == ["lr", "samples"]
    assert len(lines) == 1 + 5 + 1 + 1 + 2  # a constant takes one line
    assert all(len(line) <= 80 for line in lines)
    assert text.isascii()
    assert lines[1].startswith("1.98 |")
    assert lines[5].startswith("   0 |")
    assert lines[7].startswith("  16 |***")
    columns = [line[6:].ljust(74) for line in lines[1:6]]
    assert all(any(row[i] == "*" for row in columns) for i in range(74))
    heights = [max(5 - r for r, row in enumerate(columns) if row[i] == "*") for i in range(74)]
    assert heights == sorted(heights)


def test_table() -> None:
    text = table(
        ["part", "bytes", "share"],
        [["weights", 1234567, 0.5], ["none", None, 1e-9], ["said", "4.1 MiB", 2.0]],
    )
    assert text.splitlines() == [
        "part         bytes  share",
        "-------  ---------  -----",
        "weights  1,234,567    0.5",
        "none             -  1e-09",
        "said       4.1 MiB      2",
    ]
