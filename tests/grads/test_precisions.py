"""float16 with a loss scale, parameters in bfloat16, and the dtypes in which gradients are
summed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from setting import make_micro_batch, make_model, masked_sum, relative, whole
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from worlds import World, mesh_of

import distaccum as da

STRATEGIES = [
    ("ddp", "boundary"), ("ddp", "every"),
    ("fsdp", "boundary"), ("fsdp", "gather_once"), ("fsdp", "every"),
    ("hsdp", "boundary"), ("hsdp", "gather_once"), ("hsdp", "reduce_scatter"), ("hsdp", "every"),
]  # fmt: skip


def wrapped(model: nn.Module, strategy: str, policy: MixedPrecisionPolicy) -> nn.Module:
    if strategy == "ddp":
        return DistributedDataParallel(model)
    shape, names = ((2,), ("shard",)) if strategy == "fsdp" else ((2, 1), ("replicate", "shard"))
    return fully_shard(model, mesh=mesh_of(*shape, names=names), mp_policy=policy)


class Scalar(nn.Module):
    """y = w x, as a layer that autocast knows."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 1, bias=False, dtype=dtype)
        nn.init.zeros_(self.linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)[..., 0] * 1.0


def halves(model: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.float16):
        return model(x).float().sum()


def overflow(strategy: str, sync: str, windows: list[list[list[float]]]) -> dict[str, Any]:
    """On each rank: train on these windows [window][rank][micro-batch] in float16 and tell how it
    went."""
    rank = torch.distributed.get_rank()
    policy = MixedPrecisionPolicy(param_dtype=torch.float16, reduce_dtype=torch.float32)
    model = wrapped(Scalar(), strategy, policy)
    scale = da.LossScale(initial=2.0**16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25, momentum=0.5)
    objective = da.Objective(halves if strategy == "ddp" else lambda m, x: m(x).float().sum(), len)
    accumulator = da.Accumulator(model, optimizer, objective, sync=sync, loss_scale=scale)
    records = [
        accumulator.step([torch.full((1, 1), x) for x in window[rank]]) for window in windows
    ]
    return {
        "weight": float(whole(next(model.parameters()))),
        "skipped": [record.skipped for record in records],
        "steps": accumulator.steps,
        "scale": scale.value,
    }


@pytest.mark.parametrize(("strategy", "sync"), STRATEGIES)
def test_a_float16_window_that_overflows_on_one_rank(
    two_ranks: World, strategy: str, sync: str
) -> None:
    good = [[0.5, 1.0], [1.5, 0.25]]
    bad = [[0.5, 1.0], [1.5, 60.0]]
    next_one = [[0.5, 1.0], [1.0, 1.5]]
    # A gradient is x times scale 65536 times 2 ranks / 4 samples; float16 ends at 65504: 1.5 fits
    # and 60 does not.
    with_it = two_ranks.run(overflow, strategy, sync, [good, bad, next_one])
    without = two_ranks.run(overflow, strategy, sync, [good, next_one])
    for here, there in zip(with_it, without, strict=True):
        assert [text is not None for text in here["skipped"]] == [False, True, False]
        assert (
            "gradient norm inf" in here["skipped"][1] or "gradient norm nan" in here["skipped"][1]
        )
        assert here["scale"] == 2.0**15
        assert there["scale"] == 2.0**16
        assert here["steps"] == there["steps"] == 2
        # scales are powers of two: not one bit differs
        assert here["weight"] == there["weight"] != 0.0
    assert with_it[0] == with_it[1]
    # By hand: mean gradients 3.25 / 4 and 4 / 4, momentum 0.5, lr 0.25.
    assert without[0]["weight"] == -0.25 * (0.8125 + 0.5 * 0.8125 + 1.0)


def at_the_smallest_scale() -> str:
    model = DistributedDataParallel(Scalar())
    scale = da.LossScale(initial=2.0, smallest=2.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    accumulator = da.Accumulator(model, optimizer, da.Objective(halves, len), loss_scale=scale)
    try:
        accumulator.step([torch.full((1, 1), float("inf"))])
    except da.DivergenceError as error:
        return str(error)
    return ""


def test_an_overflow_at_the_smallest_scale_is_a_divergence(two_ranks: World) -> None:
    for message in two_ranks.run(at_the_smallest_scale):
        assert "not finite" in message


def test_the_scale_grows_after_good_windows() -> None:
    scale = da.LossScale(initial=4.0, growth_windows=2, smallest=1.0)
    values = []
    for finite in (True, True, True, False, True, True, False, False, False, False):
        scale.update(finite)
        values.append(scale.value)
    assert values == [4.0, 8.0, 8.0, 4.0, 4.0, 8.0, 4.0, 2.0, 1.0, 1.0]
    with pytest.raises(da.ConfigError, match="smallest"):
        da.LossScale(initial=0.5)


def constant_gradient(strategy: str, sync: str, num_micro_batches: int) -> float:
    """The update by SGD with lr 1 of a bf16 parameter whose gradient is 1 in each micro-batch."""
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    model = Scalar(torch.bfloat16)
    model = wrapped(model, strategy, policy) if strategy != "single" else model
    objective = da.Objective(lambda m, x: m(x).float().sum(), len)
    accumulator = da.Accumulator(
        model, torch.optim.SGD(model.parameters(), lr=1.0), objective, sync=sync
    )
    accumulator.step([torch.ones(1, 1, dtype=torch.bfloat16)] * num_micro_batches)
    return -float(whole(next(model.parameters())))


@pytest.mark.parametrize(("strategy", "sync"), STRATEGIES)
def test_trap_14_bf16_parameters_k_1024(two_ranks: World, strategy: str, sync: str) -> None:
    assert two_ranks.run(constant_gradient, strategy, sync, 1024) == [1.0, 1.0]


def static_graph() -> str:
    model = DistributedDataParallel(Scalar(torch.bfloat16), static_graph=True)
    try:
        da.Accumulator(
            model, torch.optim.SGD(model.parameters(), lr=1.0), da.Objective(halves, len)
        )
    except da.ConfigError as error:
        return str(error)
    return ""


def test_a_static_graph_with_sums_in_another_dtype_is_refused(two_ranks: World) -> None:
    for message in two_ranks.run(static_graph):
        assert message.startswith("static_graph=True needs DDP's own reduction")


def sums_in(strategy: str, sync: str, accum: str | None, reduce: str | None) -> dict[str, Any]:
    """One window of 3 micro-batches with sums in other dtypes: relative error of the update, and
    what travelled."""
    dtypes = [None if name is None else getattr(torch, name) for name in (accum, reduce)]
    rank = torch.distributed.get_rank()
    policy = MixedPrecisionPolicy(reduce_dtype=dtypes[1])
    model = wrapped(make_model(torch.float32), strategy, policy)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    objective = da.Objective(
        lambda m, micro_batch: masked_sum(
            m, {name: value.float() for name, value in micro_batch.items()}
        ),
        lambda micro_batch: int(micro_batch["mask"].sum()),
    )
    try:
        accumulator = da.Accumulator(
            model,
            optimizer,
            objective,
            sync=sync,
            accum_dtype=dtypes[0],
            reduce_dtype=dtypes[1],
            audit="always",
        )
    except da.ConfigError as error:
        return {"refused": str(error)}
    before = [whole(p) for p in model.parameters()]
    micro_batches = [[make_micro_batch(10 * r + i) for i in range(3)] for r in range(2)]
    record = accumulator.step(micro_batches[rank])
    plain = make_model()
    every = [micro_batch for own in micro_batches for micro_batch in own]
    loss = sum(masked_sum(plain, micro_batch) for micro_batch in every) / sum(
        float(micro_batch["mask"].sum()) for micro_batch in every
    )
    right = torch.autograd.grad(loss, list(plain.parameters()))
    update = [b - whole(p) for b, p in zip(before, model.parameters(), strict=True)]
    assert record.verdict is not None
    return {
        "error": max(
            relative(found.double(), exact) for found, exact in zip(update, right, strict=True)
        ),
        "sent": (
            sum(record.verdict.counted.bytes.values()) - record.verdict.counted.bytes["all_gather"]
        ),
    }


def test_dtypes_of_sums(two_ranks: World) -> None:
    def run(*args: str | None) -> dict[str, Any]:
        here, there = two_ranks.run(sums_in, *args)
        assert here == there
        return here

    # some roundings of 2^-24 in weights of order one; of 2^-8 in sums of 6
    single, half, double = (6e-6, 2e-2, 1e-6)
    plain = run("ddp", "boundary", None, None)
    narrow = run("ddp", "boundary", None, "bfloat16")
    wide = None
    assert plain["error"] < single < narrow["error"] < half
    control = 8 * 2 * 6
    assert (plain["sent"] - control) == 2 * (narrow["sent"] - control)  # half the bytes travel
    wide = run("ddp", "boundary", "float64", "float64")
    assert wide["error"] < double * 10
    assert wide["sent"] - control == 2 * (plain["sent"] - control)
    assert single < run("ddp", "boundary", "bfloat16", None)["error"] < half
    assert run("ddp", "every", None, "bfloat16")["sent"] - control == 3 * (narrow["sent"] - control)
    # FSDP2 sums what it has not reduced yet in the dtype in which it reduces.
    assert (
        "in the dtype in which it reduces" in run("fsdp", "boundary", None, "bfloat16")["refused"]
    )
    assert single < run("fsdp", "boundary", "bfloat16", "bfloat16")["error"] < half
    assert single < run("fsdp", "every", None, "bfloat16")["error"] < half
    assert run("fsdp", "gather_once", "float64", "float64")["error"] < double * 10
