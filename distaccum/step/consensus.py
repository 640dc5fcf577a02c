"""Exchanges between ranks what they must agree on, in one small collective per window.

Each rank sends one row about the upcoming window and the current one. So all ranks know the
denominators of a window before its first backward, and decide alike whether to make an update.

A row has these float64 columns, for an objective with T terms:
    0: the rank's number of micro-batches in the upcoming window, or UNKNOWN or REFUSED.
    1 to T: the sum of their denominators, by term.
    1 + T: the rank's request.
    2 + T: the rank's share of the squared gradient norm of the current window, if it is sharded.
    3 + T to 2 + 2T: the rank's loss sums of the current window, by term.
    3 + 2T: the rank's first micro-batch whose loss is not finite; 0 if all are finite.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from distaccum.core.loss import (
    SINGLE_TERM,
    Denominator,
    SupportsObjective,
    checked_denominators,
    denominators_of,
)
from distaccum.core.traffic import Traffic, consensus
from distaccum.core.window import MicroBatches
from distaccum.errors import ConfigError, in_one_line
from distaccum.parallel.world import PendingRows, World
from distaccum.step.exchange import Request, RequestSource, StepStats, WindowTotals

UNKNOWN, REFUSED = -1, -2  # in place of a number of micro-batches: not read yet; not countable


@dataclass(frozen=True)
class PendingRow:
    """Holds rows that are being exchanged."""

    shared: PendingRows
    upcoming: MicroBatches | None  # the window that the rows announce
    norm_rides: bool  # whether the rows contain shares of the gradient norm


class Consensus:
    """Exchanges rows for one accumulator and keeps what ranks announced for the next window."""

    def __init__(self, world: World, objective: SupportsObjective) -> None:
        """Keep the ranks and the objective; nothing is sent yet."""
        self._world = world
        self._objective = objective
        self.terms: list[str] | None = None  # the objective's, once all ranks agree
        self._totals_of: tuple[MicroBatches, WindowTotals] | None = None
        self.requests: RequestSource | None = None
        self.requested = Request.none  # by any rank, in the latest rows
        self.padding: Any = None  # a micro-batch to compute with gradient 0 if this rank has none
        self.rows_sent = 0  # how many rows were exchanged so far
        self._newest: PendingRows | None = None  # the latest rows
        # this rank's reason for the latest window that it refused
        self._why: Exception | None = None
        self._refusing: list[int] = []  # the ranks that could not count it

    def handshake(self, window: MicroBatches) -> None:
        """Agree on the objective's terms and announce the first window; later calls do nothing.

        One rank's first micro-batch is broadcast to ranks that have none, for use as padding.

        Raises:
            ConfigError: on all ranks, if their objectives have different terms, or if a rank cannot
                count its micro-batches.
        """
        if self.terms is not None:
            return
        first, own, why = None, None, None
        totals: tuple[int, list[float]] = (REFUSED, [])
        try:
            first = window.peek()
            own = None if first is None else list(denominators_of(self._objective, first))
            totals = self._totals(window, own or [])
        except Exception as error:
            why = error
        gathered = self._world.gather_objects((own, totals, why and in_one_line(why)))
        self._refuse({rank: row[2] for rank, row in enumerate(gathered) if row[2]}, why)
        having = [rank for rank, (terms, _, _) in enumerate(gathered) if terms is not None]
        terms = (gathered[having[0]][0] if having else None) or []
        if any(gathered[rank][0] != terms for rank in having):
            named = {rank: gathered[rank][0] for rank in having}
            raise ConfigError(
                f"Ranks have objectives with different terms: {named}. Use the same objective on "
                "all ranks."
            )
        rows = [
            [float(count), *(totals or [0.0] * len(terms))] for _, (count, totals), _ in gathered
        ]
        if having:
            self.terms = terms
            received = (
                self._world.broadcast_object(first, having[0])
                if len(having) < self._world.size
                else None
            )
            self.padding = received if first is None else first
        self._record_totals(window, rows)

    def totals_of(self, window: MicroBatches) -> WindowTotals:
        """Return the totals of a window over all ranks.

        They were exchanged one window ago, or are exchanged now if some rank did not know this
        window then. From now on, later windows of the same loader are announced here before the
        loader yields them.

        Raises:
            ConfigError: on all ranks, if one cannot count its micro-batches; on this rank, if other
                ranks are not at the beginning of a window.
        """
        if window.source is not None:
            window.source.announcer = self
        if self._totals_of is None or self._totals_of[0] is not window:
            if self._world.group is None:  # one process
                count, totals = self._totals(window, self.terms or [])
                self._record_totals(window, [[float(count), *totals]])
            else:
                self._read(self.start(window, asks=False))  # requests are sent with the last row
        if self._totals_of is None or self._totals_of[0] is not window:
            self._refuse(
                dict.fromkeys(self._refusing, "The error on that rank says why."), self._why
            )
            raise ConfigError(
                f"Rank {self._world.rank} is starting a window while other ranks are finishing "
                "one. Every rank must loop over the same windows and pass each to "
                "Accumulator.step; to inspect a micro-batch on one rank, read it from the loader."
            )
        return self._totals_of[1]

    def skip(self, upcoming: MicroBatches | None) -> None:
        """Exchange the row of a window of which nothing is computed."""
        self._read(self.start(upcoming))

    def start(
        self,
        upcoming: MicroBatches | None,
        sums: Tensor | None = None,
        norm_share: Tensor | None = None,
        *,
        asks: bool = True,
    ) -> PendingRow:
        """Start to exchange this rank's row, without waiting for it.

        Args:
            upcoming: the next window, or None if this rank does not know it yet; then it is
                announced later.
            sums: this rank's loss sums of the current window, [micro-batches, terms] float64.
            norm_share: this rank's share of the squared gradient norm, [] float64, if gradients are
                sharded.
            asks: whether to read and send what this rank asks of all ranks.
        """
        self.rows_sent += 1
        terms = self.terms or []
        try:
            count, totals = self._totals(upcoming, terms)
        except Exception as error:  # all ranks refuse the window together when it begins
            self._why, count, totals = error, REFUSED, [0.0] * len(terms)
        request = self.requests.request() if asks and self.requests is not None else Request.none
        known, measured = [float(count), *totals, float(request.value)], []
        if norm_share is None:
            known.append(0.0)
        else:
            measured.append(norm_share[None])
        if sums is None:
            known += [0.0] * (len(terms) + 1)
        elif len(sums):
            # x * 0 is nan if x is not finite, and argmax returns the index of the first nan.
            measured += [sums.sum(dim=0), (sums * 0.0).sum(dim=1).argmax(dim=0, keepdim=True)]
        else:
            measured.append(sums.new_zeros(len(terms) + 1))
        return PendingRow(
            self._world.gather_rows(known, measured), upcoming, norm_share is not None
        )

    def finish(self, pending: PendingRow, own_norm: Tensor) -> StepStats:
        """Wait for all rows and return how the current window went.

        The totals of the upcoming window are kept for `totals_of`.

        Args:
            pending: what `start` returned.
            own_norm: the squared norm of all gradients, [] float64; ignored if the rows contain
                shares of it.
        """
        rows, own = self._read(pending, own_norm)
        num_terms = len(self.terms or [])
        shares = [row[3 + num_terms : -1] for row in rows]  # loss sums by rank
        sums = [sum(column) for column in zip(*shares, strict=True)]
        squared = sum(row[2 + num_terms] for row in rows) if pending.norm_rides else own[0]
        grad_norm = math.sqrt(squared) if squared >= 0 else math.nan
        trouble = (
            None
            if math.isfinite(grad_norm)
            else f"gradient norm {grad_norm}, though every loss was finite"
        )
        broken = [rank for rank, share in enumerate(shares) if not all(map(math.isfinite, share))]
        if broken:
            rank, micro_batch = broken[0], int(rows[broken[0]][-1])
            number = micro_batch * len(rows) + rank
            trouble = (
                f"loss not finite on rank {rank}, its micro-batch {micro_batch} (global {number})"
            )
        return StepStats(sums, grad_norm, trouble, loss_finite=not broken)

    def out_of_memory_ranks(self, out_of_memory: bool) -> list[int]:
        """Return the ranks that ran out of memory in the current window; every rank must call it.

        It takes one more small collective.

        Args:
            out_of_memory: whether this rank ran out of memory.
        """
        self.rows_sent += 1
        rows, _ = self._world.gather_rows(
            [float(out_of_memory)] + [0.0] * (3 + 2 * len(self.terms or []))
        ).read()
        return [rank for rank, row in enumerate(rows) if row[0]]

    def reset(self) -> None:
        """Forget what was announced, so that after an exception it is exchanged once more."""
        self._totals_of = None

    def traffic(self, rows: int) -> Traffic:
        """Return what exchanging this many rows sends."""
        sent = consensus(self._world.size, len(self.terms or [SINGLE_TERM]), rows)
        return Traffic.total([] if self._world.group is None else [sent])

    def _read(self, pending: PendingRow, *scalars: Tensor) -> tuple[list[list[float]], list[float]]:
        """Wait for the rows, and return them and further scalars; keep requests and totals."""
        rows, own = pending.shared.read(*scalars)
        # gloo's thread holds the table for a moment longer. If the last reference here were dropped
        # now, that thread would free the table, which ends the process while the interpreter exits.
        self._newest = pending.shared if self._world.group is not None else None
        self.requested = Request.none
        for row in rows:
            self.requested |= Request(int(row[1 + len(self.terms or [])]))
        if pending.upcoming is not None:
            self._record_totals(pending.upcoming, rows)
        return rows, own

    def _record_totals(self, window: MicroBatches, rows: list[list[float]]) -> None:
        """Keep the totals of a window from all ranks' rows, if every rank knows the window."""
        counts = [int(row[0]) for row in rows]
        if min(counts) < 0:
            self._refusing = [rank for rank, count in enumerate(counts) if count == REFUSED]
            return  # some rank does not know it yet
        if window.source is not None and window.source.whole and min(counts) == 0:
            counts, rows = [0], []  # all ranks drop this window
        denominators = {
            name: sum(row[1 + i] for row in rows) for i, name in enumerate(self.terms or [])
        }
        window.rounds = max(counts)
        self._totals_of = (
            window,
            WindowTotals(Denominator(denominators), max(counts), sum(counts)),
        )

    def _refuse(self, refusing: Mapping[int, str], own: Exception | None) -> None:
        """Raise on all ranks if some cannot count their window; those raise their own error."""
        if self._world.rank in refusing and own is not None:
            raise own
        for rank, why in refusing.items():
            raise ConfigError(f"The micro-batches of rank {rank} cannot be counted. {why}")

    def _totals(self, window: MicroBatches | None, terms: list[str]) -> tuple[int, list[float]]:
        """Return this rank's number of micro-batches in a window and their denominators by term.

        Raises:
            ConfigError: for denominators that are not valid numbers, and for terms that differ
                between micro-batches.
        """
        if window is None:
            return UNKNOWN, [0.0] * len(terms)
        if window.denominators is not None:
            denominators = [
                checked_denominators(denominator) for denominator in window.denominators
            ]
        else:
            denominators = [denominators_of(self._objective, micro_batch) for micro_batch in window]
        strange = [
            list(denominator) for denominator in denominators if denominator.keys() != set(terms)
        ]
        if strange and terms:
            raise ConfigError(
                "The objective's denominator must have the same terms for every micro-batch: "
                f"{terms}, but one has {strange[0]}."
            )
        return len(window), [
            math.fsum(denominator[name] for denominator in denominators) for name in terms
        ]
