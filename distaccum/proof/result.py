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

    def facts(self) -> dict[str, Any]:
        """The same in plain containers."""
        lines = [{**asdict(line), "holds": line.holds} for line in self.lines]
        return {**asdict(self), "lines": lines, "holds": self.holds}
