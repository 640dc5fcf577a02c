"""Writes a run's start block, progress, messages and end line to the console, in plain ASCII.

On a terminal, progress is one line that is redrawn in place. In a log file, each call writes one
plain line, because progress bars have filled batch logs with tens of megabytes.
"""

from __future__ import annotations

import contextlib
import os
import sys
import textwrap
import time
from collections.abc import Callable, Mapping
from typing import TextIO

from distaccum.metrics.format import duration

LOG_WIDTH = 100  # columns when the output is not a terminal
MIN_WIDTH = 40  # columns; in a narrower terminal lines are too long, but not one word per line
REDRAW_S = 0.1  # least time between two drawings of the progress bar
BAR_COLUMNS = 24


class Console:
    """Writes messages and progress to one text stream, on rank 0 only.

    Every call flushes the stream, so that a batch log can be followed while the run writes it.

    Args:
        stream: where to write; None: `sys.stdout` at the time of this call.
        clock: returns monotonic seconds. Tests replace it.

    Attributes:
        is_terminal: whether the stream is a terminal.
    """

    def __init__(
        self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._stream = sys.stdout if stream is None else stream
        self._clock = clock
        self.is_terminal = self._stream.isatty()
        self._bar = ""  # newest text of the open progress bar, "" while none is open
        self._drawn = ""  # the text that is on the screen
        self._drawn_at = float("-inf")
        # Step and time of the first progress call, from which the time left is estimated.
        self._first: tuple[int, float] | None = None

    def start_block(self, sections: Mapping[str, Mapping[str, str]]) -> None:
        """Write titled sections of `name   value` lines.

        Names share one column. A long value continues on the next lines, in the column of values.

        Args:
            sections: for each title, the values by name, in the order in which to show them.
        """
        indent = 4 + max((len(name) for values in sections.values() for name in values), default=0)
        width = max(self._columns(), indent + MIN_WIDTH // 2)
        rule = "-" * min(width, LOG_WIDTH)
        lines = [rule]
        for title, values in sections.items():
            lines.append(title)
            for name, value in values.items():
                # Long words are paths and digests. They are not split, so that they can be copied.
                lines += textwrap.wrap(
                    value or "-",
                    width,
                    initial_indent=f"  {name}".ljust(indent),
                    subsequent_indent=" " * indent,
                    break_long_words=False,
                    break_on_hyphens=False,
                )
        self.line("\n".join([*lines, rule]))

    def progress(self, step: int, total_steps: int, fields: Mapping[str, str]) -> None:
        """Show the current step, the fields in the given order, and an estimate of the time left.

        On a terminal, the progress bar is redrawn at most 10 times per second. It stays on the
        screen with its newest numbers when `step >= total_steps` or when anything else is written.
        In a log file, each call writes one line, so the caller decides how often to call.

        Args:
            step: number of the newest step.
            total_steps: number of steps of the whole run.
            fields: texts by the name that is shown before each of them.
        """
        now = self._clock()
        first_step, first_time = self._first = self._first or (step, now)
        if first_step < step < total_steps:
            left_s = (now - first_time) / (step - first_step) * (total_steps - step)
            fields = {**fields, "left": duration(left_s)}
        text = f"step {step:>{len(str(total_steps))}}/{total_steps}{_joined(fields)}"
        if not self.is_terminal:
            self._write(text + "\n")
            return
        share = min(step / total_steps, 1.0) if total_steps else 1.0  # 0: all windows were skipped
        filled = "#" * int(share * BAR_COLUMNS)
        self._bar = f"[{filled:.<{BAR_COLUMNS}}] {share:4.0%} {text}"
        if step >= total_steps:
            self._leave_bar()
        elif now - self._drawn_at >= REDRAW_S:
            self._draw(now)

    def line(self, text: str) -> None:
        """Write the text and a newline.

        An open progress bar is drawn with its newest numbers first and stays above the text.
        """
        self._leave_bar()
        self._write(text + "\n")

    def end(self, reason: str, fields: Mapping[str, str]) -> None:
        """Write the last line: why the run ended, followed by the fields."""
        self.line(f"end: {reason}{_joined(fields)}")

    def _draw(self, now: float) -> None:
        # One column less: some terminals wrap a full line, and then each redraw would start a new
        # line.
        room = self._columns() - 1
        text = self._bar[:room]
        # spaces erase the rest of a longer text
        self._write("\r" + text.ljust(min(len(self._drawn), room)))
        self._drawn = text
        self._drawn_at = now

    def _leave_bar(self) -> None:
        if self._bar:
            self._draw(self._clock())  # REDRAW_S may have held the newest numbers back
            self._write("\n")
            self._bar = self._drawn = ""

    def _columns(self) -> int:
        if not self.is_terminal:
            return LOG_WIDTH
        with contextlib.suppress(OSError):
            # Asked for each time, because the window may have been resized. A new pseudo-terminal
            # reports 0.
            return os.get_terminal_size(self._stream.fileno()).columns or 80
        return 80

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError):  # a full disk or a closed pipe must not end the run
            self._stream.write(text)
            self._stream.flush()


def _joined(fields: Mapping[str, str]) -> str:
    return "".join(f"  {name} {value}" for name, value in fields.items())
