"""Many steps, in a fixed order: rate, step, report, evaluate, save, stop. No callbacks; all collaborators are named."""

from __future__ import annotations

import math
import resource
import time
from dataclasses import asdict, dataclass, field, replace
from enum import Enum

import torch

from distaccum.agreement import Request
from distaccum.checkpoint.saver import Saver
from distaccum.data.base import Dataset
from distaccum.data.loader import Loader
from distaccum.data.window import to_device
from distaccum.loss import SupportsObjective, sums_of, weights_of
from distaccum.optim import LRSchedule, ScheduleUnit
from distaccum.parallel.base import Strategy, Sync
from distaccum.plan import Plan, Window
from distaccum.preempt import Preemption
from distaccum.record import StepRecord
from distaccum.report import Report
from distaccum.step import Accumulator


class OnOutOfMemory(Enum):
    """What to do when memory runs out inside a window, on whichever rank."""

    error = "error"  # end the run on all ranks, and say what would have fitted
    shrink = "shrink"  # compute the window once more, and those after it, in micros of half the size


@dataclass(frozen=True)
class Heldout:
    """Held-out samples, always the same ones, and how to read them."""

    dataset: Dataset
    plan: Plan  # its first window is what is evaluated
    objective: SupportsObjective  # its first term is the loss


@dataclass(frozen=True)
class Rhythm:
    """How long to train and how often to say something, in steps."""

    steps: int
    log_every_steps: int
    evaluate_every_steps: int


@dataclass
class Progress:
    """Where a training stands; with the plan, all that a resumed run has to know of its data."""

    step: int = 0  # windows so far
    position: int = 0  # where the next window starts in the plan's stream
    samples: int = 0
    tokens: float = 0.0  # or whatever the objective counts
    evaluated_step: int = 0  # when held-out samples were evaluated last
    heldout: dict[str, float] = field(default_factory=dict)  # what was measured then, the loss first
    best_loss: float | None = None  # the least held-out loss so far


class Trainer:
    """Trains by a plan until its last step."""

    def __init__(
        self,
        plan: Plan,
        loader: Loader,
        accumulator: Accumulator,
        schedule: LRSchedule,
        unit: ScheduleUnit,
        heldout: Heldout,
        rhythm: Rhythm,
        preemption: Preemption,
        saver: Saver | None,
        report: Report | None,
        *,
        counts_tokens: bool,
    ) -> None:
        """Keep the collaborators; `report` is there on rank 0 only. Where weights are tokens, they are told as such."""
        self.plan = plan
        self.loader = loader
        self.accumulator = accumulator
        self.schedule = schedule
        self.unit = unit
        self.heldout = heldout
        self.rhythm = rhythm
        self.preemption = preemption
        self.saver = saver
        self.report = report
        self.counts_tokens = counts_tokens
        self.progress = Progress()
        self._resumed = Progress()  # where this start began
        self._seconds = 0.0  # of training in this start, without evaluating and saving

    def resume(self, progress: Progress) -> None:
        """Begin there, and not at the first step. Model, optimizer and accumulator are loaded by the caller."""
        self.progress, self._resumed = progress, replace(progress)

    def run(self) -> str | None:
        """Train until the last step, or until a rank is asked to stop: then why. Call it on every rank.

        Whichever it was, the run is saved there, if it is saved at all.
        """
        try:
            return self._run()
        finally:
            self.loader.close()

    def request(self) -> Request:
        """What this rank asks of all at the next boundary."""
        request = Request.none if self.preemption.reason is None else Request.stop
        if self.saver is not None and self.saver.minutes_are_over():
            request |= Request.save
        return request

    def _run(self) -> str | None:
        progress, rhythm = self.progress, self.rhythm
        if self._evaluation_is_due():  # it was stopped before it could
            best = self._evaluate()
            if best and self.saver is not None and self.saver.keeps_best:
                self._save(best, stopping=False)
        since, began = _Since(self.loader.waited_s), time.perf_counter()
        for window, micros in self.loader.windows(progress.step, progress.position, rhythm.steps):
            self.schedule.set(self._position(window), window.effective_batch)
            record = self.accumulator.step(micros, self)
            progress.step, progress.position = window.step + 1, window.next_start
            progress.samples += window.size
            progress.tokens += record.weight
            since.count(window.size, record)
            last = progress.step == rhythm.steps
            stop = Request.stop in record.requested and not last
            if self.report is not None:
                shown = progress.step % rhythm.log_every_steps == 0 or last or stop
                self._tell(window, record, since, shown)
                if shown:
                    since = _Since(self.loader.waited_s)
            self._seconds += time.perf_counter() - began
            best = False
            if not stop and self._evaluation_is_due():
                best = self._evaluate()
                since = _Since(self.loader.waited_s)
            if self._save_is_due(record.requested, best, last or stop):
                self._save(best, stop)
                since = _Since(self.loader.waited_s)
            if stop:
                return self.preemption.reason or "another rank was asked to stop"
            began = time.perf_counter()
        if self.saver is not None:
            self._note(self.saver.wait())
        return None

    def _evaluation_is_due(self) -> bool:
        step, rhythm = self.progress.step, self.rhythm
        due = step % rhythm.evaluate_every_steps == 0 or step == rhythm.steps
        return due and step > self.progress.evaluated_step

    def _save_is_due(self, requested: Request, best: bool, ends: bool) -> bool:
        if self.saver is None:
            return False
        due = Request.save in requested or self.saver.is_due(self.progress.step)
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
        """What was done, and how fast in this start, without evaluating and saving."""
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

    def _tell(self, window: Window, record: StepRecord, since: _Since, shown: bool) -> None:
        assert self.report is not None
        if record.verdict is not None:
            once = "" if self.accumulator.strategy.sync is Sync.every else "; each gradient crossed the network once"
            self.report.note(f"ledger: step {record.step} sent {record.verdict.counted}, exactly the forecast{once}")
        if record.chosen is not None:
            self.report.note(record.chosen)
        if record.skipped is not None:
            self.report.note(f"step {window.step + 1} skipped: {record.skipped}")
        elapsed = max(since.elapsed_s, 1e-9)
        self.report.step(
            {
                "step": self.progress.step,
                "epoch": window.epoch,
                "samples": self.progress.samples,
                **self._tokens("tokens", int(self.progress.tokens)),
                "loss": record.loss,
                "grad_norm": record.grad_norm,
                "lr": record.lr,
                "weight": record.weight,
                "skipped": record.skipped,
                "samples_per_s": since.samples / elapsed,
                **self._tokens("tokens_per_s", since.tokens / elapsed),
                "data_wait_share": min(1.0, (self.loader.waited_s - since.waited_s) / elapsed),
                "comm_share": None if since.exposed_s is None else min(1.0, since.exposed_s / elapsed),
                "peak_memory_bytes": peak_memory_bytes(self.accumulator.strategy.world.device),
            },
            self.rhythm.steps,
            shown,
        )

    def _evaluate(self) -> bool:
        """Evaluate held-out samples; whether the loss is the least so far."""
        means, progress = evaluate(self.accumulator.strategy, self.heldout), self.progress
        progress.evaluated_step, progress.heldout = progress.step, means
        if self.report is not None:
            tokens = self._tokens("tokens", int(progress.tokens))
            self.report.heldout({"step": progress.step, **means, "samples": progress.samples, **tokens})
        loss = next(iter(means.values()), math.nan)
        best = loss < (math.inf if progress.best_loss is None else progress.best_loss)
        if best:
            progress.best_loss = loss
        return best


def evaluate(strategy: Strategy, heldout: Heldout) -> dict[str, float]:
    """The weighted mean of each term of the objective over the held-out samples; the same whatever the world size.

    Call it on every rank: they share the micros, and run the same number of forwards.
    """
    world, window, objective = strategy.world, heldout.plan.window(), heldout.objective
    own = window.deal(world.rank, world.size)
    terms: list[str] = []
    totals: torch.Tensor | None = None  # [2, terms] float64: sums and weights
    with strategy.evaluating() as model:
        for index in range(len(window.deal(0, world.size))):
            counts = index < len(own)
            micro = own[index] if counts else window.micros[0]
            batch = heldout.dataset.batch(heldout.plan.samples(micro), torch.Generator())
            weights = weights_of(objective, batch)
            terms = list(weights)
            sums = sums_of(objective, model, to_device(batch, world.device), terms)
            pair = torch.stack(
                [torch.stack([s.double() for s in sums]).cpu(), torch.tensor([*weights.values()], dtype=torch.float64)]
            )
            if not counts:
                pair.zero_()
            totals = pair if totals is None else totals + pair
    assert totals is not None
    rows, _ = world.share(totals.flatten().tolist()).read()
    summed = [math.fsum(row[i] for row in rows) for i in range(2 * len(terms))]
    pairs = zip(terms, summed[: len(terms)], summed[len(terms) :], strict=True)
    return {term: value / weight for term, value, weight in pairs if weight > 0}


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory this rank has held: allocated on its GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class _Since:
    """Sums since the last line that was shown."""

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
        self.tokens += record.weight
        if record.exposed_s is not None:
            self.exposed_s = (self.exposed_s or 0.0) + record.exposed_s
