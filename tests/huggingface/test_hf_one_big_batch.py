"""Traps 19 and 20: heads of transformers on 2 ranks with 4 ragged micro-batches each, against one
forward over all samples.

Tolerance: float32 rounds to eps = 6e-8. An element of a gradient sums at most 8 x 3 x 9 = 216
contributions, and each went through some 50 rounded operations, in another order than in the big
batch: random roundings leave at most eps x sqrt(216 x 50) = 6e-6 of the whole gradient. A wrong
denominator gives 1e-2 and more.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from heads import HEADS, MIXTURES, gradient, make, make_micro_batch, make_window, one_big_batch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from worlds import World

import distaccum as da
from distaccum.huggingface import HuggingFace
from distaccum.nn.blocks import blocks_of

TOLERANCE = 1e-5
DENSE = [name for name in HEADS if name not in MIXTURES]


class RecordingSGD(torch.optim.SGD):
    """Keeps the whole gradient that it was given, as one vector."""

    found: Tensor

    def step(self, closure: Any = None) -> Any:
        self.found = torch.cat(
            [whole(p.grad).flatten() for g in self.param_groups for p in g["params"]]
        )
        return super().step(closure)


def whole(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def wrap(model: nn.Module, strategy: str) -> nn.Module:
    if strategy == "ddp":
        return DistributedDataParallel(model)
    for block in blocks_of(model):
        fully_shard(block)
    return fully_shard(model)


def windows_of(labels: str) -> list[list[dict[str, Tensor]]]:
    return [make_window(labels, rank) for rank in range(2)]


def found_by_us(name: str, strategy: str) -> tuple[da.StepRecord, Tensor, HuggingFace]:
    """One window on this rank: the record, the whole gradient, and the objective as it was
    found."""
    import torch.distributed as dist

    # FSDP2 warns of modules that return views of what the user may change in place; these models
    # change nothing.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    head, model = HEADS[name], make(name)
    objective = HuggingFace.find(model, make_micro_batch(head.labels, 7, 4, 8))
    wrapped = wrap(model, strategy)
    optimizer = RecordingSGD([p for p in wrapped.parameters() if p.requires_grad], lr=1.0)
    record = da.Accumulator(wrapped, optimizer, objective, audit="always").step(
        windows_of(head.labels)[dist.get_rank()]
    )
    return record, optimizer.found, objective


def dense_errors(name: str, strategy: str) -> dict[str, Any]:
    """On each rank: relative errors of loss and gradient against the head's own loss on one big
    batch."""
    record, found, objective = found_by_us(name, strategy)
    model, labels = make(name), HEADS[name].labels
    batch = one_big_batch(
        [micro_batch for micro_batches in windows_of(labels) for micro_batch in micro_batches]
    )
    loss, expected = gradient(model, lambda: model(**batch).loss)
    assert record.skipped is None
    assert record.denominator == objective.denominator(batch)
    return {
        "denominator": objective.mean_over.value,
        "gradient": float((found - expected).norm() / expected.norm()),
        "loss": abs(record.loss / loss - 1),
    }


def all_dense(names: list[str], strategy: str) -> dict[str, dict[str, Any]]:
    return {name: dense_errors(name, strategy) for name in names}


@pytest.fixture(scope="module")
def measured(two_ranks: World) -> list[dict[str, dict[str, Any]]]:
    """All heads under DDP, in one visit to the ranks."""
    return two_ranks.run(all_dense, DENSE, "ddp", timeout_s=110.0)


@pytest.mark.parametrize("name", DENSE)
def test_trap_19_a_window_is_one_big_batch(
    measured: list[dict[str, dict[str, Any]]], name: str
) -> None:
    for errors in (rank[name] for rank in measured):
        assert errors["denominator"] == HEADS[name].denominator
        assert errors["gradient"] <= TOLERANCE, (name, errors)
        assert errors["loss"] <= TOLERANCE, (name, errors)


def test_trap_19_under_fsdp2(two_ranks: World) -> None:
    names = ["gpt2", "bert_classes", "t5"]
    for errors in two_ranks.run(all_dense, names, "fsdp"):
        for name in names:
            assert max(errors[name]["gradient"], errors[name]["loss"]) <= TOLERANCE, (
                name,
                errors[name],
            )


def mixture_errors(name: str, strategy: str) -> dict[str, float]:
    """The token part is one big batch's, the auxiliary part the mean over the seven micro-batches
    in which labels count."""
    record, found, objective = found_by_us(name, strategy)
    model, coef = make(name), 0.02
    assert objective.aux_coef == coef
    micro_batches = [micro_batch for window in windows_of("tokens") for micro_batch in window]
    batch = one_big_batch(micro_batches)
    token, token_gradient = gradient(model, lambda: model(**batch, output_router_logits=False).loss)
    counting = [
        micro_batch for micro_batch in micro_batches if (micro_batch["labels"][:, 1:] != -100).any()
    ]
    assert len(counting) == len(micro_batches) - 1 == record.denominators["aux"]
    aux, aux_gradient = gradient(
        model, lambda: coef * torch.stack([model(**m).aux_loss for m in counting]).mean()
    )
    expected = token_gradient + aux_gradient
    return {
        "gradient": float((found - expected).norm() / expected.norm()),
        "token loss": abs(record.losses["loss"] / token - 1),
        "aux loss": abs(record.losses["aux"] / aux - 1),
        "loss": abs(record.loss / (token + aux) - 1),
        "the auxiliary part": float(aux_gradient.norm() / expected.norm()),
    }


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", MIXTURES)
def test_trap_20_the_auxiliary_loss_has_its_own_denominator(
    two_ranks: World, name: str, strategy: str
) -> None:
    for errors in two_ranks.run(mixture_errors, name, strategy):
        assert errors.pop("the auxiliary part") > 100 * TOLERANCE  # so that it would be missed
        assert max(errors.values()) <= TOLERANCE, errors
