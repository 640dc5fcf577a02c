"""Seconds of a step, worked out by hand: one message takes a microsecond a byte, a micro-batch 0.3
s, its backward 0.2 s."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from spread import setup, shapes_of

from distaccum.errors import ConfigError
from distaccum.planner.hardware import KINDS, HardwareProfile, LinkTimings
from distaccum.planner.shapes import ROOT, ModelShape, ParameterShape, Setup
from distaccum.planner.step_time import StepTime, step_time
from distaccum.planner.traffic import ddp_buckets, gradient_sends

F32 = torch.float32
LINK = LinkTimings((1_000, 1_001_000), (0.001, 1.001))  # 1 us a byte; 1 ms for small ones
MACHINE = HardwareProfile(
    "cpu", 1, "-", "fp32", 0.1, 1e9, 1e-6, 2, dict.fromkeys(KINDS, LINK), False, {}, "-"
)
FLOPS = 200_000_000  # 0.2 s; with the overhead of 0.1 s a micro-batch takes 0.3 s
# 200,000, 100,000 and 100,000 bytes: DDP's buckets take them from the back.
MODEL = ModelShape(
    (
        ParameterShape("root", (50_000,), F32, True, ROOT),
        ParameterShape("first", (25_000,), F32, True, 0),
        ParameterShape("second", (25_000,), F32, True, 1),
    ),
    0,
)
ONE_EACH = 100_000 / 2**20  # MiB in a bucket, so that each parameter fills one
CONTROL = 0.001  # the small all-reduce of 2 x 6 float64


def told(
    one: Setup,
    num_micro_batches: int,
    overlap: int = 1,
    machine: HardwareProfile = MACHINE,
    flops: int = FLOPS,
) -> StepTime:
    return step_time(machine, MODEL, one, num_micro_batches, flops, overlap)


def ddp(sync: Any = "boundary", ranks: int = 2, **changes: Any) -> Setup:
    return setup("ddp", sync, ranks, **{"bucket_mb": ONE_EACH, **changes})


def test_one_process_computes_and_updates() -> None:
    """4 micro-batches of 0.3 s; 100,000 numbers of 1 us."""
    time = told(setup("single", "boundary", 1), 4)
    assert time == StepTime(pytest.approx(1.2), 0.0, 0.0, pytest.approx(0.1))
    assert time.total_s == pytest.approx(1.3)


def test_ddp_hides_buckets_behind_the_last_backward() -> None:
    """Buckets of 0.1, 0.1 and 0.2 s are ready at 0.05, 0.1 and 0.2 s of the backward: they travel
    from 0.05 to 0.15, 0.15 to 0.25 and 0.25 to 0.45 s. The backward ends at 0.2 s.
    """
    time = told(ddp(), 4)
    assert time.exposed_s == pytest.approx(0.25 + CONTROL)
    assert time.hidden_s == pytest.approx(0.15)
    assert time.total_s == pytest.approx(1.2 + 0.25 + CONTROL + 0.1)


def test_ddp_with_one_bucket_hides_nothing() -> None:
    time = told(ddp(bucket_mb=25), 4)
    assert time.exposed_s == pytest.approx(0.4 + CONTROL)
    assert time.hidden_s == pytest.approx(0)


def test_ddp_hides_more_behind_two_backwards() -> None:
    """Ready at 0.1, 0.2 and 0.4 of 0.4 s; on the link from 0.1, 0.2 and 0.4 s on, the last one
    until 0.6 s."""
    assert told(ddp(), 4, overlap=2).exposed_s == pytest.approx(0.2 + CONTROL)
    assert told(ddp(), 2, overlap=8) == told(ddp(), 2, overlap=2)


def test_ddp_in_each_micro_batch() -> None:
    """The same with both micro-batches, whatever T is."""
    time = told(ddp("every"), 2, overlap=2)
    assert time.exposed_s == pytest.approx(2 * 0.25 + CONTROL)
    assert time.hidden_s == pytest.approx(2 * 0.15)


def test_own_sums_travel_after_the_window() -> None:
    assert told(ddp(accumulate=torch.float64), 4).exposed_s == pytest.approx(0.4 + CONTROL)


def test_a_shortage_of_memory_is_agreed_on_by_a_second_small_collective() -> None:
    for strategy, overlaps in (("ddp", False), ("fsdp", False), ("fsdp", True)):
        one = ddp(accumulate=torch.float64) if strategy == "ddp" else setup("fsdp", "boundary", 2)
        machine = replace(MACHINE, overlaps=overlaps)
        alone, apart = (
            told(replace(one, apart=both), 4, machine=machine) for both in (False, True)
        )
        assert apart.exposed_s - alone.exposed_s == pytest.approx(CONTROL)


def test_which_parameters_were_used_is_told_by_12_bytes() -> None:
    """With find_unused_parameters: 3 int32, at the latency of 1 ms."""
    plain, unused = told(ddp(), 4), told(ddp(find_unused_parameters=True), 4)
    assert unused.exposed_s - plain.exposed_s == pytest.approx(0.001)


@pytest.mark.parametrize(
    ("sync", "exposed"),
    [
        # Gathered per micro-batch: the root once and the blocks twice, 600,000 bytes; gradients are
        # 400,000.
        ("boundary", 2 * 0.6 + 0.4),
        ("gather_once", 0.4 + 0.4),
        ("every", 2 * 0.6 + 2 * 0.4),
    ],
)
def test_fsdp_blocks_on_cpus(sync: Any, exposed: float) -> None:
    time = told(setup("fsdp", sync, 2), 2)
    assert time.exposed_s == pytest.approx(exposed + CONTROL)
    assert time.hidden_s == 0
    assert time.update_s == pytest.approx(0.05)  # each rank updates its half


@pytest.mark.parametrize(
    ("num_micro_batches", "exposed"),
    [
        (1, 0.6 + 0.4 - 0.3),  # gathers and scatters beside one micro-batch of 0.3 s
        (3, 0.6 + 0.4 - 0.3 + 2 * (0.6 - 0.3)),  # two more, which gather
    ],
)
def test_fsdp_hides_behind_its_own_micro_batch_where_collectives_run_beside(
    num_micro_batches: int, exposed: float
) -> None:
    machine = replace(MACHINE, overlaps=True)
    time = told(setup("fsdp", "boundary", 2), num_micro_batches, machine=machine)
    assert time.exposed_s == pytest.approx(exposed + CONTROL)
    slow = told(
        setup("fsdp", "boundary", 2), num_micro_batches, machine=machine, flops=5_000_000_000
    )
    assert slow.exposed_s == pytest.approx(CONTROL)


def test_hsdp_reduces_within_and_between() -> None:
    """2 x 2: gathers of 0.6 s and scatters of 0.4 s between 2; shards of 200,000 bytes between 2;
    control among 4."""
    time = told(setup("hsdp", "boundary", 4), 1)
    assert time.exposed_s == pytest.approx(0.6 + 0.4 + 0.2 + 2 * CONTROL)


def test_a_ring_of_more_ranks() -> None:
    """Of 400,000 bytes 3/4 a pass in place of 1/2: 1.5 times as long, but for the latency of 1 ms,
    which is twice."""
    time = told(ddp(ranks=4, bucket_mb=25), 1)
    assert time.exposed_s == pytest.approx(1.5 * (0.4 - 0.001) + 2 * 0.001 + 2 * CONTROL)


def test_a_machine_of_one_rank_knows_no_link() -> None:
    with pytest.raises(
        ConfigError, match=r"measured on 1 rank\(s\), so it has no speed of all_reduce for 2 ranks"
    ):
        told(ddp(), 1, machine=replace(MACHINE, ranks=1, links={}))
    assert (
        told(setup("fsdp", "boundary", 1), 1, machine=replace(MACHINE, ranks=1, links={})).exposed_s
        == 0
    )


@pytest.mark.parametrize("bucket_mb", [25, 0.004, 0.0005])
def test_buckets_are_those_of_the_forecast(bucket_mb: float) -> None:
    shapes, one = shapes_of("gpt", F32), setup("ddp", "boundary", 2, bucket_mb=bucket_mb)
    (forecast,) = gradient_sends(shapes, one, 4)
    filled = ddp_buckets(shapes, one)
    assert (len(filled), sum(filled)) == (forecast.count, forecast.num_bytes)
