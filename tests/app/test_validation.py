"""Evaluation of validation samples: the host reads results once, at the end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from worlds import World as Ranks

from distaccum.app.validation import Validation, evaluate
from distaccum.core.plan import Plan
from distaccum.parallel.base import Strategy
from distaccum.parallel.detect import strategy_for

ROWS = torch.arange(1.0, 12.0, dtype=torch.float64)[:, None]  # 11 samples


class Rows:
    """Samples that are numbers."""

    def __len__(self) -> int:
        return len(ROWS)

    def batch(self, indices: Sequence[int], generator: torch.Generator) -> Mapping[str, Tensor]:
        return {"x": ROWS[list(indices)]}

    def num_targets(self, indices: Sequence[int]) -> int:
        return len(indices)

    def longest_samples(self, count: int) -> list[int]:
        return list(range(count))


class Two:
    """Two terms: the mean of x, and that of x squared over half as much."""

    def denominator(self, micro_batch: Any) -> dict[str, float]:
        return {"x": float(len(micro_batch["x"])), "squares": 0.5 * len(micro_batch["x"])}

    def loss_sum(self, model: nn.Module, micro_batch: Any) -> dict[str, Tensor]:
        y = model(micro_batch["x"])
        return {"x": y.sum(), "squares": (y * y).sum()}


@contextmanager
def counted_reads() -> Iterator[list[str]]:
    """The calls that bring a tensor's numbers to the host."""
    reads: list[str] = []

    def wrapped(name: str) -> Any:
        plain = getattr(Tensor, name)

        def called(*args: Any, **kwargs: Any) -> Any:
            reads.append(name)
            return plain(*args, **kwargs)

        return called

    with ExitStack() as stack:
        for name in ("cpu", "item", "tolist", "__float__", "__bool__", "__int__"):
            stack.enter_context(mock.patch.object(Tensor, name, wrapped(name)))
        yield reads


def evaluated() -> tuple[dict[str, float], list[str]]:
    model = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    nn.init.ones_(model.weight)
    strategy: Strategy = strategy_for(_spread(model))
    validation = Validation(Rows(), Plan(len(ROWS), len(ROWS), 2, shuffle=False), Two())
    with counted_reads() as reads:
        return evaluate(strategy, validation), reads


def _spread(model: nn.Module) -> nn.Module:
    if torch.distributed.is_initialized():
        return nn.parallel.DistributedDataParallel(model)
    return model


def test_means_are_exact_and_read_once(any_world: Ranks) -> None:
    """11 samples in 6 micro-batches: with 4 ranks, two have a micro-batch less."""
    for means, reads in any_world.run(evaluated):
        assert means == {"x": 6.0, "squares": 506 / 5.5}
        assert reads == ["tolist"]
