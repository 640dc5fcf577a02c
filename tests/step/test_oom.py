"""Memory runs out at any moment of a window, on one rank: all ranks learn it, nothing is lost,
nothing hangs.

The window is tried again in halved micro-batches, and the run ends where the undisturbed one does.
float64; relative errors are those of sums in another order: a few roundoffs of 1.1e-16 each in a
few dozen additions, 1e-12 is far beyond.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from setting import make_micro_batch, make_model, masked_objective, relative, whole, wrap
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from worlds import World

import distaccum as da

DDP = ("ddp", (), "boundary")
REFUSED = [
    ("ddp", (), "every"),
    *(("fsdp", (2,), policy) for policy in ("boundary", "gather_once", "every")),
]
NUM_WINDOWS, NUM_MICRO_BATCHES, SIZE = 3, 3, 4
MOMENTS = 8  # at which it happens, evenly over the operators of the window


class Shortage(TorchDispatchMode):
    """Counts the operators of forwards and backwards, and has no memory for one of them."""

    def __init__(self, accumulator: da.Accumulator, at: int | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.at = at
        self.count = 0
        self.counts = False
        self.accumulator = accumulator

    def __enter__(self) -> Any:
        self.objective, consensus = self.accumulator.objective, self.accumulator._consensus
        self.accumulator.objective = da.Objective(self.first_forward, self.objective.denominator)
        consensus.out_of_memory_ranks = self.after_the_last_backward  # type: ignore[method-assign]
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self.accumulator.objective = self.objective
        del self.accumulator._consensus.out_of_memory_ranks

    def first_forward(self, model: Any, micro_batch: Any) -> Any:
        self.counts = True
        return self.objective.loss_sum(model, micro_batch)

    def after_the_last_backward(self, short: bool) -> list[int]:
        self.counts = False
        return type(self.accumulator._consensus).out_of_memory_ranks(
            self.accumulator._consensus, short
        )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.counts and func.namespace == "aten":
            self.count += 1
            if self.count - 1 == self.at:
                raise torch.OutOfMemoryError("no memory for this operator")
        return func(*args, **(kwargs or {}))


def windows(rank: int, ranks: int) -> list[list[Any]]:
    """The micro-batches of one rank in each window."""
    return [
        [
            make_micro_batch(100 * step + i * ranks + rank, SIZE, "some")
            for i in range(NUM_MICRO_BATCHES)
        ]
        for step in range(NUM_WINDOWS)
    ]


def in_halves(micro_batches: list[Any]) -> list[Any]:
    """The same samples in micro-batches of half the size."""
    parts = (slice(0, SIZE // 2), slice(SIZE // 2, SIZE))
    return [
        {name: tensor[part] for name, tensor in micro_batch.items()}
        for micro_batch in micro_batches
        for part in parts
    ]


def trained(
    rank: int, case: tuple[str, tuple[int, ...], str], short: dict[int, int | None]
) -> dict[str, Any]:
    """Train; in the second window the ranks of `short` have no memory for one operator of
    theirs."""
    import torch.distributed as dist

    strategy, mesh, policy = case
    model = wrap(make_model(), strategy, mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    accumulator = da.Accumulator(
        model, optimizer, masked_objective(), sync=policy, audit="always", agree_on_oom=True
    )
    told, losses, counted = [], [], 0
    for step, micro_batches in enumerate(windows(rank, dist.get_world_size())):
        shortage = Shortage(accumulator, short.get(rank) if step == 1 else None)
        try:
            with shortage:
                record = accumulator.step(micro_batches)
        except da.OutOfMemoryError as error:
            told.append(str(error))
            record = accumulator.step(in_halves(micro_batches))
        counted = shortage.count if step == 1 else counted
        losses.append(record.loss)
    return {
        "losses": losses,
        "parameters": [whole(parameter) for parameter in model.parameters()],
        "told": told,
        "operators": counted,
        "steps": accumulator.steps,
    }


def with_batchnorm(mode: str, at: int | None) -> dict[str, Any]:
    """Three windows of a small convolution; in the second one rank 1 runs out of memory, and it is
    repeated."""
    import torch.distributed as dist

    torch.manual_seed(5)
    layers = [nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2)]
    model = da.convert_batchnorm(nn.Sequential(*layers).double(), mode)
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    objective = da.Objective(lambda model, x: model(x).square().sum(), len)
    accumulator = da.Accumulator(wrapped, optimizer, objective, agree_on_oom=True, audit="always")
    told, operators = 0, 0
    for step in range(NUM_WINDOWS):
        generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
        micro_batches = [
            torch.randn(SIZE, 1, 6, 6, generator=generator, dtype=torch.float64)
            for _ in range(NUM_MICRO_BATCHES)
        ]
        shortage = Shortage(accumulator, at if step == 1 and dist.get_rank() == 1 else None)
        try:
            with shortage:
                accumulator.step(micro_batches)
        except da.OutOfMemoryError:
            told += 1
            accumulator.step(micro_batches)
        operators = shortage.count
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return {"told": told, "operators": operators, "state": state}


def on_rank(case: Any, short: dict[int, int | None]) -> dict[str, Any]:
    import torch.distributed as dist

    return trained(dist.get_rank(), case, short)


def shortages(world: World, case: Any) -> None:
    undisturbed = world.run(on_rank, case, {})
    last = world.size - 1
    for moment in range(MOMENTS):
        at = moment * (undisturbed[last]["operators"] - 1) // (MOMENTS - 1)
        found = world.run(on_rank, case, {last: at})
        for rank, (there, here) in enumerate(zip(undisturbed, found, strict=True)):
            (told,) = here["told"]
            assert told.startswith(f"Out of memory on rank {last}"), told
            assert ("no memory for this operator" in told) == (rank == last)
            assert here["steps"] == NUM_WINDOWS
            assert here["losses"] == pytest.approx(there["losses"], rel=1e-12, abs=0)
            for name in range(len(there["parameters"])):
                assert relative(here["parameters"][name], there["parameters"][name]) < 1e-12, (
                    at,
                    name,
                )


def test_on_one_of_two_ranks(two_ranks: World) -> None:
    shortages(two_ranks, DDP)


def test_on_one_of_four_ranks(four_ranks: World) -> None:
    shortages(four_ranks, DDP)


def refusal(case: tuple[str, tuple[int, ...], str] | None) -> str:
    if case is None:
        layers = nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(48, 2)
        )
        model = nn.parallel.DistributedDataParallel(da.convert_batchnorm(layers, "sync"))
        policy = "boundary"
    else:
        strategy, mesh, policy = case
        model = wrap(make_model(), strategy, mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(da.ConfigError) as refused:
        da.Accumulator(model, optimizer, masked_objective(), sync=policy, agree_on_oom=True)
    return str(refused.value)


@pytest.mark.parametrize(
    "case", [*REFUSED, None], ids=lambda case: f"{case[0]}-{case[2]}" if case else "sync BatchNorm"
)
def test_micro_batches_that_communicate_cannot_be_left(two_ranks: World, case: Any) -> None:
    for text in two_ranks.run(refusal, case):
        assert text.startswith("agree_on_oom=True needs micro-batches that send nothing")


def test_batchnorm_that_communicates_at_the_end(two_ranks: World) -> None:
    """The same micro-batches are repeated, as layers normalise within them."""
    mode = "pooled"
    undisturbed = two_ranks.run(with_batchnorm, mode, None)
    for moment in range(4):
        at = moment * (undisturbed[1]["operators"] - 1) // 3
        for there, here in zip(undisturbed, two_ranks.run(with_batchnorm, mode, at), strict=True):
            assert (there["told"], here["told"]) == (0, 1)
            for name, tensor in there["state"].items():
                assert torch.equal(here["state"][name], tensor), (at, name)
