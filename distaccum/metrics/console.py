"""What a person sees: a start block, progress, single lines, an end line. Plain text in ASCII.

On a terminal progress is one line that is drawn over and over; in a log file it is one plain line per call, because
bars have filled batch logs with tens of megabytes.
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

LOG_WIDTH = 100  # columns where there is no terminal
MIN_WIDTH = 40  # a narrower terminal gets long lines rather than one word a line
REDRAW_S = 0.1
BAR_COLUMNS = 24


class Console:
    """Writes to one stream, on rank 0 only. Every call flushes, so that a batch log can be followed.

    Args:
        stream: where to write; the standard output of the moment when None.
        clock: seconds, monotonic. For tests.
    """

    def __init__(self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = sys.stdout if stream is None else stream
        self._clock = clock
        self.is_terminal = self._stream.isatty()
        self._bar = ""  # the newest text of the open bar line, "" while none is open
        self._drawn = ""  # what of it is on the screen
        self._drawn_at = float("-inf")
        self._first: tuple[int, float] | None = None  # step and time of the first progress call, for the time left

    def start_block(self, sections: Mapping[str, Mapping[str, str]]) -> None:
        """Draw titled sections of `name   value` lines, names in one column, long values wrapped under themselves."""
        names = [name for values in sections.values() for name in values]
        indent = 2 + max((len(name) for name in names), default=0) + 2
        width = max(self._columns(), MIN_WIDTH)
        lines = ["-" * min(width, LOG_WIDTH)]
        for title, values in sections.items():
            lines.append(title)
            for name, value in values.items():
                paragraphs = value.splitlines() or [""]
                for index, paragraph in enumerate(paragraphs):
                    head = f"  {name}" if index == 0 else ""
                    lines += _wrapped(head.ljust(indent), paragraph, width)
        lines.append(lines[0])
        self.line("\n".join(lines))

    def progress(self, step: int, total_steps: int, fields: Mapping[str, str]) -> None:
        """Show where the run is: step of total, the fields in the order given, and the time left as of this pace.

        On a terminal the one bar line is drawn again, at most 10 times a second; it stays, with its newest numbers,
        when `step >= total_steps` or when anything else is written. Elsewhere one line per call: the caller owns the
        interval.
        """
        now = self._clock()
        self._first = self._first or (step, now)
        shown_fields = {**fields, **self._time_left(step, total_steps, now)}
        shown = "  ".join(f"{name} {value}" for name, value in shown_fields.items())
        digits = len(str(total_steps))
        if not self.is_terminal:
            self._write(f"step {step:>{digits}}/{total_steps}  {shown}\n")
            return
        share = min(max(step / total_steps, 0.0), 1.0) if total_steps else 1.0
        filled = int(share * BAR_COLUMNS)
        bar = "#" * filled + "." * (BAR_COLUMNS - filled)
        self._bar = f"[{bar}] {share:4.0%} step {step:>{digits}}/{total_steps}  {shown}"
        if step >= total_steps:
            self._leave_bar()
        elif now - self._drawn_at >= REDRAW_S:
            self._draw(now)

    def line(self, text: str) -> None:
        """Write one line (or several, if the text has newlines). An open bar stays above it, brought up to date."""
        self._leave_bar()
        self._write(text + "\n")

    def end(self, reason: str, fields: Mapping[str, str]) -> None:
        """Write the last line: why the run ended, and what is worth knowing then."""
        self.line("  ".join([f"end: {reason}", *(f"{name} {value}" for name, value in fields.items())]))

    def _time_left(self, step: int, total_steps: int, now: float) -> dict[str, str]:
        assert self._first is not None
        first_step, first_time = self._first
        if step <= first_step or step >= total_steps:
            return {}
        return {"left": duration((now - first_time) / (step - first_step) * (total_steps - step))}

    def _draw(self, now: float) -> None:
        # One column less: a full line wraps on some terminals, and then every redraw would start a new line.
        room = self._columns() - 1
        text = self._bar[:room]
        self._write("\r" + text.ljust(min(len(self._drawn), room)))  # spaces wipe a longer predecessor
        self._drawn = text
        self._drawn_at = now

    def _leave_bar(self) -> None:
        if self._bar:
            self._draw(self._clock())  # the newest numbers may have come too soon after the last drawing
            self._write("\n")
            self._bar = self._drawn = ""

    def _columns(self) -> int:
        if not self.is_terminal:
            return LOG_WIDTH
        try:
            columns = os.get_terminal_size(self._stream.fileno()).columns  # each time: people resize windows
        except OSError:
            columns = 0
        return columns or 80  # a fresh pseudo-terminal says 0

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError):  # a log on a full disk, a pipe that nobody reads: no reason to end a run
            self._stream.write(text)
            self._stream.flush()


def _wrapped(head: str, text: str, width: int) -> list[str]:
    room = max(width, len(head) + MIN_WIDTH // 2)
    # Long words are paths and digests: better over the edge than cut, so that they can be copied.
    lines = textwrap.wrap(
        text,
        room,
        initial_indent=head,
        subsequent_indent=" " * len(head),
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [line.rstrip() for line in lines] or [head.rstrip()]
