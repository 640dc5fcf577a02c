"""Defines the record that a step returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from distaccum.parallel.ledger import Verdict
from distaccum.step.consensus import Request

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
    denominators: Mapping[str, float]  # what each term's sum over all micro-batches and ranks was divided by
    grad_norm: float  # L2 norm before clipping; nan if there was no backward
    lr: float  # of the first parameter group, in this update
    num_micro_batches: int  # in this window, over all ranks
    skipped: str | None = None  # why there was no update; None if there was one
    exposed_s: float | None = None  # seconds that this rank waited for communication; None: not known
    verdict: Verdict | None = None  # the ledger's, if the window was audited
    requested: Request = Request.none  # what any rank asked of all ranks
    chosen: str | None = None  # what overlap_micro_batches=auto chose before this window, if it did

    @property
    def denominator(self) -> float:
        """Return the denominator of the first term, or 0 if there are no terms."""
        return next(iter(self.denominators.values()), 0.0)
