"""What a run tells: the trainer's one collaborator for the console, `metrics.jsonl`, W&B and `curve.png`."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TextIO

from distaccum.errors import ConfigError, RecordError
from distaccum.metrics.console import Console
from distaccum.metrics.curve import draw_curve
from distaccum.metrics.format import Field, duration, step_texts
from distaccum.metrics.run_log import RESUME, MetricsFile
from distaccum.metrics.wandb_run import WandbMode, WandbRun, allowed

_AXES = ("step", "loss", "samples", "tokens")


class LoggerName(Enum):
    """Which logger runs beside `metrics.jsonl`, which is always written."""

    none = "none"
    wandb = "wandb"


@dataclass
class LoggerConfig:
    """The group `logger`. Its values stand in conf/logger/, the only owner of defaults."""

    name: LoggerName
    project: str
    entity: str | None
    run_name: str | None
    group: str | None
    mode: WandbMode
    init_timeout_s: float


class Report:
    """Tells one run. Made and called on rank 0 only; makes no collective, so that the other ranks need not know of it.

    Args:
        run_dir: an existing folder; gets `metrics.jsonl` and `curve.png`.
        console: what people see.
        wandb: a started run, or None.
        go_on: whether records that cannot be written are counted and told at the end, and are no error.
    """

    def __init__(self, run_dir: Path, console: Console, wandb: WandbRun | None, *, go_on: bool = False) -> None:
        self.run_dir = run_dir
        self.metrics_path = run_dir / "metrics.jsonl"
        self._console = console
        self._wandb = wandb
        self._go_on = go_on
        self._num_lost = 0
        try:
            self._metrics = MetricsFile(self.metrics_path)
        except OSError as error:
            raise ConfigError(
                f"{self.metrics_path} cannot be written ({error.strerror}). Free some space, get the right to write "
                "there, or give another run_dir."
            ) from None
        self._started_at = time.monotonic()
        self._ended = False

    def start(self, sections: Mapping[str, Mapping[str, str]], facts: Mapping[str, object]) -> None:
        """Draw the start block, and record the facts (for machines) as a record "start" and in W&B's config."""
        self._console.start_block(sections)
        self._record("start", facts)
        if self._wandb is not None:
            self._wandb.update_config(facts)
            if self._wandb.active:
                self._console.line(f"W&B {self._wandb.mode.value}: {self._wandb.where}")

    def step(self, fields: Mapping[str, Field], total_steps: int, show: bool) -> None:
        """Record one window and the step it made: a record "step" and a W&B row `train/*`, a progress line when `show`.

        Args:
            fields: `step` (int; the one before, where the window was skipped) and any of window, epoch, samples,
                tokens, loss, grad_norm, lr, weight, skipped, samples_per_s, tokens_per_s, data_wait_share, comm_share
                (shares of 1), peak_memory_bytes; other names are recorded too. Python numbers: a tensor would have to
                be read from the device here.
            total_steps: of the whole run, as far as is known.
            show: for a log file the caller owns the interval. A terminal's bar follows every step all the same.
        """
        self._record("step", fields)
        if self._wandb is not None:
            self._wandb.log("train", fields)
        if show or self._console.is_terminal:
            self._console.progress(_whole(fields, "step"), total_steps, step_texts(fields))

    def heldout(self, fields: Mapping[str, Field]) -> None:
        """Record an evaluation: `step`, `loss`, and samples and tokens trained on so far, for the x-axes."""
        self._record("heldout", fields)
        if self._wandb is not None:
            self._wandb.log("heldout", fields)
        loss = fields.get("loss")
        text = f"{loss:.4f}" if isinstance(loss, (int, float)) else "-"
        others = [f", {name} {value:.4f}" for name, value in fields.items() if name not in _AXES and value is not None]
        self._console.line(f"held-out loss {text}{''.join(others)} at step {_whole(fields, 'step')}")

    def note(self, text: str) -> None:
        """Say one line, and record it as a record "note"."""
        self._record("note", {"text": text})
        self._console.line(text)

    def resume(self, step: int, windows: int, texts: Sequence[str]) -> None:
        """Say from where the run goes on; records of later windows, of an earlier start, stand no more."""
        self._record(RESUME, {"step": step, "window": windows, "text": " ".join(texts)})
        for text in texts:
            self._console.line(text)

    def end(
        self,
        reason: str,
        fields: Mapping[str, Field],
        exit_code: int,
        baseline: float | None = None,
        loss_unit: str = "nats per token",
        not_written: Sequence[str] = (),
    ) -> None:
        """Record why the run ended, draw `curve.png`, finish W&B, print the last lines. A second call does nothing.

        Args:
            reason: in words: "all 400 steps done", "stopped by SIGTERM after step 120".
            fields: final figures, shown as they are called.
            exit_code: of the process, for W&B: 0 is shown as finished, others as failed.
            baseline: the loss by frequency alone, for the picture.
            loss_unit: what the loss is measured in, for the picture.
            not_written: what is missing from the run folder, beside records of `metrics.jsonl`.
        """
        if self._ended:
            return
        self._ended = self._go_on = True  # whatever ends the run is told, not that it could not be written
        final = {"baseline": baseline, **fields, "reason": reason, "exit_code": exit_code}
        self._record("end", final | ({"not_written": list(not_written)} if not_written else {}))
        self._metrics.close()
        shown = {name: _plain_text(value) for name, value in fields.items() if value is not None}
        self._console.end(reason, shown | {"time": duration(time.monotonic() - self._started_at)})
        records = [f"{self._num_lost} record(s) of metrics.jsonl"] if self._num_lost else []
        if lost := [*not_written, *records]:
            self._console.line(f"not written: {'; '.join(lost)}")
        self._draw_curve(baseline, loss_unit)
        if self._wandb is not None:
            self._wandb.update_summary({f"end/{name}": value for name, value in final.items() if value is not None})
            self._wandb.finish(exit_code)
        self._console.line(f"run folder: {self.run_dir}")

    def _record(self, kind: str, fields: Mapping[str, object]) -> None:
        try:
            self._metrics.write(kind, **fields)
        except OSError as error:
            if not self._go_on:
                raise RecordError(
                    f"{self.metrics_path} cannot be written ({error.strerror}), so the run stops. Free some space and "
                    "start again with the same run_dir to resume. With checkpoint.on_failure=continue a run keeps "
                    "training and reports how many records were lost."
                ) from None
            self._num_lost += 1
            if self._num_lost == 1:
                self._console.line(f"{self.metrics_path} cannot be written ({error.strerror}); the run goes on without")

    def _draw_curve(self, baseline: float | None, loss_unit: str) -> None:
        try:
            draw_curve(self.metrics_path, self.run_dir / "curve.png", baseline, loss_unit)
        except Exception as error:  # a picture is not worth a run: everything it shows is in metrics.jsonl
            self._console.line(
                f"curve.png was not drawn ({type(error).__name__}: {error}); the numbers are in metrics.jsonl"
            )


def make_report(
    run_dir: Path,
    config: LoggerConfig,
    run_config: Mapping[str, object],
    stream: TextIO | None = None,
    *,
    go_on: bool = False,
) -> Report:
    """Make the report of a run, on rank 0 only. Blocks about `config.init_timeout_s` at most.

    Args:
        run_dir: where the run writes; made if it is missing.
        config: the group `logger`.
        run_config: what W&B keeps as the run's config: the composed configuration, plan and forecast.
        stream: where the console writes; the standard output when None.
        go_on: see `Report`.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    console = Console(stream)
    wandb = None
    mode, told = allowed(config.mode, os.environ) if config.name is LoggerName.wandb else (None, "")
    if told:
        console.line(told)
    if mode is not None:
        wandb = WandbRun(
            run_dir=run_dir,
            project=config.project,
            entity=config.entity,
            name=config.run_name,
            group=config.group,
            mode=mode,
            config=run_config,
            init_timeout_s=config.init_timeout_s,
            warn=console.line,
        )
    return Report(run_dir, console, wandb, go_on=go_on)


def _whole(fields: Mapping[str, Field], name: str) -> int:
    value = fields[name]
    assert isinstance(value, int), f"{name} is a whole number, got {value!r}"
    return value


def _plain_text(value: Field) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
