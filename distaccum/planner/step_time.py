"""Seconds of one step, from shapes and from what a machine was measured to do. Pure arithmetic: nothing runs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from distaccum.errors import ConfigError
from distaccum.planner.hardware import Machine
from distaccum.planner.shapes import ModelShape, ParameterShape, Setup
from distaccum.planner.traffic import MIB, Sends, control_sends, gradient_sends

BACKWARD = 2 / 3  # of a micro: two products of matrices for each of the forward


@dataclass(frozen=True)
class StepTime:
    """Where the seconds of one step go, on the slowest rank. Reading samples is not among them."""

    compute_s: float  # forwards and backwards of all micros
    exposed_s: float  # communication that no computation hides
    hidden_s: float  # communication beside computation; no part of the total
    update_s: float  # norm, clipping, optimizer

    @property
    def total_s(self) -> float:
        """Of the whole step."""
        return self.compute_s + self.exposed_s + self.update_s


def step_time(
    machine: Machine, model: ModelShape, setup: Setup, num_micros: int, micro_flops: int, overlap_micros: int = 1
) -> StepTime:
    """The time of one step, as the sum of what cannot hide behind each other.

    DDP sends a bucket as soon as the last backward has completed it: gradients arrive in the reverse order of the
    parameters, in proportion to their bytes, and the link carries one message after the other. What it carries behind
    the end of the backward is exposed. With the last T micros block by block there are T backwards to hide behind.
    Sums of distaccum's own travel after the window, all exposed.

    FSDP2's collectives block where `machine.overlaps` is False: all are exposed. Where it is True those of a micro hide
    behind its computation, as far as that takes as long; that was not measured on any GPU.

    The rates are those of a link among `machine.ranks`. For R others it is taken to be a ring, which keeps the rate of
    a network card: a message costs (R - 1) / R of a whole pass (Patarasuk and Yuan, "Bandwidth optimal all-reduce
    algorithms", 2009). Its latency is taken to grow with log2 R, as that of trees does. Links inside and between nodes
    are not told apart: profile on the ranks that will train.

    Args:
        machine: measured with this model in this precision.
        model: from `describe`.
        setup: how it is spread.
        num_micros: per rank; where ranks differ, on the one that has most.
        micro_flops: of forward and backward of one micro, counted by `predict.trace` as for the machine.
        overlap_micros: T, see step/overlap/tail.py; more than there are micros are as many.

    Raises:
        ConfigError: for several ranks, where links were not measured.
    """
    micro_s = machine.micro_overhead_s + micro_flops / machine.flops_per_s
    compute_s = num_micros * micro_s
    numbers = sum(p.shard(setup.shards) for p in model.trained)
    sends = gradient_sends(model, setup, num_micros)
    if setup.world_size > 1:
        sends += _control(setup)
    sent_s = _carried_s(machine, sends)
    if setup.strategy == "single":
        exposed_s = 0.0
    elif setup.sharded:
        exposed_s = _sharded(machine, model, setup, num_micros, micro_s, sent_s)
    else:
        exposed_s = _replicated(machine, model, setup, num_micros, micro_s, sent_s, overlap_micros)
    return StepTime(compute_s, exposed_s, sent_s - exposed_s, machine.update_s_per_number * numbers)


def _sharded(
    machine: Machine, model: ModelShape, setup: Setup, num_micros: int, micro_s: float, sent_s: float
) -> float:
    if not machine.overlaps:
        return sent_s
    # A micro that is the first and the last of its window sends all there is; one more sends what each of them does.
    one, two = (_carried_s(machine, gradient_sends(model, setup, n)) for n in (1, 2))
    others_s = (num_micros - 1) * max(0.0, two - one - micro_s)
    return others_s + max(0.0, one - micro_s) + _carried_s(machine, _control(setup))


def _control(setup: Setup) -> tuple[Sends, ...]:
    """The agreement of the ranks; a shortage of memory is agreed on apart."""
    return control_sends(setup.world_size, num_terms=1, rows=1 + setup.apart)


def _replicated(
    machine: Machine,
    model: ModelShape,
    setup: Setup,
    num_micros: int,
    micro_s: float,
    sent_s: float,
    overlap_micros: int,
) -> float:
    if setup.own_sums(model) or setup.world_size == 1:
        return sent_s
    together = 1 if setup.sync == "every" else min(overlap_micros, num_micros)
    backward_s = together * BACKWARD * micro_s
    total = sum(_bytes(p) for p in model.trained)
    complete = free_s = 0.0
    for num_bytes in buckets(model, setup):
        complete += num_bytes
        ready_s = backward_s * complete / total
        free_s = max(free_s, ready_s) + _message_s(machine, "all_reduce", num_bytes, setup.world_size)
    windows = num_micros if setup.sync == "every" else 1
    gradients = gradient_sends(model, setup, num_micros)[:1]
    return windows * (free_s - backward_s) + sent_s - _carried_s(machine, gradients)


def buckets(model: ModelShape, setup: Setup) -> list[int]:
    """Bytes of DDP's buckets in the order in which they are complete: each takes gradients until it is full."""
    ordered = model.trained[::-1]
    cap = int(setup.bucket_mb * MIB)
    sizes: list[int] = []
    for dtype in dict.fromkeys(p.dtype for p in ordered):
        sizes += _filled([_bytes(p) for p in ordered if p.dtype is dtype], cap)
    return sizes


def _filled(sizes: Sequence[int], cap: int) -> list[int]:
    filled: list[int] = []
    for size in sizes:
        if not filled or filled[-1] >= cap:
            filled.append(0)
        filled[-1] += size
    return filled


def _carried_s(machine: Machine, sends: Iterable[Sends]) -> float:
    """Seconds that the link is busy with these messages, one after the other."""
    seconds = 0.0
    for entry in sends:
        if entry.ranks > 1 and entry.count:
            seconds += entry.count * _message_s(machine, entry.kind, entry.num_bytes / entry.count, entry.ranks)
    return seconds


def _message_s(machine: Machine, kind: str, num_bytes: float, ranks: int) -> float:
    """Seconds of one message among so many ranks, from what was measured among others."""
    link = machine.links.get(kind)
    if link is None:
        raise ConfigError(
            f"The machine was measured on {machine.ranks} rank(s) and has no speed of {kind} among {ranks}. Run "
            "`distaccum profile` on two ranks or more, over the network that will be used."
        )
    hops = math.log2(ranks) / math.log2(machine.ranks)
    passes = (1 - 1 / ranks) / (1 - 1 / machine.ranks)
    return hops * link.latency_s + passes * max(0.0, link.message_s(num_bytes) - link.latency_s)


def _bytes(parameter: ParameterShape) -> int:
    return parameter.numel * parameter.dtype.itemsize
