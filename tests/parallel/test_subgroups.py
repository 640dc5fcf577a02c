"""Two models train on two halves of the ranks, each DDP with a process group of its own: BatchNorm
meets inside it."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from worlds import World

import distaccum as da

NEAR = 1e-12  # float64, sums of fewer than 100 numbers of order 1


def net() -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Linear(2, 3, bias=False), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 1)
    ).double()


def samples(rank: int, micro_batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(10 * rank + micro_batch)
    return torch.randn(3 + rank, 2, generator=generator, dtype=torch.float64) + rank


def objective() -> Any:
    return da.Objective(lambda model, x: model(x).square().sum(), len)


def train(mode: str, rounds: dict[int, int], steps: int) -> tuple[dict[str, Tensor], Any, int]:
    """On each of four ranks: ranks 0 and 1 train one model, 2 and 3 another; some make more steps
    than others."""
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    rank = dist.get_rank()
    model = da.convert_batchnorm(net(), mode)
    wrapped = DistributedDataParallel(model, process_group=halves[rank // 2])
    accumulator = da.Accumulator(
        wrapped, torch.optim.SGD(model.parameters(), lr=0.1), objective(), audit="always"
    )
    for _ in range(steps if rank < 2 else 2 * steps):  # one half is not where the other one is
        accumulator.step([samples(rank, i) for i in range(rounds[rank])])
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    proof = da.verify(accumulator, [samples(rank, 0)])
    return copied.state_dict(), proof.holds or str(proof), accumulator.steps


def on_one_process(
    mode: str, ranks: tuple[int, ...], micro_batches: int, steps: int
) -> dict[str, Tensor]:
    """The training of one half: what meets in a layer is one batch."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        rounds = [[samples(rank, i) for rank in ranks] for i in range(micro_batches)]
        batches = (
            [torch.cat(one) for one in rounds]
            if mode == "sync"
            else [x for one in rounds for x in one]
        )
        count = sum(map(len, batches))
        for batch in batches:
            (model(batch).square().sum() / count).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


@pytest.mark.parametrize("mode", ["sync", "pooled"])
def test_two_models_on_two_subgroups(four_ranks: World, mode: str) -> None:
    found = four_ranks.run(train, mode, dict.fromkeys(range(4), 2), 2)
    for rank, (state, holds, steps) in enumerate(found):
        half = (0, 1) if rank < 2 else (2, 3)
        assert steps == (2 if rank < 2 else 4)
        assert holds is True, holds
        expected = on_one_process(mode, half, 2, steps)
        for name, value in expected.items():
            if mode == "sync" or "1." not in name:  # pooled statistics have tests of their own
                assert float((state[name] - value).abs().max()) <= NEAR, (rank, name)


def train_alone(mode: str) -> list[float]:
    """On each of two ranks: a model of its own, in a group of one."""
    groups = [dist.new_group([rank]) for rank in range(2)]
    rank = dist.get_rank()
    model = da.convert_batchnorm(net(), mode)
    wrapped = DistributedDataParallel(model, process_group=groups[rank])
    accumulator = da.Accumulator(
        wrapped, torch.optim.SGD(model.parameters(), lr=0.1), objective(), audit="always"
    )
    records = [accumulator.step([samples(rank, 0)]) for _ in range(1 + rank)]  # not as many
    return [record.loss for record in records]


def test_groups_of_one_rank_meet_nobody(two_ranks: World) -> None:
    for rank, losses in enumerate(two_ranks.run(train_alone, "sync")):
        first = float(net()(samples(rank, 0)).square().mean().detach())
        assert abs(losses[0] - first) <= NEAR
        assert len(losses) == 1 + rank


def fail_and_go_on() -> list[str]:
    """On each of four ranks: a window of a subgroup's model that raises, and the one after it."""
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    rank = dist.get_rank()
    model = da.convert_batchnorm(net(), "pooled")
    wrapped = DistributedDataParallel(model, process_group=halves[rank // 2])
    accumulator = da.Accumulator(wrapped, torch.optim.SGD(model.parameters(), lr=0.1), objective())
    told = []
    for micro_batch in (torch.zeros(2, 5, dtype=torch.float64), samples(rank, 0)):
        try:
            told.append(f"{accumulator.step([micro_batch]).step}")
        except RuntimeError as error:
            told.append(str(error))
    return told


def test_a_window_that_fails_in_a_subgroup_says_why(four_ranks: World) -> None:
    for first, second in four_ranks.run(fail_and_go_on):
        assert "shapes cannot be multiplied" in first
        assert second == "1"
