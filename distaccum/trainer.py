"""Many steps, in a fixed order: learning rate, step, report, evaluate. No callbacks; every collaborator has a name."""

from __future__ import annotations

import math
import resource
import time
from dataclasses import dataclass

import torch

from distaccum.data.base import Dataset
from distaccum.data.loader import Loader
from distaccum.data.window import to_device
from distaccum.loss import SupportsObjective, sums_of, weights_of
from distaccum.optim import LRSchedule, ScheduleUnit
from distaccum.parallel.base import Strategy, Sync
from distaccum.plan import Plan, Window
from distaccum.report import Report
from distaccum.step import Accumulator, StepRecord


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
        self.report = report
        self.counts_tokens = counts_tokens
        self.progress = Progress()
        self._seconds = 0.0  # of training so far, without evaluation

    def run(self) -> dict[str, float]:
        """Train to the end; what was measured on held-out samples there, the loss first. Call it on every rank."""
        try:
            return self._run()
        finally:
            self.loader.close()

    def _run(self) -> dict[str, float]:
        progress, rhythm = self.progress, self.rhythm
        heldout: dict[str, float] = {}
        since, began = _Since(self.loader.waited_s), time.perf_counter()
        for window, micros in self.loader.windows(progress.step, progress.position, rhythm.steps):
            self.schedule.set(self._position(window), window.effective_batch)
            record = self.accumulator.step(micros)
            progress.step, progress.position = window.step + 1, window.next_start
            progress.samples += window.size
            progress.tokens += record.weight
            since.count(window.size, record)
            if self.report is not None:
                shown = progress.step % rhythm.log_every_steps == 0 or progress.step == rhythm.steps
                self._tell(window, record, since, shown)
                if shown:
                    since = _Since(self.loader.waited_s)
            if progress.step % rhythm.evaluate_every_steps == 0 or progress.step == rhythm.steps:
                self._seconds += time.perf_counter() - began
                heldout = self._evaluate()
                since, began = _Since(self.loader.waited_s), time.perf_counter()
        return heldout

    def totals(self) -> dict[str, float]:
        """What was done, and how fast, evaluation not counted."""
        progress, seconds = self.progress, max(self._seconds, 1e-9)
        return {
            "steps": progress.step,
            "samples": progress.samples,
            "samples_per_s": progress.samples / seconds,
            **self._tokens("tokens_per_s", progress.tokens / seconds),
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

    def _evaluate(self) -> dict[str, float]:
        means = evaluate(self.accumulator.strategy, self.heldout)
        if self.report is not None:
            progress = self.progress
            tokens = self._tokens("tokens", int(progress.tokens))
            self.report.heldout({"step": progress.step, **means, "samples": progress.samples, **tokens})
        return means


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
    rows, _ = world.share(totals.flatten().to(world.device)).read()
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
