"""Held-out samples, and the loss over them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from distaccum.core.loss import SupportsObjective, sums_of, weights_of
from distaccum.core.plan import Plan
from distaccum.data.base import Dataset
from distaccum.data.device import to_device
from distaccum.parallel.base import Strategy


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
    micros = window.micros
    own = micros[world.rank :: world.size]
    weights: dict[str, float] = {}
    totals: torch.Tensor | None = None  # [terms] float64, on the device until the end: the host does not wait for it
    with strategy.evaluating() as model:
        for index in range(-(-len(micros) // world.size)):
            counts = index < len(own)
            micro = own[index] if counts else micros[0]  # as many forwards as other ranks
            batch = heldout.dataset.batch(heldout.plan.samples(micro), torch.Generator())
            weighed = weights_of(objective, batch)
            sums_by_term = sums_of(objective, model, to_device(batch, world.device), [*weighed])
            sums = torch.stack([value.double() for value in sums_by_term])
            if not counts:
                sums, weighed = torch.zeros_like(sums), dict.fromkeys(weighed, 0.0)
            totals = sums if totals is None else totals + sums
            weights = {term: weights.get(term, 0.0) + weight for term, weight in weighed.items()}
    assert totals is not None
    rows, _ = world.share([*weights.values()], [totals]).read()
    summed = [math.fsum(row[i] for row in rows) for i in range(2 * len(weights))]
    pairs = zip(weights, summed[: len(weights)], summed[len(weights) :], strict=True)
    return {term: value / weight for term, weight, value in pairs if weight > 0}
