"""Describes the length of a training and its progress."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Intervals:
    """Holds the length of a training and how often it logs and validates."""

    windows: int  # windows of the plan; each makes one step unless it is skipped
    log_every_steps: int
    validate_every_steps: int


@dataclass
class Progress:
    """Records how far a training has come.

    With the plan, this is everything that a resumed run needs to know about its data.
    """

    windows: int = 0  # so far, including skipped ones; also the plan's number of the next window
    step: int = 0  # optimizer updates so far
    position: int = 0  # start of the next window in the plan's stream of samples
    samples: int = 0
    tokens: float = 0.0  # or whatever else the objective counts
    evaluated_step: int = 0  # step of the latest validation
    # its results by term, the loss first
    validation: dict[str, float] = field(default_factory=dict)
    best_loss: float | None = None  # lowest validation loss so far

    def __str__(self) -> str:
        skipped = self.windows - self.step
        return (
            f"{self.windows} windows ({self.step} steps, {skipped} skipped)"
            if skipped
            else f"{self.step} steps"
        )
