"""Runs one optimizer step: K micro-batches on R ranks make exactly one big batch."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from distaccum.core.loss import Denominator, SupportsObjective
from distaccum.core.strategies import Sync
from distaccum.core.traffic import Traffic
from distaccum.core.window import MicroBatches
from distaccum.errors import DivergenceError, choice
from distaccum.grads.accumulate import GradientDtypes
from distaccum.grads.clip import clip, squared_norm
from distaccum.grads.scale import LossScale
from distaccum.nn.blocks import blocks_of
from distaccum.parallel.detect import in_shards, strategy_for
from distaccum.parallel.ledger import Audit, Ledger, Verdict
from distaccum.step import oom, plain_order
from distaccum.step.consensus import Consensus
from distaccum.step.exchange import RequestSource, StepStats, WindowTotals
from distaccum.step.guards import surroundings
from distaccum.step.guards.first_window import FirstLook
from distaccum.step.guards.parameters import Parameters, outside
from distaccum.step.micro_batches import MicroBatchRunner
from distaccum.step.overlap.schedule import Overlap
from distaccum.step.randomness import kept
from distaccum.step.record import NonFinite, StepRecord
from distaccum.step.timing import mark


class Accumulator:
    """Runs one optimizer step per window of micro-batches, in your own training loop."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        objective: SupportsObjective,
        *,
        sync: Sync | str = Sync.auto,
        clip_norm: float | None = None,
        scheduler: surroundings.Scheduler | None = None,
        seed: int | None = None,
        nonfinite: NonFinite | str = "raise",
        audit: Audit | str = Audit.never,
        accum_dtype: torch.dtype | None = None,
        reduce_dtype: torch.dtype | None = None,
        loss_scale: LossScale | None = None,
        overlap_micro_batches: int | str = 1,
        overlap_limit: int | None = None,
        blocks: Sequence[nn.Module] | None = None,
        agree_on_oom: bool = False,
        check_cut: bool = True,
    ) -> None:
        """Recognize the model and check the options; nothing is wrapped and nothing is sent.

        Args:
            model: a plain module on one process, a DistributedDataParallel or an FSDP2 module.
            optimizer: over this model's parameters.
            objective: computes the loss sum and the denominator of a micro-batch.
            sync: when gradients are communicated, see `Sync`.
            clip_norm: the largest L2 norm of a window's gradient; None: no clipping.
            scheduler: is stepped once per update.
            seed: makes the randomness in each micro-batch (dropout) a function of (seed, step,
                global micro-batch number) on any world size. None: nothing is seeded.
            nonfinite: `raise` or `skip` if a loss or norm is not finite, see `NonFinite`.
            audit: which windows the ledger counts and compares with its forecast.
            accum_dtype: dtype of gradient sums over micro-batches; None: float32, or the
                parameter's own dtype if that is wider.
            reduce_dtype: dtype of gradient sums over ranks, and of what is sent; None: float32, or
                the parameter's own dtype if that is wider.
            loss_scale: for float16. A window that overflows halves it, if possible, and is skipped.
            overlap_micro_batches: T, the number of micro-batches at the end of a window that are
                computed block by block. More computation then hides communication, at the cost of
                T micro-batches' activations. Results are the same. "auto": T from measured times.
            overlap_limit: the largest T that "auto" may choose.
            blocks: the model's blocks, in order; None: those that `nn.blocks.blocks_of` finds.
            agree_on_oom: if a rank runs out of memory in a window's micro-batches, all ranks raise
                OutOfMemoryError and return to the state before the window. It costs one small
                collective per window, and under DDP communication no longer overlaps the backward.
            check_cut: also compute the first micro-batch in two halves, to refuse an objective that
                returns a mean. False: for losses in which samples interact.

        Raises:
            ConfigError: for a model, optimizer, scheduler, policy or option that is not supported.
        """
        self.optimizer = surroundings.own_optimizer(optimizer)
        dtypes = GradientDtypes(accum_dtype, reduce_dtype)
        others = outside(in_shards(model), self.optimizer)
        self.strategy = strategy_for(model, sync, dtypes, apart=agree_on_oom, others=others)
        if agree_on_oom:
            oom.refuse(self.strategy)
        self.objective = surroundings.own_objective(objective)
        self.clip_norm = surroundings.own_clip_norm(clip_norm)
        self.scheduler = surroundings.own_scheduler(scheduler, self.optimizer)
        self.loss_scale = loss_scale
        self.seed = seed
        self.nonfinite = choice(NonFinite, nonfinite, "nonfinite")
        self.audit = choice(Audit, audit, "audit")
        self.agree_on_oom = agree_on_oom
        self.steps = 0  # optimizer updates so far
        self.num_windows = 0  # skipped ones included
        self.verdict: Verdict | None = None  # the ledger's, for the latest audited window
        self._consensus = Consensus(self.strategy.world, objective)
        blocks = blocks_of(self.strategy.evaluation_model) if blocks is None else blocks
        self.overlap = Overlap(self.strategy, overlap_micro_batches, blocks, overlap_limit)
        self._settled = True  # False between `load_state_dict` and `_settle`
        self._first_look = FirstLook(self.strategy, check_cut=check_cut)
        self._parameters = Parameters(self.optimizer, self.strategy)

    def step(
        self, window: MicroBatches | Sequence[Any], requests: RequestSource | None = None
    ) -> StepRecord:
        """Run one optimizer step on a window; every rank must call it.

        It runs all forwards and backwards, one reduction, clipping, optimizer and scheduler, then
        clears the gradients and returns a record of the window.

        Args:
            window: this rank's micro-batches, from `windows()` or any sequence. It may be empty.
            requests: what this rank asks of all ranks, such as to stop. It is sent with the
                window's small collective and becomes `requested` in the records of all ranks.

        Raises:
            DivergenceError: on all ranks, if a loss or norm is not finite. Nothing was updated.
            ConfigError: for an objective that does not return sums and counts.
            OutOfMemoryError: on all ranks, with `agree_on_oom`; retry with smaller micro-batches.
            LedgerError: if the traffic of an audited window differs from its forecast.
        """
        consensus, strategy = self._consensus, self.strategy
        window = surroundings.checked(window, self.scheduler, strategy.world.device)
        parameters = self._parameters.updated()
        consensus.requests = requests
        randomness = nullcontext() if self.seed is None else kept(strategy.world.device)
        with surroundings.undone_after_errors(self.abort), randomness:
            chosen = self._prepare(window, parameters)
            with Ledger.of_window(self.audit, self.verdict) as ledger:
                rows_before = consensus.rows_sent
                totals = consensus.totals_of(window)
                if not totals.denominator.counts:
                    return self._skip(window, totals, chosen)
                runner = self._runner(window, totals, parameters)
                last_backward = self._all_but_the_last_backward(runner)
                # The one small collective of the window. The last backward hides it. With sharded
                # gradients it comes after that backward, since it also carries the shards' norms.
                exchange = partial(consensus.start, window.upcoming, runner.sums)
                pending = None if strategy.sharded else exchange()
                last_backward()
                gradients = self._complete_gradients(parameters)
                norm = squared_norm(gradients, strategy.world.device)
                pending = pending or exchange(norm / strategy.replicas)
                end = mark(strategy.world.device)
                stats = consensus.finish(pending, norm)
            if ledger is not None:  # after the window, in which DDP may rebuild its buckets
                rows = consensus.traffic(consensus.rows_sent - rows_before)
                self.verdict = ledger.judge(strategy.forecast(totals.rounds) + rows, self.steps + 1)
            lr = float(self.optimizer.param_groups[0]["lr"])
            if self._is_finite(stats):
                if self.clip_norm is not None:
                    clip(gradients, stats.grad_norm, self.clip_norm)
                self.optimizer.step()
                strategy.statistics.commit()

        losses = totals.denominator.means(stats.sums)
        self._end_window(window, stats, sum(losses.values()))
        return StepRecord.of(
            totals,
            stats,
            losses,
            step=self.steps,
            lr=lr,
            exposed_s=self.overlap.observe(runner, end),
            verdict=self.verdict if ledger is not None else None,
            requested=consensus.requested,
            chosen=chosen,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return counters and loss scale as plain numbers; save model and optimizer separately."""
        scale = None if self.loss_scale is None else self.loss_scale.state_dict()
        return {"steps": self.steps, "num_windows": self.num_windows, "loss_scale": scale}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a `state_dict()` before the first window, on every rank."""
        self.steps, self.num_windows = int(state["steps"]), int(state["num_windows"])
        if self.loss_scale is not None and state["loss_scale"] is not None:
            self.loss_scale.load_state_dict(state["loss_scale"])
        self._settled = False

    def abort(self) -> None:
        """Discard gradients, partial sums and sync state of an unfinished window, on all ranks."""
        self.strategy.abort()
        self._parameters.clear()
        self._parameters.renew()
        self._consensus.reset()

    def control_traffic(self) -> Traffic:
        """Return what a step's small collectives send, if its window was read ahead."""
        return self._consensus.traffic(1 + self.agree_on_oom)  # one more if it was not

    def _skip(self, window: MicroBatches, totals: WindowTotals, chosen: str | None) -> StepRecord:
        """Skip a window in which no rank counts anything; announce the next window as usual."""
        deque(window, maxlen=0)  # read it to its end: the next window may continue the same stream
        self._consensus.skip(window.upcoming)
        self.num_windows += totals.rounds > 0  # not if no rank has a micro-batch
        window.stepped = True
        return StepRecord.of(
            totals,
            StepStats([], math.nan, trouble="denominator 0"),
            dict.fromkeys(totals.denominator.by_term, math.nan),
            step=self.steps,
            lr=float(self.optimizer.param_groups[0]["lr"]),
            requested=self._consensus.requested,
            chosen=chosen,
        )

    def _prepare(self, window: MicroBatches, parameters: Sequence[nn.Parameter]) -> str | None:
        """Do what precedes a window; return how overlap was chosen, if it was chosen now."""
        self._consensus.handshake(window)
        self._first_look.at_the_loss(self.objective, self._consensus.padding)
        self._settle()
        if any(parameter.grad is not None for parameter in parameters):
            self._parameters.clear()  # gradients from before the window
        return self.overlap.choose()

    def _all_but_the_last_backward(self, runner: MicroBatchRunner) -> Callable[[], None]:
        """Run a window except for its last backward, and return that backward."""
        if self.agree_on_oom:  # the last backward included
            last_backward = oom.run(self.strategy, self._consensus, runner, self.overlap.run)
        else:
            last_backward = self.overlap.run(runner)
        self._consensus.padding = runner.last_micro_batch
        self.strategy.statistics.send(self.strategy.world.group, self.strategy.world.device)
        return last_backward

    def _complete_gradients(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """Return the global sums of the window's gradients, or this rank's shards of them."""
        self._first_look.at_the_buffers()
        self.strategy.deliver()
        gradients = self.strategy.gradients(parameters)
        if self.loss_scale is not None:
            self.loss_scale.unscale(gradients)
        return gradients

    def _is_finite(self, stats: StepStats) -> bool:
        """Return whether to update; raise if a value is not finite and may not be skipped."""
        if stats.trouble is None:
            return True
        # A smaller loss scale may cure gradients that overflow, but not a loss that does.
        cured = stats.loss_finite and self.loss_scale is not None and self.loss_scale.can_shrink
        if self.nonfinite is not NonFinite.skip and not cured:
            raise DivergenceError(f"Step {self.steps + 1}: {stats.trouble}. Nothing was updated.")
        self.strategy.statistics.forget()
        return False

    def _settle(self) -> None:
        """Make a resumed DDP sum in the order of later windows instead of that of its first one."""
        consensus, strategy = self._consensus, self.strategy
        if self._settled or consensus.padding is None or not strategy.first_window_differs:
            return
        denominator = Denominator(dict.fromkeys(consensus.terms or [], 1.0))
        nothing = WindowTotals(denominator, rounds=1, num_micro_batches=0)
        empty = MicroBatches([], 0)  # so one padding micro-batch is computed, and adds nothing
        plain_order.run(strategy, self._runner(empty, nothing, []))()
        self._settled = True

    def _runner(
        self, window: MicroBatches, totals: WindowTotals, parameters: Sequence[nn.Parameter]
    ) -> MicroBatchRunner:
        return MicroBatchRunner(
            self.strategy,
            self.objective,
            window,
            totals,
            self._consensus.padding,
            parameters,
            seed=self.seed,
            num_windows=self.num_windows,
            loss_scale=1.0 if self.loss_scale is None else self.loss_scale.value,
        )

    def _end_window(self, window: MicroBatches, stats: StepStats, loss: float) -> None:
        """Clear gradients and count the window, then step the scheduler, which may fail."""
        window.stepped, updated = True, stats.trouble is None
        self._parameters.clear()
        self.num_windows += 1
        self.steps += updated
        if self.loss_scale is not None and (updated or stats.loss_finite):
            self.loss_scale.update(updated)
        if updated:
            surroundings.step_scheduler(self.scheduler, loss)
