"""What is known of a window after its step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from distaccum.parallel.ledger import Verdict
from distaccum.step.consensus import Request


@dataclass(frozen=True)
class StepRecord:
    """What one window did. But for the time, the same on every rank."""

    step: int  # optimizer updates so far, this one included
    loss: float  # the global weighted mean that was optimised, its terms added; nan where nothing was counted
    losses: Mapping[str, float]  # the same by term
    weights: Mapping[str, float]  # what each term was averaged over: all micros, all ranks
    grad_norm: float  # L2, before clipping; nan where there was no backward
    lr: float  # of the first parameter group, in this update
    num_micros: int  # over all ranks
    skipped: str | None = None  # why there was no update
    exposed_s: float | None = (
        None  # seconds that this rank waited for communication, see timing.py; differs between ranks
    )
    verdict: Verdict | None = None  # the ledger's, where the window was audited
    requested: Request = Request.none  # what any rank asked of all
    chosen: str | None = None  # how overlap_micros=auto chose, in the windows before which it did

    @property
    def weight(self) -> float:
        """The weight of the first term; of the only one, where there is one."""
        return next(iter(self.weights.values()), 0.0)
