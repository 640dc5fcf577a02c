"""Held-out samples, and the loss over them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from distaccum.data.base import Dataset
from distaccum.data.device import to_device
from distaccum.loss import SupportsObjective, sums_of, weights_of
from distaccum.parallel.base import Strategy
from distaccum.plan import Plan


@dataclass(frozen=True)
class Heldout:
    """Held-out samples, always the same ones, and how to read them."""

    dataset: Dataset
    plan: Plan  # its first window is what is evaluated
    objective: SupportsObjective  # its first term is the loss


def evaluate(strategy: Strategy, heldout: Heldout) -> dict[str, float]:
    """The weighted mean of each term of the objective over the held-out samples; the same whatever the world size.

    Call it on every rank: they share the micros, and run the same number of forwards.
    """
    world, window, objective = strategy.world, heldout.plan.window(), heldout.objective
    own = window.deal(world.rank, world.size)
    terms: list[str] = []
    totals: torch.Tensor | None = None  # [2, terms] float64: sums and weights
    with strategy.evaluating() as model:
        for index in range(len(window.deal(0, world.size))):
            counts = index < len(own)
            micro = own[index] if counts else window.micros[0]
            batch = heldout.dataset.batch(heldout.plan.samples(micro), torch.Generator())
            weights = weights_of(objective, batch)
            terms = list(weights)
            sums = sums_of(objective, model, to_device(batch, world.device), terms)
            pair = torch.stack(
                [torch.stack([s.double() for s in sums]).cpu(), torch.tensor([*weights.values()], dtype=torch.float64)]
            )
            if not counts:
                pair.zero_()
            totals = pair if totals is None else totals + pair
    assert totals is not None
    rows, _ = world.share(totals.flatten().tolist()).read()
    summed = [math.fsum(row[i] for row in rows) for i in range(2 * len(terms))]
    pairs = zip(terms, summed[: len(terms)], summed[len(terms) :], strict=True)
    return {term: value / weight for term, value, weight in pairs if weight > 0}
