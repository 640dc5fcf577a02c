"""Decides when a checkpoint is due, and handles saves that fail."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from torch import nn
from torch.optim import Optimizer

from distaccum.checkpoint.state import model_tensors, optimizer_tensors, optimizer_values
from distaccum.checkpoint.store import Checkpoints
from distaccum.errors import CheckpointError, require

# Whether a checkpoint that cannot be written stops the training; earlier checkpoints are kept in
# both cases. (A class body cannot have a member `continue`, which is a keyword.)
OnFailure = Enum("OnFailure", {"stop": "stop", "continue": "continue"})


@dataclass
class EveryConfig:
    """Configures after how many steps or minutes to save, whichever comes first."""

    steps: int | None
    minutes: float | None


@dataclass
class CheckpointConfig:
    """Configures when to save and what to keep; the folder conf/ defines the default values."""

    every: EveryConfig
    keep: int
    best: bool
    asynchronous: bool
    on_failure: OnFailure

    @property
    def goes_on(self) -> bool:
        """Return whether the training continues when something cannot be written."""
        return self.on_failure is not OnFailure.stop

    def validate(self) -> None:
        """Refuse numbers out of range."""
        for name, value in (("steps", self.every.steps), ("minutes", self.every.minutes)):
            require(
                value is None or value > 0,
                f"checkpoint.every.{name} is {value}; give a positive number, or null.",
            )
        require(
            self.keep >= 0,
            f"checkpoint.keep is {self.keep}; give the number of checkpoints to keep, or 0 to save "
            "none.",
        )


class Saver:
    """Saves checkpoints at boundaries.

    Every rank has a saver, and all ranks must call its methods together, except `minutes_are_over`.
    """

    def __init__(
        self, checkpoints: Checkpoints, config: CheckpointConfig, facts: Mapping[str, Any]
    ) -> None:
        """Store the facts that every checkpoint of the run holds, and start the clock."""
        self._checkpoints = checkpoints
        self._config = config
        self._facts = facts
        self._saved_at = time.monotonic()
        self._step = 0  # step of the latest save
        self.failed: list[str] = []  # saves that failed while the training continued

    def minutes_are_over(self) -> bool:
        """Return whether a checkpoint is due by this rank's clock; all ranks must agree to save."""
        every = self._config.every
        return every.minutes is not None and time.monotonic() - self._saved_at >= 60 * every.minutes

    def is_due(self, step: int) -> bool:
        """Return whether a checkpoint is due by the number of steps."""
        steps = self._config.every.steps
        return steps is not None and step % steps == 0

    @property
    def keeps_best(self) -> bool:
        """Return whether a step with the lowest validation loss so far is saved and kept."""
        return self._config.best

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: Optimizer,
        facts: Mapping[str, Any],
        *,
        best: bool,
        stopping: bool,
    ) -> list[str]:
        """Save a checkpoint, and return messages on this save and earlier ones.

        Args:
            step: the step that was made last.
            model: the model without its wrapper, see `model_tensors`.
            optimizer: the optimizer over its parameters.
            facts: the current state of the run, in plain values.
            best: whether the validation loss is the lowest so far.
            stopping: whether the run stops here and will resume from this checkpoint. The save is
                then waited for and must succeed.

        Raises:
            CheckpointError: on all ranks, if a save failed and the run is stopping or `on_failure`
                is `stop`.
        """
        tensors = {**model_tensors(model), **optimizer_tensors(model, optimizer)}
        facts = {**self._facts, **facts, "optimizer": optimizer_values(model, optimizer)}
        # a failure of the previous save is reported, and this save is tried
        messages = self.wait(stopping)
        best = best and self.keeps_best
        self._step = step
        messages += self._guarded(
            step, lambda: self._checkpoints.save(step, tensors, facts, best=best), stopping
        )
        self._saved_at = time.monotonic()
        return messages + (self.wait(stopping) if stopping else [])

    def wait(self, stopping: bool = False) -> list[str]:
        """Wait for a save in progress, and return messages on it."""
        return self._guarded(self._step, self._checkpoints.wait, stopping)

    def _guarded(self, step: int, do: Callable[[], object], stopping: bool) -> list[str]:
        try:
            do()
        except CheckpointError as error:
            if stopping or not self._config.goes_on:
                raise
            self.failed.append(f"the checkpoint of step {step}")
            return [f"checkpoint.on_failure=continue, so the training continues: {error}"]
        return [saved.message() for saved in self._checkpoints.saved()]
