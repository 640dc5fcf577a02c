"""Evaluates a model on the validation samples."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from distaccum.core.loss import SupportsObjective, denominators_of, sums_of
from distaccum.core.plan import Plan
from distaccum.data.base import Dataset
from distaccum.data.device import to_device
from distaccum.parallel.base import Strategy


@dataclass(frozen=True)
class Validation:
    """Holds the validation samples, the same in every evaluation, and how to evaluate them."""

    dataset: Dataset
    plan: Plan  # its first window holds the samples that are evaluated
    objective: SupportsObjective  # its first term is the loss


def evaluate(strategy: Strategy, validation: Validation) -> dict[str, float]:
    """Return the mean of each term of the objective over the validation samples.

    The mean is a term's sum over all samples divided by its denominator; it does not depend on the
    world size. Call it on every rank: the ranks share the micro-batches and run the same number of
    forwards.

    Returns:
        The mean by term, without the terms whose denominator is 0.
    """
    world, window, objective = strategy.world, validation.plan.window(), validation.objective
    micro_batches = window.micro_batches
    own = micro_batches[world.rank :: world.size]
    denominators: dict[str, float] = {}
    # [terms] float64, on the device until the end, so that the host does not wait
    totals: torch.Tensor | None = None
    with strategy.evaluating() as model:
        for index in range(-(-len(micro_batches) // world.size)):
            counted = index < len(own)
            # A rank without a micro-batch of its own runs a forward all the same, and its sums are
            # set to zero.
            micro_batch = own[index] if counted else micro_batches[0]
            batch = validation.dataset.batch(
                validation.plan.samples(micro_batch), torch.Generator()
            )
            own_denominators = denominators_of(objective, batch)
            sums_by_term = sums_of(
                objective, model, to_device(batch, world.device), [*own_denominators]
            )
            sums = torch.stack([value.double() for value in sums_by_term])
            if not counted:
                sums = torch.zeros_like(sums)
                own_denominators = dict.fromkeys(own_denominators, 0.0)
            totals = sums if totals is None else totals + sums
            denominators = {
                term: denominators.get(term, 0.0) + count
                for term, count in own_denominators.items()
            }
    assert totals is not None
    rows, _ = world.gather_rows([*denominators.values()], [totals]).read()
    summed = [math.fsum(row[i] for row in rows) for i in range(2 * len(denominators))]
    pairs = zip(denominators, summed[: len(denominators)], summed[len(denominators) :], strict=True)
    return {term: value / denominator for term, denominator, value in pairs if denominator > 0}
