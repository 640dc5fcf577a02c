"""Defines the record that a step returns."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from distaccum.parallel.ledger import Verdict
from distaccum.step.exchange import Request, StepStats, WindowTotals

# What all ranks do if a window's loss or gradient norm is not finite: raise DivergenceError before
# anything is updated, or skip the update. (A class body cannot contain the name `raise`.)
NonFinite = Enum("NonFinite", {"raise": "raise", "skip": "skip"})


@dataclass(frozen=True)
class StepRecord:
    """Holds the results of one window.

    They are the same on every rank, except for `exposed_s`.
    """

    step: int  # optimizer updates so far, this one included
    loss: float  # sum of the terms' means, which was optimized; nan if nothing was counted
    losses: Mapping[str, float]  # mean of each term over all micro-batches and ranks
    # what each term's sum over all micro-batches and ranks was divided by
    denominators: Mapping[str, float]
    grad_norm: float  # L2 norm before clipping; nan if there was no backward
    lr: float  # of the first parameter group, in this update
    num_micro_batches: int  # in this window, over all ranks
    skipped: str | None = None  # why there was no update; None if there was one
    # seconds that this rank waited for communication; None: not known
    exposed_s: float | None = None
    verdict: Verdict | None = None  # the ledger's, if the window was audited
    requested: Request = Request.none  # what any rank asked of all ranks
    chosen: str | None = None  # what overlap_micro_batches=auto chose before this window, if it did

    @staticmethod
    def of(
        totals: WindowTotals, stats: StepStats, losses: Mapping[str, float], **more: Any
    ) -> StepRecord:
        """Make the record of a window from what ranks know of it, and `more` of the fields."""
        return StepRecord(
            loss=sum(losses.values()) if losses else math.nan,
            losses=losses,
            denominators=totals.denominator.by_term,
            grad_norm=stats.grad_norm,
            num_micro_batches=totals.num_micro_batches,
            skipped=stats.trouble,
            **more,
        )

    @property
    def denominator(self) -> float:
        """Return the denominator of the first term, or 0 if there are no terms."""
        return next(iter(self.denominators.values()), 0.0)
