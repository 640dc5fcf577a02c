"""What `verify` found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Line:
    """One thing that was compared."""

    name: str
    error: float  # relative
    tolerance: float | None  # None: told, not judged
    note: str
    advice: str = ""  # what to write instead, where it does not hold

    def __str__(self) -> str:
        """Return one line for people."""
        tolerance = "not judged" if self.tolerance is None else f"tolerance {self.tolerance:.1e}"
        verdict = "told" if self.tolerance is None else "holds" if self.holds else "FAILS"
        return f"{self.name} ({self.note}): {self.error:.1e}, {tolerance}: {verdict}"

    @property
    def holds(self) -> bool:
        """Whether the error is within the tolerance; nan is not."""
        return self.tolerance is None or self.error <= self.tolerance


@dataclass(frozen=True)
class Proof:
    """The outcome of `verify`, the same on every rank."""

    lines: tuple[Line, ...]
    parameters: Mapping[str, tuple[float, float]]  # relative gradient error and its tolerance, by parameter
    network: str  # what the ledger counted
    network_agrees: bool  # with its forecast
    samples: str  # what was compared with what
    tolerance: str  # how it was derived

    @property
    def holds(self) -> bool:
        """Whether everything that is judged is within its tolerance and the ledger agrees."""
        return self.network_agrees and all(line.holds for line in self.lines)

    @property
    def failures(self) -> str:
        """What does not hold, and what to write instead where that is known; empty for a proof that holds."""
        failed = [line for line in self.lines if not line.holds]
        names = [line.name for line in failed if not line.advice] + ([] if self.network_agrees else ["the ledger"])
        beyond = [f"{', '.join(names)} beyond the tolerance."] if names else []
        return " ".join(beyond + [line.advice for line in failed if line.advice])

    def __str__(self) -> str:
        """Return several lines for people."""
        network = f"network: {self.network or 'nothing'}, {'exactly' if self.network_agrees else 'NOT'} the forecast"
        end = "proven" if self.holds else f"NOT PROVEN: {self.failures}"
        return "\n".join([self.samples, *map(str, self.lines), f"tolerance: {self.tolerance}", network, end])

    def facts(self) -> dict[str, Any]:
        """The same in plain containers."""
        lines = [{**asdict(line), "holds": line.holds} for line in self.lines]
        return {**asdict(self), "lines": lines, "holds": self.holds}
