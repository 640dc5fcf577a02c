"""Collectives and bytes of a step: by hand, and against the forecast and the ledger of real wrapped
models."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from spread import (
    OBJECTIVE,
    accumulator_for,
    make_micro_batch,
    make_model,
    make_optimizer,
    setup,
    shapes_of,
    spread,
)
from worlds import World

from distaccum.core.traffic import Collectives, Traffic, consensus, fill_buckets
from distaccum.parallel.ledger import Ledger
from distaccum.planner.shapes import Setup
from distaccum.planner.traffic import gradient_sends

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
MICRO_BATCHES = 2


def sent(name: str, chosen: list[tuple[Setup, torch.dtype]]) -> list[tuple[Traffic, Traffic]]:
    """Forecast and count of the second window, when DDP has arranged its buckets."""
    found = []
    for one, dtype in chosen:
        model = spread(make_model(name).to(dtype), one)
        accumulator = accumulator_for(
            model, one, make_optimizer("sgd", 0.0, model), OBJECTIVE.loss_sum
        )
        window = [make_micro_batch() for _ in range(MICRO_BATCHES)]
        accumulator.step(window)
        with Ledger() as ledger:
            accumulator.step(window)
        found.append((accumulator.strategy.forecast(MICRO_BATCHES), ledger.traffic))
    return found


def check(
    world: World, name: str, chosen: list[tuple[Setup, torch.dtype]], off_by: int = 0
) -> None:
    """Bytes and counts, of which the forecast's may be off by so many."""
    for found in world.run(sent, name, chosen):
        for (one, dtype), (forecast, counted) in zip(chosen, found, strict=True):
            gradients = Traffic.total(gradient_sends(shapes_of(name, dtype), one, MICRO_BATCHES))
            assert gradients.bytes == forecast.bytes, (one, dtype)
            assert gradients.counts.keys() == forecast.counts.keys(), (one, dtype)
            assert all(
                abs(n - forecast.counts[kind]) <= off_by for kind, n in gradients.counts.items()
            ), (one, dtype)
            # Windows that are passed as lists are not known ahead: each asks for its own row, and
            # for how it went.
            control = Traffic.total([consensus(one.world_size, num_terms=1, rows=2)])
            assert forecast + control == counted, (one, dtype)


def sharded_cases(size: int) -> list[tuple[Setup, torch.dtype]]:
    chosen = [("fsdp", policy) for policy in ("boundary", "gather_once", "every")]
    chosen += [
        ("hsdp", policy) for policy in ("boundary", "gather_once", "every", "reduce_scatter")
    ]
    changes = [
        ({}, F32),
        ({}, BF16),
        ({"compute": BF16}, F32),
        ({"reshard_after_forward": False}, F32),
    ]
    return [
        (setup(name, policy, size, **change), dtype)
        for name, policy in chosen
        for change, dtype in changes
    ]


def test_sharded_on_two_ranks(two_ranks: World) -> None:
    check(two_ranks, "gpt", sharded_cases(2))


def test_sharded_on_four_ranks(four_ranks: World) -> None:
    check(
        four_ranks,
        "odd",
        [*sharded_cases(4), (setup("hsdp", "reduce_scatter", 4, replicas=4), F32)],
    )


@pytest.mark.parametrize(("name", "off_by"), [("gpt", 0), ("odd", 2)])
def test_ddp(two_ranks: World, name: str, off_by: int) -> None:
    """The odd model uses its first parameter last: one bucket of its own in each of two
    micro-batches."""
    plain = [
        setup("ddp", policy, 2, bucket_mb=mb)
        for policy in ("boundary", "every")
        for mb in (25, 0.004, 0.0005)
    ]
    unused = [replace(one, find_unused_parameters=True) for one in plain]
    own = [setup("ddp", policy, 2, accumulate=F64) for policy in ("boundary", "every")]
    chosen = [(one, F32) for one in [*plain, *unused, *own]] + [(own[0], BF16), (plain[0], BF16)]
    check(two_ranks, name, chosen, off_by)


def test_messages_fill_buckets() -> None:
    """A bucket takes messages until it has its size: GPT-2's shapes in bf16 would take minutes
    here."""
    mib = 2**20
    sizes = [3, 2 * mib, 24 * mib, 25 * mib, 1, 30 * mib, 7 * mib]
    assert fill_buckets(sizes, 25 * mib) == [[0, 1, 2], [3], [4, 5], [6]]


def test_one_process_sends_nothing() -> None:
    assert (
        gradient_sends(shapes_of("odd", F32), setup("single", "boundary", 1), MICRO_BATCHES) == ()
    )


def test_what_a_network_card_sends() -> None:
    """Ring algorithm on 4 ranks: 3/4 of a message for a scatter or a gather, 6/4 for an
    all-reduce."""
    assert Collectives("", "reduce_scatter", 1, 400, 4).bytes_sent_per_rank == 300
    assert Collectives("", "all_gather", 5, 400, 4).bytes_sent_per_rank == 300
    assert Collectives("", "all_reduce", 1, 400, 4).bytes_sent_per_rank == 600
    assert Collectives("", "all_reduce", 1, 400, 1).bytes_sent_per_rank == 0


def test_control_row() -> None:
    """64 ranks with one term: 64 rows of 6 float64."""
    assert Traffic.total([consensus(64, num_terms=1)]) == Traffic.of([("all_reduce", 64 * 6 * 8)])
