"""When a checkpoint is due, and what becomes of one that fails."""

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
from distaccum.errors import CheckpointError

# What a checkpoint that cannot be written does to the training; the earlier ones stay either way. (`continue` cannot be
# written in a class body.)
OnFailure = Enum("OnFailure", {"stop": "stop", "continue": "continue"})


@dataclass
class EveryConfig:
    """Both may be given: whichever comes first."""

    steps: int | None
    minutes: float | None


@dataclass
class CheckpointConfig:
    """When to save and what to keep. conf/ owns the values."""

    every: EveryConfig
    keep: int
    best: bool
    asynchronous: bool
    on_failure: OnFailure

    @property
    def goes_on(self) -> bool:
        """Whether what cannot be written ends nothing."""
        return self.on_failure is not OnFailure.stop


class Saver:
    """Saves at boundaries. Every rank has one and calls all but `minutes_are_over` alike."""

    def __init__(self, checkpoints: Checkpoints, config: CheckpointConfig, facts: Mapping[str, Any]) -> None:
        """Keep `facts`, which every checkpoint of the run holds; the clock starts now."""
        self._checkpoints = checkpoints
        self._config = config
        self._facts = facts
        self._saved_at = time.monotonic()
        self._step = 0  # of the save that was begun last
        self.failed: list[str] = []  # saves that did not succeed, though the training went on

    def minutes_are_over(self) -> bool:
        """Whether the clock of this rank says that a checkpoint is due: to be agreed by all."""
        minutes = self._config.every.minutes
        return minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes

    def is_due(self, step: int) -> bool:
        """Whether the number of steps says so."""
        steps = self._config.every.steps
        return steps is not None and step % steps == 0

    @property
    def keeps_best(self) -> bool:
        """Whether a step with the least held-out loss so far is saved, and kept."""
        return self._config.best

    def save(
        self, step: int, model: nn.Module, optimizer: Optimizer, facts: Mapping[str, Any], *, best: bool, stopping: bool
    ) -> list[str]:
        """Save; what a person has to know of this and earlier saves.

        Args:
            step: of the boundary.
            model: what was wrapped, see `model_tensors`.
            optimizer: over its parameters.
            facts: what stands here and now, in plain values.
            best: whether the held-out loss is the least so far.
            stopping: whether the run is stopped and goes on from here: the checkpoint is waited for, and must succeed.

        Raises:
            CheckpointError: on all ranks, where it failed and the configuration says to stop.
        """
        tensors = {**model_tensors(model), **optimizer_tensors(model, optimizer)}
        facts = {**self._facts, **facts, "optimizer": optimizer_values(model, optimizer)}
        told = self.wait(stopping)  # whatever became of the one before, this one is tried
        best = best and self.keeps_best
        self._step = step
        told += self._guarded(step, lambda: self._checkpoints.save(step, tensors, facts, best=best), stopping)
        self._saved_at = time.monotonic()
        return told + (self.wait(stopping) if stopping else [])

    def wait(self, stopping: bool = False) -> list[str]:
        """Wait for a save that is on its way; what became of it."""
        return self._guarded(self._step, self._checkpoints.wait, stopping)

    def _guarded(self, step: int, do: Callable[[], object], stopping: bool) -> list[str]:
        try:
            do()
        except CheckpointError as error:
            if stopping or not self._config.goes_on:
                raise
            self.failed.append(f"the checkpoint of step {step}")
            return [f"checkpoint.on_failure=continue, so the training goes on: {error}"]
        return [saved.told() for saved in self._checkpoints.saved()]
