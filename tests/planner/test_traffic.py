"""Collectives and bytes of a step: by hand, and against the forecast and the ledger of real wrapped models."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from spread import OBJECTIVE, accumulator_for, make_micro_batch, make_model, make_optimizer, setup, shapes_of, spread
from worlds import World

from distaccum.grads import accumulate
from distaccum.parallel.ledger import Ledger
from distaccum.planner import CollectiveCost, Setup, by_kind, control_sends, gradient_sends
from distaccum.planner import traffic as predicted_traffic

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
MICRO_BATCHES = 2


def sent(name: str, chosen: list[tuple[Setup, torch.dtype]]) -> list[dict[str, Any]]:
    """Forecast and count of the second window, when DDP has arranged its buckets."""
    found = []
    for one, dtype in chosen:
        model = spread(make_model(name).to(dtype), one)
        accumulator = accumulator_for(model, one, make_optimizer("sgd", 0.0, model), OBJECTIVE.loss_sum)
        window = [make_micro_batch() for _ in range(MICRO_BATCHES)]
        accumulator.step(window)
        with Ledger() as ledger:
            accumulator.step(window)
        forecast, counted = accumulator.strategy.forecast(MICRO_BATCHES), ledger.traffic
        found.append(
            {
                "forecast": {kind: (n, forecast.bytes[kind]) for kind, n in forecast.counts.items()},
                "counted": {kind: (n, counted.bytes[kind]) for kind, n in counted.counts.items()},
            }
        )
    return found


def check(world: World, name: str, chosen: list[tuple[Setup, torch.dtype]], off_by: int = 0) -> None:
    """Bytes and counts, of which the forecast's may be off by so many."""
    for found in world.run(sent, name, chosen):
        for (one, dtype), real in zip(chosen, found, strict=True):
            gradients = gradient_sends(shapes_of(name, dtype), one, MICRO_BATCHES)
            predicted = by_kind(gradients)
            if off_by:
                assert all(abs(n - real["forecast"][kind][0]) <= off_by for kind, (n, _) in predicted.items())
                gradients = tuple(replace(entry, count=0) for entry in gradients)
                real = {which: {k: (0, size) for k, (_, size) in found.items()} for which, found in real.items()}
                predicted = by_kind(gradients)
            assert predicted == real["forecast"], (one, dtype)
            # Windows that are passed as lists are not known ahead: each asks for its own row, and for how it went.
            control = control_sends(one.world_size, num_terms=1, rows=2)
            control = tuple(replace(entry, count=0) for entry in control) if off_by else control
            assert by_kind([*gradients, *control]) == real["counted"], (one, dtype)


def sharded_cases(size: int) -> list[tuple[Setup, torch.dtype]]:
    chosen = [("fsdp", policy) for policy in ("boundary", "gather_once", "every")]
    chosen += [("hsdp", policy) for policy in ("boundary", "gather_once", "every", "reduce_scatter")]
    changes = [({}, F32), ({}, BF16), ({"compute": BF16}, F32), ({"reshard_after_forward": False}, F32)]
    return [(setup(name, policy, size, **change), dtype) for name, policy in chosen for change, dtype in changes]


def test_sharded_on_two_ranks(two_ranks: World) -> None:
    check(two_ranks, "gpt", sharded_cases(2))


def test_sharded_on_four_ranks(four_ranks: World) -> None:
    check(four_ranks, "odd", [*sharded_cases(4), (setup("hsdp", "reduce_scatter", 4, replicas=4), F32)])


@pytest.mark.parametrize(("name", "off_by"), [("gpt", 0), ("odd", 2)])
def test_ddp(two_ranks: World, name: str, off_by: int) -> None:
    """The odd model uses its first parameter last: one bucket of its own in each of two micro-batches."""
    plain = [setup("ddp", policy, 2, bucket_mb=mb) for policy in ("boundary", "every") for mb in (25, 0.004, 0.0005)]
    unused = [replace(one, find_unused_parameters=True) for one in plain]
    own = [setup("ddp", policy, 2, accumulate=F64) for policy in ("boundary", "every")]
    chosen = [(one, F32) for one in [*plain, *unused, *own]] + [(own[0], BF16), (plain[0], BF16)]
    check(two_ranks, name, chosen, off_by)


def test_large_messages_of_our_own() -> None:
    """GPT-2's shapes in bf16 would take minutes here; the rule that fills messages is compared instead."""
    sizes = [7 * 2**20, 30 * 2**20, 1, 25 * 2**20, 24 * 2**20, 2 * 2**20, 3]
    expected = len(accumulate._buckets(sizes))
    cap = predicted_traffic.OWN_BUCKET_BYTES
    assert cap == accumulate.BUCKET_BYTES
    assert predicted_traffic._filled(sizes[::-1], cap) == expected == 4


def test_one_process_sends_nothing() -> None:
    assert gradient_sends(shapes_of("odd", F32), setup("single", "boundary", 1), MICRO_BATCHES) == ()


def test_what_a_network_card_sends() -> None:
    """Ring algorithm on 4 ranks: 3/4 of a message for a scatter or a gather, 6/4 for an all-reduce."""
    assert CollectiveCost("", "reduce_scatter", 1, 400, 4).bytes_sent_per_rank == 300
    assert CollectiveCost("", "all_gather", 5, 400, 4).bytes_sent_per_rank == 300
    assert CollectiveCost("", "all_reduce", 1, 400, 4).bytes_sent_per_rank == 600
    assert CollectiveCost("", "all_reduce", 1, 400, 1).bytes_sent_per_rank == 0


def test_control_row() -> None:
    """64 ranks with one term: 64 rows of 5 float64."""
    assert by_kind(control_sends(64, num_terms=1)) == {"all_reduce": (1, 64 * 6 * 8)}
