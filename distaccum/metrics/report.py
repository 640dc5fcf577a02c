"""Reports a run for its trainer on the console, in `metrics.jsonl`, in W&B and as `curve.png`."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TextIO

from distaccum.errors import ConfigError, RecordError, in_one_line
from distaccum.metrics.console import Console
from distaccum.metrics.curve import draw_curve
from distaccum.metrics.format import Field, duration, step_texts, text
from distaccum.metrics.run_log import RESUME, MetricsFile
from distaccum.metrics.wandb_run import LoggerConfig, WandbRun

_AXES = ("step", "loss", "samples", "tokens")


class Report:
    """Records and shows one run, on rank 0 only.

    It issues no collective, so the other ranks need no report.

    Args:
        run_dir: an existing folder, which receives `metrics.jsonl` and `curve.png`.
        console: where progress and messages are shown.
        wandb: a started W&B run, or one that is off.
        go_on: True: records that cannot be written are counted, and `end` shows how many there
            were. False: the first of them raises RecordError.

    Raises:
        ConfigError: `metrics.jsonl` cannot be opened for writing.
    """

    def __init__(
        self, run_dir: Path, console: Console, wandb: WandbRun, *, go_on: bool = False
    ) -> None:
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
                f"{self.metrics_path} cannot be written ({error.strerror}). Free some disk space, "
                "get write permission for this folder, or give another run_dir."
            ) from None
        self._started_at = time.monotonic()
        self._ended = False

    def start(self, sections: Mapping[str, Mapping[str, str]], facts: Mapping[str, object]) -> None:
        """Show the start block, and write the facts to a "start" record and to the config in W&B.

        Args:
            sections: the start block for people: for each title, the texts by name.
            facts: the values for programs, of any type that `to_plain` converts.
        """
        self._console.start_block(sections)
        self._record("start", facts)
        self._wandb.update_config(facts)
        if self._wandb.active:
            self._console.line(f"W&B {self._wandb.mode.value}: {self._wandb.where}")

    def step(self, fields: Mapping[str, Field], total_steps: int, show: bool) -> None:
        """Record one window and the step that it made.

        Writes a "step" record and a W&B row `train/*`, and shows a progress line if `show` is true.

        Args:
            fields: `step` (int; for a skipped window, the number of the previous step) and any of
                window, epoch, samples, tokens, loss, grad_norm, lr, denominator, skipped,
                samples_per_s, tokens_per_s, data_wait_share and comm_share (shares of 1), and
                peak_memory_bytes. Other names are recorded too. The values are Python numbers,
                because a tensor would have to be read from the device here.
            total_steps: number of steps of the whole run, as far as it is known.
            show: whether to show a progress line, so that the caller decides how often a log file
                gets one. The progress bar of a terminal follows every step in any case.
        """
        self._record("step", fields)
        self._wandb.log("train", fields)
        step = fields["step"]
        assert isinstance(step, int), step
        if show or self._console.is_terminal:
            self._console.progress(step, total_steps, step_texts(fields))

    def validation(self, fields: Mapping[str, Field]) -> None:
        """Record and show the result of a validation.

        Args:
            fields: `step` (int), `loss`, and the `samples` and `tokens` trained on so far, which
                W&B uses as x-axes. Other numbers are recorded and shown too.
        """
        self._record("validation", fields)
        self._wandb.log("validation", fields)
        loss = fields.get("loss")
        shown = f"{loss:.4f}" if isinstance(loss, (int, float)) else "-"
        others = [
            f", {name} {value:.4f}"
            for name, value in fields.items()
            if name not in _AXES and value is not None
        ]
        self._console.line(f"validation loss {shown}{''.join(others)} at step {fields['step']}")

    def note(self, line: str) -> None:
        """Show one line of text and write it to a "note" record."""
        self._record("note", {"text": line})
        self._console.line(line)

    def resume(self, step: int, windows: int, texts: Sequence[str]) -> None:
        """Record and show where the run resumes.

        Records of later windows, which an earlier start wrote, no longer count; see
        `distaccum.metrics.standing`.

        Args:
            step: number of steps that the run has made so far.
            windows: number of windows that the run has computed so far, skipped ones included.
            texts: the lines to show.
        """
        self._record(RESUME, {"step": step, "window": windows, "text": " ".join(texts)})
        for line in texts:
            self._console.line(line)

    def end(
        self,
        reason: str,
        fields: Mapping[str, Field],
        exit_code: int,
        baseline: float | None = None,
        loss_unit: str = "nats per token",
        not_written: Sequence[str] = (),
    ) -> None:
        """Record why the run ended, draw `curve.png`, finish W&B and show the last lines.

        A second call does nothing.

        Args:
            reason: a text such as "all 400 steps done" or "stopped by SIGTERM after step 120".
            fields: final numbers, by the names that are shown.
            exit_code: exit code of the process. W&B shows 0 as finished and others as failed.
            baseline: validation loss of predicting the frequencies of tokens or classes in the
                training data, for the plot; None: no baseline.
            loss_unit: unit of the losses, for the plot.
            not_written: what else is missing from the run folder, besides lost records of
                `metrics.jsonl`.
        """
        if self._ended:
            return
        self._ended = self._go_on = True  # a record that cannot be written must not hide the reason
        final = {"baseline": baseline, **fields, "reason": reason, "exit_code": exit_code}
        self._record("end", final | ({"not_written": list(not_written)} if not_written else {}))
        self._metrics.close()
        shown = {name: text(value, 4) for name, value in fields.items() if value is not None}
        self._console.end(reason, shown | {"time": duration(time.monotonic() - self._started_at)})
        records = [f"{self._num_lost} record(s) of metrics.jsonl"] if self._num_lost else []
        if lost := [*not_written, *records]:
            self._console.line(f"not written: {'; '.join(lost)}")
        try:
            draw_curve(self.metrics_path, self.run_dir / "curve.png", baseline, loss_unit)
        except Exception as error:  # metrics.jsonl has all numbers, so a plot must not fail the run
            self._console.line(
                f"curve.png was not drawn ({in_one_line(error)}); the numbers are in metrics.jsonl"
            )
        self._wandb.update_summary(
            {f"end/{name}": value for name, value in final.items() if value is not None}
        )
        self._wandb.finish(exit_code)
        self._console.line(f"run folder: {self.run_dir}")

    def _record(self, kind: str, fields: Mapping[str, object]) -> None:
        try:
            self._metrics.write(kind, **fields)
        except OSError as error:
            if not self._go_on:
                raise RecordError(
                    f"{self.metrics_path} cannot be written ({error.strerror}), so the run stops. "
                    "Free some disk space and start again with the same run_dir to resume. With "
                    "checkpoint.on_failure=continue, a run keeps training and reports at its end "
                    "how many records were lost."
                ) from None
            self._num_lost += 1
            if self._num_lost == 1:
                self._console.line(
                    f"{self.metrics_path} cannot be written ({error.strerror}); the run continues "
                    "without these records"
                )


def make_report(
    run_dir: Path,
    config: LoggerConfig,
    run_config: Mapping[str, object],
    stream: TextIO | None = None,
    *,
    go_on: bool = False,
) -> Report:
    """Make the report of a run, on rank 0 only.

    An online start of W&B blocks for about `config.init_timeout_s` seconds at most.

    Args:
        run_dir: folder that the run writes to, made if it is missing.
        config: the configuration group `logger`.
        run_config: what W&B keeps as the run's config: the composed configuration, the plan and the
            forecast.
        stream: where the console writes; None: standard output.
        go_on: as in `Report`.

    Raises:
        ConfigError: `metrics.jsonl` cannot be opened for writing.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    console = Console(stream)
    return Report(
        run_dir, console, WandbRun(run_dir, config, run_config, console.line), go_on=go_on
    )
