"""How long a training is, and where it stands."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Rhythm:
    """How long to train, and how often to say something."""

    windows: int  # of the plan; each makes a step, unless it is skipped
    log_every_steps: int
    evaluate_every_steps: int


@dataclass
class Progress:
    """Says how far a training has come; with the plan, this is all that a resumed run has to know of its data."""

    windows: int = 0  # so far, the skipped ones included: the plan's number of the next one
    step: int = 0  # optimizer updates so far
    position: int = 0  # where the next window starts in the plan's stream
    samples: int = 0
    tokens: float = 0.0  # or whatever the objective counts
    evaluated_step: int = 0  # at which held-out samples were evaluated last
    heldout: dict[str, float] = field(default_factory=dict)  # what was measured then, the loss first
    best_loss: float | None = None  # the least held-out loss so far

    def __str__(self) -> str:
        skipped = self.windows - self.step
        return f"{self.windows} windows ({self.step} steps, {skipped} skipped)" if skipped else f"{self.step} steps"
