"""ONE optimizer step: K micro-batches on R ranks make exactly one big batch."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from enum import Enum
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim import Optimizer

from distaccum.core.loss import Denominator, SupportsObjective
from distaccum.core.window import MicroBatches
from distaccum.errors import ConfigError, DivergenceError, choice
from distaccum.grads.accumulate import GradientDtypes
from distaccum.grads.clip import clip, squared_norm
from distaccum.grads.scale import LossScale
from distaccum.nn.blocks import blocks_of
from distaccum.parallel.base import Sync
from distaccum.parallel.detect import in_shards, recognise
from distaccum.parallel.ledger import Audit, Ledger, Traffic, Verdict
from distaccum.step import oom, plain_order
from distaccum.step.checks import (
    check_schedule_left,
    check_surroundings,
    check_window,
    move,
    own_optimizer,
    own_scheduler,
)
from distaccum.step.consensus import Agreement, Announced, Asking, Outcome
from distaccum.step.first_window import FirstLook
from distaccum.step.micro_batches import Forwards
from distaccum.step.overlap.schedule import Overlap
from distaccum.step.ownership import Parameters, outside
from distaccum.step.randomness import kept
from distaccum.step.record import StepRecord
from distaccum.step.timing import mark

# What to do with a window whose loss or gradient norm is not finite, on all ranks alike: a DivergenceError before
# anything is updated, or no update and on to the next window. (`raise` cannot be written in a class body.)
NonFinite = Enum("NonFinite", {"raise": "raise", "skip": "skip"})


class Scheduler(Protocol):
    """Anything that moves the learning rate once per optimizer step, such as torch's LR schedulers."""

    def step(self) -> Any:
        """Called after each update: never after a micro-batch, never after a window that was skipped."""


class Accumulator:
    """Makes optimizer steps of windows of micro-batches, in anybody's own loop."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        objective: SupportsObjective,
        *,
        sync: Sync | str = Sync.auto,
        clip_norm: float | None = None,
        scheduler: Scheduler | None = None,
        seed: int | None = None,
        nonfinite: NonFinite | str = "raise",
        audit: Audit | str = Audit.never,
        accum_dtype: torch.dtype | None = None,
        reduce_dtype: torch.dtype | None = None,
        loss_scale: LossScale | None = None,
        overlap_micros: int | str = 1,
        overlap_limit: int | None = None,
        blocks: Sequence[nn.Module] | None = None,
        agree_on_oom: bool = False,
        check_cut: bool = True,
    ) -> None:
        """Recognise the model; nothing is wrapped, nothing is sent.

        Args:
            model: a plain module on one process, a DistributedDataParallel, or an FSDP2 (`fully_shard`) module.
            optimizer: over this model's parameters.
            objective: what is summed and what is counted.
            sync: when gradients travel, see `Sync`.
            clip_norm: the largest L2 norm of a window's gradient; None clips nothing.
            scheduler: stepped once per update.
            seed: makes the randomness inside each micro (dropout) a function of (seed, step, global micro number), the
                same on any world size; None leaves torch's generators alone.
            nonfinite: whether to `raise` or to `skip`, see `NonFinite`.
            audit: which windows the ledger counts and compares with its forecast.
            accum_dtype: in which gradients are summed over micros; None: float32, or the parameters' where wider.
            reduce_dtype: in which they are summed over ranks, and so what travels; None: likewise.
            loss_scale: for float16. A window that overflows is skipped and halves it, while it can be halved.
            overlap_micros: T: the last T micros of a window are computed block by block, so that gradients travel
                beside more computation, for the activations of T micros; same results. "auto": by measured times.
            overlap_limit: the largest T that "auto" may choose.
            blocks: along which they are computed, in the model's order; None: as `nn.blocks.blocks_of` finds them.
            agree_on_oom: where memory runs out in the micros of a window, on any rank, all ranks raise OutOfMemoryError
                and stand as before it. Costs a small collective a window, and under DDP the overlap with the backward.
            check_cut: whether the first micro-batch is also computed in two halves, so that a mean in the place of a
                sum is refused. False: samples are meant to meet in the loss.

        Raises:
            ConfigError: for a model, an optimizer, a scheduler, a policy or an option that cannot be served.
        """
        if clip_norm is not None and not clip_norm > 0:
            raise ConfigError(f"clip_norm is {clip_norm}; give a positive norm, or None to clip nothing.")
        self.optimizer = own_optimizer(optimizer)
        dtypes = GradientDtypes(accum_dtype, reduce_dtype)
        self.strategy = recognise(
            model, sync, dtypes, apart=agree_on_oom, others=outside(in_shards(model), self.optimizer)
        )
        self.objective = objective
        self.clip_norm = clip_norm
        self.scheduler = own_scheduler(scheduler)
        self.loss_scale = loss_scale
        self.seed = seed
        self.nonfinite = choice(NonFinite, nonfinite, "nonfinite")
        self.audit = choice(Audit, audit, "audit")
        self.agree_on_oom = agree_on_oom
        self.steps = 0  # optimizer updates so far
        self.num_windows = 0  # the skipped ones included
        self.verdict: Verdict | None = None  # the ledger's on the newest audited window
        self._agreement = Agreement(self.strategy.world, objective)
        blocks = blocks_of(self.strategy.evaluation_model) if blocks is None else blocks
        self.overlap = Overlap(self.strategy, overlap_micros, blocks, overlap_limit)
        self._settled = True  # whether the strategy is as it is after a window
        self._first_look = FirstLook(self.strategy, check_cut=check_cut)
        self._parameters = Parameters(self.optimizer, self.strategy)

    def step(self, window: MicroBatches | Sequence[Any], asking: Asking | None = None) -> StepRecord:
        """Forward and backward of all micros, one reduction, clip, optimizer, scheduler, zero. Call it on every rank.

        Args:
            window: this rank's micro-batches, from `windows()` or any sequence. It may be empty while others' are not.
            asking: what this rank asks of all, such as to stop; told on the way, and `requested` in all ranks' records.

        Raises:
            DivergenceError: on all ranks, for a loss or gradient norm that is not finite; nothing was updated.
            ConfigError: for an objective that does not return sums and counts.
            OutOfMemoryError: on all ranks, with `agree_on_oom`; the window may be tried again in smaller micros.
            LedgerError: when an audited window sent something else than its forecast.
        """
        agreement, strategy = self._agreement, self.strategy
        check_surroundings(strategy.world.device)
        check_schedule_left(self.scheduler)
        window = window if isinstance(window, MicroBatches) else MicroBatches(check_window(window), len(window))
        parameters = self._parameters.updated()
        agreement.asking = asking
        with self._nothing_left_behind(), nullcontext() if self.seed is None else kept(strategy.world.device):
            agreement.meet(window)
            self._first_look.at_the_loss(self.objective, agreement.padding)
            self._settle()
            chosen = self.overlap.choose()
            asked_before = agreement.asked
            with self._ledger() as ledger:
                announced = agreement.on(window)
                if not announced.denominator.counts:
                    return self._skip(window, announced, chosen)
                if any(parameter.grad is not None for parameter in parameters):
                    self._parameters.clear()  # what ran through this model before is not the window's
                forwards = self._forwards(window, announced, self.seed)
                if self.agree_on_oom:  # all of it, the last backward too
                    last_backward = oom.run(strategy, agreement, forwards, self.overlap.run)
                else:
                    last_backward = self.overlap.run(forwards)
                agreement.padding, sums = forwards.last_micro, forwards.sums
                strategy.send_statistics()
                # The one small collective of the window. It hides behind the last backward; only where gradients are
                # sharded it comes after, because their norm takes a collective anyway and rides on this one.
                told = None if strategy.sharded else agreement.ask(window.upcoming, sums)
                last_backward()
                self._first_look.at_the_buffers()
                strategy.deliver()
                gradients = strategy.gradients(parameters)
                if self.loss_scale is not None:
                    self.loss_scale.unscale(gradients)
                norm = squared_norm(gradients, strategy.world.device)
                told = told or agreement.ask(window.upcoming, sums, norm / strategy.replicas)
                end = mark(strategy.world.device)
                outcome = agreement.conclude(told, norm)
            self._judge(ledger, announced.rounds, agreement.asked - asked_before)
            if outcome.trouble is not None and not self._may_skip(outcome):
                raise DivergenceError(f"Step {self.steps + 1}: {outcome.trouble}. Nothing was updated.")
            losses = announced.denominator.means(outcome.sums)
            lr = float(self.optimizer.param_groups[0]["lr"])
            if outcome.trouble is None:
                if self.clip_norm is not None:
                    clip(gradients, outcome.grad_norm, self.clip_norm)
                self.optimizer.step()
            strategy.keep_statistics(outcome.trouble is None)

        window.stepped = True
        self._end_window(outcome, sum(losses.values()))
        return StepRecord(
            step=self.steps,
            loss=sum(losses.values()),
            losses=losses,
            weights=announced.denominator.weights,
            grad_norm=outcome.grad_norm,
            lr=lr,
            num_micros=announced.num_micros,
            skipped=outcome.trouble,
            exposed_s=self.overlap.observe(forwards, end),
            verdict=self.verdict if ledger is not None else None,
            requested=agreement.requested,
            chosen=chosen,
        )

    def state_dict(self) -> dict[str, Any]:
        """Where the steps stand at a boundary, in plain numbers; model and optimizer have state dicts of their own."""
        scale = None if self.loss_scale is None else self.loss_scale.state_dict()
        return {"steps": self.steps, "num_windows": self.num_windows, "loss_scale": scale}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there, before the first window. Call it on every rank."""
        self.steps, self.num_windows = int(state["steps"]), int(state["num_windows"])
        if self.loss_scale is not None and state["loss_scale"] is not None:
            self.loss_scale.load_state_dict(state["loss_scale"])
        self._settled = False

    def abort(self) -> None:
        """Forget an unfinished window: no gradient, partial sum or sync state of it is left. For all ranks alike."""
        self.strategy.abort()
        self._parameters.clear()
        self._parameters.renew()
        self._agreement.forget()

    def control_traffic(self) -> Traffic:
        """What the small collectives of a step send: one. Another precedes it where a window is not read ahead."""
        return self._agreement.traffic(1 + self.agree_on_oom)

    def _skip(self, window: MicroBatches, announced: Announced, chosen: str | None) -> StepRecord:
        """Nothing counts anywhere: no forward, no update. Windows after it are announced as always."""
        deque(window, maxlen=0)  # a stream goes on behind it
        self._agreement.skip(window.upcoming)
        self.num_windows += announced.rounds > 0  # what no rank has a micro-batch of is no window
        window.stepped = True
        weights = announced.denominator.weights
        lr = float(self.optimizer.param_groups[0]["lr"])
        return StepRecord(
            self.steps, math.nan, dict.fromkeys(weights, math.nan), weights, math.nan, lr, announced.num_micros,
            skipped="weight 0", requested=self._agreement.requested, chosen=chosen,
        )  # fmt: skip

    def _settle(self) -> None:
        """A resumed run goes on in the order of addition that DDP takes up after its first synchronised backward."""
        agreement, strategy = self._agreement, self.strategy
        if self._settled or agreement.padding is None or not strategy.first_window_differs:
            return
        nothing = Announced(Denominator(dict.fromkeys(agreement.terms or [], 1.0)), rounds=1, num_micros=0)
        empty = MicroBatches([], 0)  # a padding micro is computed in its place, and adds nothing
        plain_order.run(strategy, self._forwards(empty, nothing, None))()
        self._settled = True

    def _forwards(self, window: MicroBatches, announced: Announced, seed: int | None) -> Forwards:
        return Forwards(
            self.strategy, self.objective, window, announced, self._agreement.padding, seed=seed,
            num_windows=self.num_windows, loss_scale=1.0 if self.loss_scale is None else self.loss_scale.value,
        )  # fmt: skip

    def _end_window(self, outcome: Outcome, loss: float) -> None:
        """Leave the boundary whole before anything may fail: gradients cleared, all counted, then the schedule."""
        updated = outcome.trouble is None
        self._parameters.clear()
        self.num_windows += 1
        self.steps += updated
        if self.loss_scale is not None and (updated or outcome.loss_finite):
            self.loss_scale.update(updated)
        if updated:
            move(self.scheduler, loss)

    def _may_skip(self, outcome: Outcome) -> bool:
        """Whether a window that is not finite is passed over: as asked for, or as a smaller loss scale may cure it."""
        may_cure = outcome.loss_finite and self.loss_scale is not None and self.loss_scale.can_shrink
        return self.nonfinite is NonFinite.skip or may_cure

    @contextmanager
    def _nothing_left_behind(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            try:
                self.abort()
            except Exception as another:  # the first one is what happened
                error.add_note(f"Clearing the window failed too: {type(another).__name__}: {another}")
            raise

    def _ledger(self) -> AbstractContextManager[Ledger | None]:
        pauses = self.audit is Audit.never or (self.audit is Audit.first and self.verdict is not None)
        return nullcontext() if pauses else Ledger()

    def _judge(self, ledger: Ledger | None, rounds: int, rows: int) -> None:
        """Compare after the window: DDP arranges its buckets anew within one."""
        if ledger is not None:
            forecast = self.strategy.forecast(rounds) + self._agreement.traffic(rows)
            self.verdict = Verdict(forecast, ledger.traffic)
            self.verdict.require(self.steps + 1)
