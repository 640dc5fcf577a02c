"""What a window sends: the forecast, the ledger's count, and counts made by others agree."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from setting import make_micro_batch, make_model, masked_objective, wrap
from worlds import World

import distaccum as da

WINDOWS = 3
MICRO_BATCHES = 4


def count(strategy: str, mesh: tuple[int, ...], policy: str) -> list[dict[str, int]]:
    """Collectives per window of `da.windows` as gloo itself reports them to torch's profiler,
    beside the ledger."""
    model = wrap(make_model(), strategy, mesh)
    accumulator = da.Accumulator(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        masked_objective(),
        sync=policy,
        audit="always",
    )
    loader = [make_micro_batch(i + 100 * dist.get_rank()) for i in range(WINDOWS * MICRO_BATCHES)]
    found = []
    for window in da.windows(loader, gradient_accumulation_steps=MICRO_BATCHES):
        watched = len(found) > 0  # before the first window the ranks met
        profiler = torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True
        )
        with profiler if watched else nullcontext() as profile:
            record = accumulator.step(window)
            dist.barrier()  # gloo's threads write down an event after its collective is done
        assert record.verdict is not None
        assert record.verdict.agrees
        if profile is not None:
            # gloo makes an all-reduce of a reduce-scatter and reports it as such, so that the two
            # are counted together.
            names = [
                event.name.removeprefix("gloo:")
                for event in profile.events()
                if event.name.startswith("gloo:")
            ]
            counted = record.verdict.counted.counts
            assert sum("all_gather" in name for name in names) == counted["all_gather"]
            assert (
                sum("reduce" in name for name in names)
                == counted["all_reduce"] + counted["reduce_scatter"]
            )
        found.append(dict(record.verdict.counted.counts))
    return found[1:]


def per_window(**counts: int) -> list[dict[str, int]]:
    return [counts] * (WINDOWS - 1)


# One all-reduce more than the gradients need carries the control numbers. The root has no
# parameters of its own here, so that three groups gather and reduce; each is gathered again for its
# backward under `boundary` and `every`.
EXPECTED = {
    ("ddp", (), "boundary"): per_window(all_reduce=1 + 1),
    ("ddp", (), "every"): per_window(all_reduce=MICRO_BATCHES + 1),
    ("fsdp", (4,), "boundary"): per_window(
        all_gather=3 * 2 * MICRO_BATCHES, reduce_scatter=3, all_reduce=1
    ),
    ("fsdp", (4,), "gather_once"): per_window(all_gather=3, reduce_scatter=3, all_reduce=1),
    ("fsdp", (4,), "every"): per_window(
        all_gather=3 * 2 * MICRO_BATCHES, reduce_scatter=3 * MICRO_BATCHES, all_reduce=1
    ),
    ("hsdp", (2, 2), "boundary"): per_window(
        all_gather=3 * 2 * MICRO_BATCHES, reduce_scatter=3, all_reduce=3 + 1
    ),
    ("hsdp", (2, 2), "gather_once"): per_window(all_gather=3, reduce_scatter=3, all_reduce=3 + 1),
    ("hsdp", (2, 2), "reduce_scatter"): per_window(
        all_gather=3 * 2 * MICRO_BATCHES, reduce_scatter=3 * MICRO_BATCHES, all_reduce=3 + 1
    ),
    ("hsdp", (2, 2), "every"): per_window(
        all_gather=3 * 2 * MICRO_BATCHES,
        reduce_scatter=3 * MICRO_BATCHES,
        all_reduce=3 * MICRO_BATCHES + 1,
    ),
}


@pytest.mark.parametrize(("strategy", "mesh", "policy"), EXPECTED, ids=lambda value: str(value))
def test_collectives_per_window(
    four_ranks: World, strategy: str, mesh: tuple[int, ...], policy: str
) -> None:
    assert four_ranks.run(count, strategy, mesh, policy) == [EXPECTED[strategy, mesh, policy]] * 4


def many_buckets(policy: str, num_micro_batches: int = 3) -> list[int]:
    """All-reduces in each of three windows of a model whose gradients fill several buckets."""
    model = wrap(make_model(), "ddp", (), bucket_cap_mb=1e-4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    accumulator = da.Accumulator(model, optimizer, masked_objective(), sync=policy, audit="always")
    records = [
        accumulator.step([make_micro_batch(i) for i in range(num_micro_batches)]) for _ in range(3)
    ]
    return [
        record.verdict.counted.counts["all_reduce"]
        for record in records
        if record.verdict is not None
    ]


def test_buckets_that_ddp_arranges_anew_after_its_first_reduction(two_ranks: World) -> None:
    for counts in two_ranks.run(many_buckets, "every"):
        # the ledger agreed with each, also with the first, whose layouts differ
        assert len(counts) == 3
        assert counts[1] == counts[2] > 3 * 2
    for num_micro_batches in (1, 2, 4):
        for policy in ("boundary", "every"):
            for counts in two_ranks.run(many_buckets, policy, num_micro_batches):
                assert len(counts) == 3


def gradient_bytes() -> tuple[int, int]:
    model = wrap(make_model(), "ddp", ())
    accumulator = da.Accumulator(
        model, torch.optim.SGD(model.parameters(), lr=0.1), masked_objective(), audit="always"
    )
    record = accumulator.step([make_micro_batch(i) for i in range(3)])
    assert record.verdict is not None
    control = accumulator.control_traffic().bytes["all_reduce"]
    return record.verdict.counted.bytes["all_reduce"] - control, sum(
        p.numel() * 8 for p in model.parameters()
    )


def test_each_gradient_byte_crosses_once(four_ranks: World) -> None:
    for sent, held in four_ranks.run(gradient_bytes):
        assert sent == held


def silent() -> bool:
    """`never` leaves no verdict and enters no dispatch mode."""
    model = wrap(make_model(), "ddp", ())
    seen = []

    def loss_sum(module: torch.nn.Module, micro_batch: object) -> torch.Tensor:
        from torch.utils._python_dispatch import _get_current_dispatch_mode

        seen.append(_get_current_dispatch_mode())
        return masked_objective().loss_sum(module, micro_batch)  # type: ignore[return-value]

    objective = da.Objective(loss_sum, masked_objective().denominator)
    accumulator = da.Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1), objective)
    record = accumulator.step([make_micro_batch(1)])
    return record.verdict is None and set(seen) == {None}


def test_off_it_costs_nothing(four_ranks: World) -> None:
    assert four_ranks.run(silent) == [True] * 4
