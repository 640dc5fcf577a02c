"""Defines the outcome of `verify`: single checks and the whole proof."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Check:
    """Holds the result of one comparison."""

    name: str
    error: float  # relative
    tolerance: float | None  # None: reported, but not judged
    note: str
    advice: str = ""  # what to write instead if the check fails

    def __str__(self) -> str:
        """Return the result as one line of text."""
        tolerance = "not judged" if self.tolerance is None else f"tolerance {self.tolerance:.1e}"
        verdict = "reported" if self.tolerance is None else "holds" if self.holds else "FAILS"
        return f"{self.name} ({self.note}): {self.error:.1e}, {tolerance}: {verdict}"

    @property
    def holds(self) -> bool:
        """Return whether the error is within the tolerance; nan is not."""
        return self.tolerance is None or self.error <= self.tolerance


@dataclass(frozen=True)
class Proof:
    """Holds the outcome of `verify`, the same on every rank."""

    lines: tuple[Check, ...]
    # relative gradient error and its tolerance, by parameter
    parameters: Mapping[str, tuple[float, float]]
    network: str  # the traffic that the ledger counted
    network_agrees: bool  # whether it equals the forecast
    samples: str  # what was compared with what
    tolerance: str  # how the tolerances were derived

    @property
    def holds(self) -> bool:
        """Return whether every judged check is within its tolerance and the ledger agrees."""
        return self.network_agrees and all(line.holds for line in self.lines)

    @property
    def failures(self) -> str:
        """Return what fails, and what to write instead where known; empty if the proof holds."""
        failed = [line for line in self.lines if not line.holds]
        names = [line.name for line in failed if not line.advice] + (
            [] if self.network_agrees else ["the ledger"]
        )
        beyond = (
            [f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} beyond the tolerance."]
            if names
            else []
        )
        return " ".join(beyond + [line.advice for line in failed if line.advice])

    def __str__(self) -> str:
        """Return the outcome as several lines of text."""
        network = (
            f"network: {self.network or 'nothing'}, {'exactly' if self.network_agrees else 'NOT'} "
            "the forecast"
        )
        end = "proven" if self.holds else f"NOT PROVEN: {self.failures}"
        return "\n".join(
            [self.samples, *map(str, self.lines), f"tolerance: {self.tolerance}", network, end]
        )

    def facts(self) -> dict[str, Any]:
        """Return the proof in plain containers, for example to write it as JSON."""
        lines = [{**asdict(line), "holds": line.holds} for line in self.lines]
        return {**asdict(self), "lines": lines, "holds": self.holds}
