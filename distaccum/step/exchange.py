"""Defines what ranks tell each other once per window, and what they then know."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Flag, auto
from typing import Protocol

from distaccum.core.loss import Denominator


class Request(Flag):
    """Names what a rank can ask of all ranks.

    Every rank learns of it at the same boundary.
    """

    none = 0
    save = auto()
    stop = auto()


class RequestSource(Protocol):
    """Provides what this rank asks of all ranks."""

    def request(self) -> Request:
        """Return the request; called once per window, when its small collective starts."""
        ...


@dataclass(frozen=True)
class WindowTotals:
    """Holds what all ranks know of a window before it begins."""

    denominator: Denominator  # by term, over all micro-batches and ranks
    rounds: int  # micro-batches on the rank with the most
    num_micro_batches: int  # over all ranks


@dataclass(frozen=True)
class StepStats:
    """Holds what all ranks know of a window before its update."""

    sums: list[float]  # loss sums by term, over all micro-batches and ranks
    grad_norm: float  # L2, of the complete gradient
    trouble: str | None = None  # what is not finite, and where; None if everything is finite
    loss_finite: bool = True  # if so, a norm that is not finite may be due to the loss scale
