"""Holds the loss scale of float16, which changes at most once per window, on all ranks alike."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from distaccum.errors import require


class LossScale:
    """Scales losses so that small gradients do not vanish in float16.

    Losses are multiplied by the scale, and complete gradients are divided by it once per window. A
    window whose gradient overflows is skipped and halves the scale. After `growth_windows` windows
    without an overflow the scale doubles (Micikevicius et al., "Mixed precision training", 2018,
    section 3.2). Only numbers that all ranks share decide this, so every rank has the same scale.
    """

    def __init__(
        self, initial: float = 2.0**16, growth_windows: int = 2000, smallest: float = 1.0
    ) -> None:
        """Start with the scale `initial`.

        Args:
            initial: the first scale. With a power of two, scaling causes no rounding.
            growth_windows: windows without an overflow after which the scale doubles.
            smallest: the scale is never halved below this number. An overflow that cannot be
                answered by halving is treated as any other gradient that is not finite.

        Raises:
            ConfigError: unless 0 < smallest <= initial and growth_windows is at least 1.
        """
        require(
            0 < smallest <= initial < float("inf") and growth_windows >= 1,
            f"LossScale(initial={initial}, growth_windows={growth_windows}, smallest={smallest}) "
            "is not valid. Give 0 < smallest <= initial < inf, and growth_windows of at least 1.",
        )
        self.value = initial
        self.growth_windows = growth_windows
        self.smallest = smallest
        self._good = 0  # windows since the last change

    def state_dict(self) -> dict[str, float]:
        """Return the scale and its counter as plain numbers."""
        return {"value": self.value, "good": self._good}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restore the scale and its counter from a `state_dict()`."""
        self.value, self._good = float(state["value"]), int(state["good"])

    @property
    def can_shrink(self) -> bool:
        """Return whether the scale can be halved once more."""
        return self.value / 2 >= self.smallest

    def unscale(self, gradients: list[Tensor]) -> None:
        """Divide complete gradients by the scale, in place.

        If the scale is a power of two, this causes no rounding.
        """
        if gradients:
            torch._foreach_mul_(gradients, 1.0 / self.value)

    def update(self, finite: bool) -> None:
        """Adjust the scale to the result of a window; call it once after each window.

        Args:
            finite: whether the window's gradient was finite.
        """
        if not finite:
            self._good = 0
            if self.can_shrink:
                self.value /= 2
            return
        self._good += 1
        if self._good == self.growth_windows:
            self._good = 0
            self.value *= 2
