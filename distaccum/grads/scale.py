"""The loss scale of float16: one unscaling and one decision per window, the same on all ranks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from distaccum.errors import ConfigError


class LossScale:
    """Keeps small gradients above float16's smallest number: losses are multiplied by it, gradients divided once.

    A window whose gradient overflows is skipped and halves the scale; after `growth_windows` good ones it doubles
    (Micikevicius et al., "Mixed precision training", 2018, section 3.2). It is decided from numbers that all ranks
    share, so that every rank holds the same scale.
    """

    def __init__(self, initial: float = 2.0**16, growth_windows: int = 2000, smallest: float = 1.0) -> None:
        """Start at `initial`; at `smallest` an overflow is no longer the scale's fault.

        Raises:
            ConfigError: for a scale that cannot be halved, or no windows to grow after.
        """
        if not 0 < smallest <= initial < float("inf") or growth_windows < 1:
            raise ConfigError(
                f"LossScale(initial={initial}, growth_windows={growth_windows}, smallest={smallest}): give "
                "0 < smallest <= initial and at least one window to grow after."
            )
        self.value = initial
        self.growth_windows = growth_windows
        self.smallest = smallest
        self._good = 0  # windows since the last change

    def state_dict(self) -> dict[str, float]:
        """In plain numbers."""
        return {"value": self.value, "good": self._good}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from there."""
        self.value, self._good = float(state["value"]), int(state["good"])

    @property
    def can_shrink(self) -> bool:
        """Whether a smaller scale is left to try."""
        return self.value / 2 >= self.smallest

    def unscale(self, gradients: list[Tensor]) -> None:
        """Divide complete gradients by the scale, in place. The scale is a power of two, so nothing is rounded."""
        if gradients:
            torch._foreach_mul_(gradients, 1.0 / self.value)

    def update(self, finite: bool) -> None:
        """Call once after each window."""
        if not finite:
            self._good = 0
            if self.can_shrink:
                self.value /= 2
            return
        self._good += 1
        if self._good == self.growth_windows:
            self._good = 0
            self.value *= 2
