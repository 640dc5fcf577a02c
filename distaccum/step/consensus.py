"""What all ranks know of a window before they act on it, by one small collective per window.

Each rank tells one row: what it has for the upcoming window, and how the current one went. So the weights of a window
are known before its first backward, and whether an update is made is decided by all ranks alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Flag, auto
from typing import Any, Protocol

from torch import Tensor

from distaccum.core.loss import SINGLE_TERM, Denominator, SupportsObjective, checked_weights, weights_of
from distaccum.core.window import MicroBatches
from distaccum.errors import ConfigError, in_one_line
from distaccum.parallel.ledger import Traffic
from distaccum.parallel.world import Shared, World

UNKNOWN, REFUSED = -1, -2  # instead of a number of micro-batches: not read yet; cannot be counted


class Request(Flag):
    """What a rank asks of all. Every rank learns it at the same boundary, whoever asked."""

    none = 0
    save = auto()
    stop = auto()


class Asking(Protocol):
    """Knows what this rank asks of all."""

    def request(self) -> Request:
        """Read once per window, when its small collective begins."""
        ...


@dataclass(frozen=True)
class Announced:
    """A window as all ranks know it before it begins."""

    denominator: Denominator  # the weights over all micros and ranks
    rounds: int  # micros on the rank that has most
    num_micros: int  # over all ranks


@dataclass(frozen=True)
class Outcome:
    """A window as all ranks know it before its update."""

    sums: list[float]  # the loss sums by term, over all micros and ranks
    grad_norm: float  # L2, of the complete gradient
    trouble: str | None = None  # what is not finite, and where; None if all is
    loss_finite: bool = True  # where it is, what is not finite may be the loss scale's fault


@dataclass(frozen=True)
class Asked:
    """Rows that are on their way."""

    shared: Shared
    upcoming: MicroBatches | None
    norm_rides: bool  # whether the rows carry shares of the gradient norm


class Agreement:
    """Keeps what was announced for the window that comes next. One object serves one accumulator."""

    def __init__(self, world: World, objective: SupportsObjective) -> None:
        """Nothing is sent yet."""
        self._world = world
        self._objective = objective
        self.terms: list[str] | None = None  # the objective's, once they are agreed
        self._announced: tuple[MicroBatches, Announced] | None = None
        self.asking: Asking | None = None
        self.requested = Request.none  # by any rank, in the rows that were read last
        self.padding: Any = None  # a micro-batch to compute with weight 0 where this rank has none
        self.asked = 0  # rows that were shared so far
        self._newest: Shared | None = None  # the rows that were read last
        self._why: Exception | None = None  # why this rank could not count the newest window that it refused
        self._refusing: list[int] = []  # the ranks that could not

    def meet(self, window: MicroBatches) -> None:
        """Before the first window: agree on the objective's terms too, and lend a micro-batch to ranks that have none.

        Raises:
            ConfigError: on all ranks, when their objectives have different terms, or one cannot count its window.
        """
        if self.terms is not None:
            return
        first, own, why = None, None, None
        totals: tuple[int, list[float]] = (REFUSED, [])
        try:
            first = window.peek()
            own = None if first is None else list(weights_of(self._objective, first))
            totals = self._totals(window, own or [])
        except Exception as error:
            why = error
        told = self._world.gather_objects((own, totals, why and in_one_line(why)))
        self._refuse({rank: row[2] for rank, row in enumerate(told) if row[2]}, why)
        having = [rank for rank, (terms, _, _) in enumerate(told) if terms is not None]
        terms = (told[having[0]][0] if having else None) or []
        if any(told[rank][0] != terms for rank in having):
            named = {rank: told[rank][0] for rank in having}
            raise ConfigError(f"Ranks have objectives with different terms: {named}. Use one objective on all ranks.")
        rows = [[float(count), *(totals or [0.0] * len(terms))] for _, (count, totals), _ in told]
        if having:
            self.terms = terms
            lent = self._world.lend(first, having[0]) if len(having) < self._world.size else None
            self.padding = lent if first is None else first
        self._announce(window, rows)

    def on(self, window: MicroBatches) -> Announced:
        """The numbers of this window: asked for one window ago, or now where some rank could not know it then.

        From now on the windows of the same source ask here before they are handed out.

        Raises:
            ConfigError: on all ranks, where one cannot count its micro-batches; where other ranks are not at the
                beginning of a window.
        """
        if window.source is not None:
            window.source.announcer = self
        if self._announced is None or self._announced[0] is not window:
            if self._world.group is None:  # nobody to ask
                count, totals = self._totals(window, self.terms or [])
                self._announce(window, [[float(count), *totals]])
            else:
                self._read(self.ask(window, asks=False))  # what a rank asks of all is told at the end of the window
        if self._announced is None or self._announced[0] is not window:
            self._refuse(dict.fromkeys(self._refusing, "Its own error says why."), self._why)
            raise ConfigError(
                f"Rank {self._world.rank} is starting a window while other ranks are finishing one. Every rank must "
                "loop over the same windows and pass each to Accumulator.step; to inspect a micro-batch on one rank, "
                "read it from the loader."
            )
        return self._announced[1]

    def skip(self, upcoming: MicroBatches | None) -> None:
        """Tell the row of a window of which nothing is computed."""
        self._read(self.ask(upcoming))

    def ask(
        self,
        upcoming: MicroBatches | None,
        sums: Tensor | None = None,
        norm_share: Tensor | None = None,
        *,
        asks: bool = True,
    ) -> Asked:
        """Start to tell this rank's row; returns at once.

        Args:
            upcoming: the next window, or None where this rank does not know it yet (then it is announced later).
            sums: [micros, terms] float64, this rank's loss sums of the current window.
            norm_share: [] float64, this rank's share of the squared gradient norm, where gradients are sharded.
            asks: whether to read what this rank asks of all.
        """
        self.asked += 1
        terms = self.terms or []
        try:
            count, totals = self._totals(upcoming, terms)
        except Exception as error:  # all ranks refuse the window together, when it begins
            self._why, count, totals = error, REFUSED, [0.0] * len(terms)
        request = self.asking.request() if asks and self.asking is not None else Request.none
        known, measured = [float(count), *totals, float(request.value)], []
        if norm_share is None:
            known.append(0.0)
        else:
            measured.append(norm_share[None])
        if sums is None:
            known += [0.0] * (len(terms) + 1)
        elif len(sums):
            # Zero times what is not finite is nan, and the first nan is what argmax takes for the largest.
            measured += [sums.sum(dim=0), (sums * 0.0).sum(dim=1).argmax(dim=0, keepdim=True)]
        else:
            measured.append(sums.new_zeros(len(terms) + 1))
        return Asked(self._world.share(known, measured), upcoming, norm_share is not None)

    def conclude(self, asked: Asked, own_norm: Tensor) -> Outcome:
        """Wait for all rows: how this window went, and what the next one is.

        Args:
            asked: from `ask`.
            own_norm: [] float64, the squared norm of all gradients; not read where shares of it rode along.
        """
        rows, own = self._read(asked, own_norm)
        num_terms = len(self.terms or [])
        shares = [row[3 + num_terms : -1] for row in rows]  # by rank; what stands before and behind them, see `ask`
        sums = [sum(column) for column in zip(*shares, strict=True)]
        squared = sum(row[2 + num_terms] for row in rows) if asked.norm_rides else own[0]
        grad_norm = math.sqrt(squared) if squared >= 0 else math.nan
        trouble = None if math.isfinite(grad_norm) else f"gradient norm {grad_norm}, though every loss was finite"
        broken = [rank for rank, share in enumerate(shares) if not all(map(math.isfinite, share))]
        if broken:
            rank, micro = broken[0], int(rows[broken[0]][-1])
            trouble = f"loss not finite on rank {rank}, its micro {micro} (global {micro * len(rows) + rank})"
        return Outcome(sums, grad_norm, trouble, loss_finite=not broken)

    def shortage(self, short: bool) -> list[int]:
        """The ranks that ran out of memory in the current window, in one more row. Call it on every rank."""
        self.asked += 1
        rows, _ = self._world.share([float(short)] + [0.0] * (3 + 2 * len(self.terms or []))).read()
        return [rank for rank, row in enumerate(rows) if row[0]]

    def forget(self) -> None:
        """After an exception: ask anew."""
        self._announced = None

    def traffic(self, rows: int) -> Traffic:
        """What so many rows send."""
        size = 8 * self._world.size * (4 + 2 * len(self.terms or [SINGLE_TERM]))
        return Traffic.of([] if self._world.group is None else [("all_reduce", size)] * rows)

    def _read(self, asked: Asked, *scalars: Tensor) -> tuple[list[list[float]], list[float]]:
        rows, own = asked.shared.read(*scalars)
        # gloo's thread holds the table for a moment longer. Let go of here, it would be freed there, which ends the
        # process where the interpreter is at its end.
        self._newest = asked.shared if self._world.group is not None else None
        self.requested = Request.none
        for row in rows:
            self.requested |= Request(int(row[1 + len(self.terms or [])]))
        if asked.upcoming is not None:
            self._announce(asked.upcoming, rows)
        return rows, own

    def _announce(self, window: MicroBatches, rows: list[list[float]]) -> None:
        counts = [int(row[0]) for row in rows]
        if min(counts) < 0:
            self._refusing = [rank for rank, count in enumerate(counts) if count == REFUSED]
            return  # some rank does not know it yet
        if window.source is not None and window.source.whole and min(counts) == 0:
            counts, rows = [0], []  # it is dropped on all ranks
        weights = {name: sum(row[1 + i] for row in rows) for i, name in enumerate(self.terms or [])}
        window.rounds = max(counts)
        self._announced = (window, Announced(Denominator(weights), max(counts), sum(counts)))

    def _refuse(self, refusing: Mapping[int, str], own: Exception | None) -> None:
        """Raise on all ranks for a window that some of them cannot count: there the error itself."""
        if self._world.rank in refusing and own is not None:
            raise own
        for rank, why in refusing.items():
            raise ConfigError(f"The micro-batches of rank {rank} cannot be counted. {why}")

    def _totals(self, window: MicroBatches | None, terms: list[str]) -> tuple[int, list[float]]:
        """This rank's number of micros in a window and their weights by term.

        Raises:
            ConfigError: for counts that are no numbers, and for terms that come and go.
        """
        if window is None:
            return UNKNOWN, [0.0] * len(terms)
        if window.weights is not None:
            weights = [checked_weights(weight) for weight in window.weights]
        else:
            weights = [weights_of(self._objective, micro) for micro in window]
        strange = [list(weight) for weight in weights if weight.keys() != set(terms)]
        if strange and terms:
            raise ConfigError(
                f"The objective's weight must have the same terms for every micro-batch: {terms}, got {strange[0]}."
            )
        return len(window), [math.fsum(weight[name] for weight in weights) for name in terms]
