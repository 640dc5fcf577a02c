"""Predicts the seconds of one step from shapes and from the measured speeds of a machine.

This is pure arithmetic: nothing runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from distaccum.core.strategies import StrategyName, Sync
from distaccum.core.traffic import Collectives
from distaccum.errors import ConfigError
from distaccum.planner.hardware import HardwareProfile
from distaccum.planner.shapes import ModelShape, Setup
from distaccum.planner.traffic import control_sends, ddp_buckets, gradient_sends

# The share of the backward in a micro-batch: two matrix products for each one of the forward.
BACKWARD = 2 / 3


@dataclass(frozen=True)
class StepTime:
    """Holds the seconds of one step on the slowest rank, part by part.

    Time to read samples is not included.
    """

    compute_s: float  # forwards and backwards of all micro-batches
    exposed_s: float  # communication that does not overlap computation
    hidden_s: float  # communication that overlaps computation; not part of the total
    update_s: float  # gradient norm, clipping, optimizer

    @property
    def total_s(self) -> float:
        """Return the seconds of the whole step."""
        return self.compute_s + self.exposed_s + self.update_s


def step_time(
    machine: HardwareProfile,
    model: ModelShape,
    setup: Setup,
    num_micro_batches: int,
    micro_batch_flops: int,
    overlap_micro_batches: int = 1,
) -> StepTime:
    """Compute the time of one step as the sum of the parts that do not overlap.

    DDP sends a bucket as soon as the last backward has completed it. Gradients are assumed to
    arrive in the reverse order of the parameters, in proportion to their bytes, and the link to
    carry one message after another. The time that messages take after the end of the backward is
    exposed. If the last T micro-batches are computed block by block, T backwards overlap the
    messages. The gradient sums that distaccum keeps itself are sent after the window, so their
    communication is exposed.

    If `machine.overlaps` is False, FSDP2's collectives block, and all are exposed. If it is True,
    the collectives of a micro-batch overlap its computation, up to its duration. This was not
    measured on any GPU.

    The rates were measured among `machine.ranks` ranks. Another number of ranks R is assumed to
    form a ring, in which the rate of a network card stays the same: a message costs (R - 1) / R of
    a whole pass (Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms", 2009). Latency is
    assumed to grow with log2 R, as in a tree. Links inside nodes and between nodes are not
    distinguished, so profile on the ranks that will train.

    Args:
        machine: the speeds, measured with this model in this precision.
        model: the shapes of the model, from `describe`.
        setup: how the model is distributed.
        num_micro_batches: micro-batches per rank; if ranks differ, those of the rank with the most.
        micro_batch_flops: FLOPs of the forward and backward of one micro-batch, counted by
            `planner.trace`, as `distaccum profile` counts them.
        overlap_micro_batches: T, see step/overlap/tail.py; at most `num_micro_batches` are used.

    Raises:
        ConfigError: if there are several ranks and links were not measured.
    """
    micro_batch_s = machine.micro_batch_overhead_s + micro_batch_flops / machine.flops_per_s
    compute_s = num_micro_batches * micro_batch_s
    numbers = sum(p.shard(setup.shards) for p in model.trained)
    sent_s = _carried_s(
        machine, gradient_sends(model, setup, num_micro_batches) + control_sends(setup)
    )
    if setup.strategy is StrategyName.single:
        exposed_s = 0.0
    elif setup.sharded:
        exposed_s = _sharded(machine, model, setup, num_micro_batches, micro_batch_s, sent_s)
    else:
        exposed_s = _replicated(
            machine, model, setup, num_micro_batches, micro_batch_s, sent_s, overlap_micro_batches
        )
    return StepTime(compute_s, exposed_s, sent_s - exposed_s, machine.update_s_per_number * numbers)


def _sharded(
    machine: HardwareProfile,
    model: ModelShape,
    setup: Setup,
    num_micro_batches: int,
    micro_batch_s: float,
    sent_s: float,
) -> float:
    """Return the exposed seconds of communication in one step under FSDP2."""
    if not machine.overlaps:
        return sent_s
    # `one` is the time of a window of one micro-batch, which sends everything once. `two - one` is
    # the time of what each further micro-batch sends.
    one, two = (_carried_s(machine, gradient_sends(model, setup, n)) for n in (1, 2))
    others_s = (num_micro_batches - 1) * max(0.0, two - one - micro_batch_s)
    return others_s + max(0.0, one - micro_batch_s) + _carried_s(machine, control_sends(setup))


def _replicated(
    machine: HardwareProfile,
    model: ModelShape,
    setup: Setup,
    num_micro_batches: int,
    micro_batch_s: float,
    sent_s: float,
    overlap_micro_batches: int,
) -> float:
    """Return the exposed seconds of communication in one step under DDP."""
    if setup.own_sums(model) or setup.world_size == 1:
        return sent_s
    together = 1 if setup.sync is Sync.every else min(overlap_micro_batches, num_micro_batches)
    backward_s = together * BACKWARD * micro_batch_s
    total = sum(p.nbytes for p in model.trained)
    complete = free_s = 0.0
    for num_bytes in ddp_buckets(model, setup):
        complete += num_bytes
        ready_s = backward_s * complete / total
        free_s = max(free_s, ready_s) + _message_s(
            machine, "all_reduce", num_bytes, setup.world_size
        )
    windows = num_micro_batches if setup.sync is Sync.every else 1
    gradients = gradient_sends(model, setup, num_micro_batches)[:1]
    return windows * (free_s - backward_s) + sent_s - _carried_s(machine, gradients)


def _carried_s(machine: HardwareProfile, sends: Iterable[Collectives]) -> float:
    """Return the seconds that the link needs for these messages, one after another."""
    carried = [entry for entry in sends if entry.ranks > 1]
    return sum(
        (
            one.count * _message_s(machine, one.kind, one.num_bytes / one.count, one.ranks)
            for one in carried
        ),
        0.0,
    )


def _message_s(machine: HardwareProfile, kind: str, num_bytes: float, ranks: int) -> float:
    """Return the seconds of one message, scaled from the measured number of ranks to `ranks`."""
    link = machine.links.get(kind)
    if link is None:
        raise ConfigError(
            f"The hardware profile was measured on {machine.ranks} rank(s), so it has no speed of "
            f"{kind} for {ranks} ranks. Run `distaccum profile` on two ranks or more, over the "
            "network that will be used."
        )
    hops = math.log2(ranks) / math.log2(machine.ranks)
    passes = (1 - 1 / ranks) / (1 - 1 / machine.ranks)
    return hops * link.latency_s + passes * max(0.0, link.message_s(num_bytes) - link.latency_s)
