"""Trains window by window in a fixed order: learning rate, step, report, evaluate, save, stop.

There are no callbacks: the trainer names all of its collaborators.
"""

from __future__ import annotations

import contextlib
import math
import resource
import time
from collections.abc import Iterator
from dataclasses import asdict, replace

import torch

from distaccum.app.oom import REMEDIES, Budget
from distaccum.app.preemption import Preemption
from distaccum.app.progress import Intervals, Progress
from distaccum.app.validation import Validation, evaluate
from distaccum.checkpoint.saver import Saver
from distaccum.core.plan import Plan, Window
from distaccum.core.strategies import Sync
from distaccum.core.window import MicroBatches
from distaccum.data.loader import Loader
from distaccum.errors import OutOfMemoryError
from distaccum.metrics import Report
from distaccum.optim import LRSchedule, ScheduleUnit
from distaccum.parallel.ledger import Verdict
from distaccum.step.accumulator import Accumulator
from distaccum.step.exchange import Request
from distaccum.step.record import StepRecord


class Trainer:
    """Trains through the windows of a plan, until the last one or until a rank asks to stop."""

    def __init__(
        self,
        plan: Plan,
        loader: Loader,
        accumulator: Accumulator,
        schedule: LRSchedule,
        unit: ScheduleUnit,
        validation: Validation,
        intervals: Intervals,
        preemption: Preemption,
        saver: Saver | None,
        report: Report | None,
        budget: Budget,
        *,
        counts_tokens: bool,
    ) -> None:
        """Store the collaborators.

        `report` is None on every rank but rank 0. `counts_tokens` says whether the objective's
        denominators are tokens, which are then reported.
        """
        self.plan = plan
        self.loader = loader
        self.accumulator = accumulator
        self.schedule = schedule
        self.unit = unit
        self.validation = validation
        self.intervals = intervals
        self.preemption = preemption
        self.saver = saver
        self.report = report
        self.budget = budget
        self.counts_tokens = counts_tokens
        self.progress = Progress()
        self._resumed = Progress()  # the progress at which this start began
        self._seconds = 0.0  # spent on training in this start, without validation and saving

    def resume(self, progress: Progress) -> None:
        """Set the progress to continue from; the caller loads model, optimizer and accumulator."""
        self.progress, self._resumed = progress, replace(progress)

    def run(self) -> str | None:
        """Train until the last window, or until a rank asks to stop.

        Call it on every rank. In both cases a checkpoint is saved at the end, unless checkpoints
        are switched off.

        Returns:
            The reason to stop, or None after the last window.
        """
        progress, intervals = self.progress, self.intervals
        with contextlib.closing(self.loader):
            if self._evaluation_is_due():  # an earlier start was stopped before it validated
                best = self._evaluate()
                if best and self.saver is not None and self.saver.keeps_best:
                    self._save(best, stopping=False)
            since, began = _Since(self.loader.waited_s), time.perf_counter()
            for window, micro_batches in self._windows():
                self.schedule.set(self._position(window), window.effective_batch_size)
                world_size = self.accumulator.strategy.world.size
                try:
                    with self.budget.step(progress.step + 1, self.plan, window, world_size):
                        record = self.accumulator.step(micro_batches, self)
                except OutOfMemoryError as error:
                    self._shrink(error)
                    since, began = _Since(self.loader.waited_s), time.perf_counter()
                    continue
                progress.windows, progress.position = window.step + 1, window.next_start
                progress.step, made = record.step, record.skipped is None
                progress.samples += window.size
                progress.tokens += record.denominator
                since.count(window.size, record)
                last = progress.windows == intervals.windows
                stop = Request.stop in record.requested and not last
                shown = (made and progress.step % intervals.log_every_steps == 0) or last or stop
                if self.report is not None:
                    self._report_step(window, record, since, shown)
                    self._note(self.budget.message(last or stop))
                self._seconds += time.perf_counter() - began
                evaluates = not stop and self._evaluation_is_due()
                best = self._evaluate() if evaluates else False
                saves = self._save_is_due(record, best, last or stop)
                if saves:
                    self._save(best, stop)
                if stop:
                    return self.preemption.reason or "a request from another rank"
                if shown or evaluates or saves:
                    since = _Since(self.loader.waited_s)
                began = time.perf_counter()
            if self.saver is not None:
                self._note(self.saver.wait())
        return None

    def request(self) -> Request:
        """Return what this rank asks of all ranks at the next boundary: stop, save or nothing."""
        request = Request.none if self.preemption.reason is None else Request.stop
        if self.saver is not None and self.saver.minutes_are_over():
            request |= Request.save
        return request

    def _windows(self) -> Iterator[tuple[Window, MicroBatches]]:
        """Yield the windows that are left, a window again if its micro-batches were halved."""
        progress, num_windows = self.progress, self.intervals.windows
        while progress.windows < num_windows:
            plan = self.plan
            for found in self.loader.windows(progress.windows, progress.position, num_windows):
                yield found
                if self.plan is not plan:
                    break

    def _shrink(self, error: OutOfMemoryError) -> None:
        """Halve the micro-batches on all ranks, from the window that ran out of memory on."""
        if not self.budget.retries:
            raise error
        if self.plan.largest_micro_batch == 1:
            raise OutOfMemoryError(
                f"{error.args[0]} A micro-batch of one sample cannot be halved; {REMEDIES}."
            ) from None
        self.plan = self.loader.plan = replace(self.plan, halvings=self.plan.halvings + 1)
        size = self.plan.largest_micro_batch
        self._note(
            [
                f"step {self.progress.step + 1}: {error} Retrying the window and continuing with "
                f"micro-batches of {size} sample(s) and the same effective batch. To start this "
                f"way, use accum.micro_batch_size={size}."
            ]
        )

    def _evaluation_is_due(self) -> bool:
        progress, intervals = self.progress, self.intervals
        ends = progress.windows == intervals.windows
        if ends and not progress.validation:  # even if every window was skipped
            return True
        due = ends or progress.step % intervals.validate_every_steps == 0
        return due and progress.step > progress.evaluated_step

    def _save_is_due(self, record: StepRecord, best: bool, ends: bool) -> bool:
        if self.saver is None:
            return False
        made = record.skipped is None  # after a skipped window, the step was saved when it was made
        due = Request.save in record.requested or (made and self.saver.is_due(self.progress.step))
        return ends or due or (best and self.saver.keeps_best)

    def _save(self, best: bool, stopping: bool) -> None:
        assert self.saver is not None
        accumulator = self.accumulator
        facts = {"progress": asdict(self.progress), "accumulator": accumulator.state_dict()}
        model = accumulator.strategy.evaluation_model
        step, optimizer = self.progress.step, accumulator.optimizer
        self._note(self.saver.save(step, model, optimizer, facts, best=best, stopping=stopping))

    def _note(self, texts: list[str]) -> None:
        if self.report is not None:
            for text in texts:
                self.report.note(text)

    def totals(self) -> dict[str, float]:
        """Return the run's totals, and this start's speed without validation and saving."""
        progress, before, seconds = self.progress, self._resumed, max(self._seconds, 1e-9)
        return {
            "steps": progress.step,
            "samples": progress.samples,
            "samples_per_s": (progress.samples - before.samples) / seconds,
            **self._tokens("tokens_per_s", (progress.tokens - before.tokens) / seconds),
        }

    def _tokens(self, name: str, value: float) -> dict[str, float]:
        return {name: value} if self.counts_tokens else {}

    def _position(self, window: Window) -> int:
        if self.unit is ScheduleUnit.steps:
            return window.step
        return window.start if self.unit is ScheduleUnit.samples else int(self.progress.tokens)

    def _report_step(self, window: Window, record: StepRecord, since: _Since, shown: bool) -> None:
        assert self.report is not None
        if record.verdict is not None:
            self.report.note(f"ledger: {self._sent(record, record.verdict)}")
        if record.chosen is not None:
            self.report.note(record.chosen)
        if record.skipped is not None:
            self.report.note(
                f"window {window.step + 1} skipped, after step {record.step}: {record.skipped}"
            )
        elapsed = max(since.elapsed_s, 1e-9)
        self.report.step(
            {
                "step": self.progress.step,
                "window": self.progress.windows,
                "epoch": window.epoch,
                "samples": self.progress.samples,
                **self._tokens("tokens", int(self.progress.tokens)),
                "loss": record.loss,
                "grad_norm": record.grad_norm,
                "lr": record.lr,
                "denominator": record.denominator,
                "skipped": record.skipped,
                "samples_per_s": since.samples / elapsed,
                **self._tokens("tokens_per_s", since.tokens / elapsed),
                "data_wait_share": min(1.0, (self.loader.waited_s - since.waited_s) / elapsed),
                "comm_share": (
                    None if since.exposed_s is None else min(1.0, since.exposed_s / elapsed)
                ),
                "peak_memory_bytes": peak_memory_bytes(self.accumulator.strategy.world.device),
            },
            record.step + self.intervals.windows - self.progress.windows,
            shown,
        )

    def _sent(self, record: StepRecord, verdict: Verdict) -> str:
        strategy = self.accumulator.strategy
        if strategy.world.size == 1 and not verdict.counted.counts:
            return "one process: nothing to send, and nothing was sent"
        name = (
            f"step {record.step}"
            if record.skipped is None
            else f"the skipped window after step {record.step}"
        )
        once = "" if strategy.sync is Sync.every else "; each gradient crossed the network once"
        return f"{name} sent {verdict.counted}, exactly the forecast{once}"

    def _evaluate(self) -> bool:
        """Evaluate the validation samples, and return whether the loss is the lowest so far."""
        means, progress = evaluate(self.accumulator.strategy, self.validation), self.progress
        progress.evaluated_step, progress.validation = progress.step, means
        if self.report is not None:
            tokens = self._tokens("tokens", int(progress.tokens))
            self.report.validation(
                {"step": progress.step, **means, "samples": progress.samples, **tokens}
            )
        loss = next(iter(means.values()), math.nan)
        best = loss < (math.inf if progress.best_loss is None else progress.best_loss)
        if best:
            progress.best_loss = loss
        return best


def peak_memory_bytes(device: torch.device) -> int:
    """Return this rank's peak memory in bytes: allocated on its GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class _Since:
    """Sums samples, tokens and communication time since the last progress line."""

    def __init__(self, waited_s: float) -> None:
        self._began = time.perf_counter()
        self.waited_s = waited_s
        self.samples = 0
        self.tokens = 0.0
        self.exposed_s: float | None = None

    @property
    def elapsed_s(self) -> float:
        return time.perf_counter() - self._began

    def count(self, samples: int, record: StepRecord) -> None:
        self.samples += samples
        self.tokens += record.denominator
        if record.exposed_s is not None:
            self.exposed_s = (self.exposed_s or 0.0) + record.exposed_s
