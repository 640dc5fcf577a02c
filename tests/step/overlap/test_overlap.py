"""With the last T micro-batches block by block everything is as in the plain order, to the bit:
losses, norms, parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from chains import (
    Chain,
    accumulator,
    differences,
    make_gpt,
    state,
    tokens,
    trained,
    two_terms,
    windows,
    wrap,
)
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.nn.parallel import DistributedDataParallel
from worlds import World

import distaccum as da
from distaccum.models.resnet import ResNet, ResNetConfig
from distaccum.nn.batchnorm import BatchNormMode, convert_batchnorm
from distaccum.nn.blocks import checkpoint_blocks, compile_blocks

NARROW = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def all_overlaps(
    kind: str, overlaps: tuple[int, ...], lengths: tuple[int, ...]
) -> dict[int, list[str]]:
    """The differences of each T from the plain order: a tied GPT with dropout; windows of given
    lengths."""
    data = windows(lengths)
    plain = trained(wrap(make_gpt(), kind), kind, 1, data)
    return {t: differences(trained(wrap(make_gpt(), kind), kind, t, data), plain) for t in overlaps}


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_any_number_of_micro_batches_in_the_tail_on_any_number_of_ranks(
    any_world: World, kind: str
) -> None:
    overlaps, lengths = ((2, 4, 8), (3, 1, 8, 4)) if any_world.size <= 2 else ((3,), (4, 1, 3))
    assert (
        any_world.run(all_overlaps, kind, overlaps, lengths)
        == [{t: [] for t in overlaps}] * any_world.size
    )


@pytest.mark.parametrize(("ranks", "mesh"), [(2, "2x1"), (2, "1x2"), (4, "2x2")])
def test_replicas_of_shards(worlds: Callable[[int], World], ranks: int, mesh: str) -> None:
    assert worlds(ranks).run(all_overlaps, mesh, (3,), (4, 1, 3)) == [{3: []}] * ranks


def make(what: str) -> nn.Module:
    """A model before it is wrapped."""
    if what in ("checkpointed", "compiled"):
        model = make_gpt(0.2 if what == "checkpointed" else 0.0)
        assert isinstance(model.blocks, nn.ModuleList)
        (compile_blocks if what == "compiled" else checkpoint_blocks)(model.blocks)
        return model
    if what.startswith("resnet"):
        torch.manual_seed(2)
        mode = BatchNormMode(what.split()[1])
        return convert_batchnorm(ResNet(ResNetConfig("resnet", 5, 3, [4, 6], 2, False)), mode)
    return make_gpt() if what in ("gpt", "") else Chain(what)


def images() -> list[list[Any]]:
    """Of different numbers on each rank, one of which has a micro-batch less."""
    rank = torch.distributed.get_rank()
    generator = torch.Generator().manual_seed(rank)
    return [
        [
            {"inputs": torch.randn(2 + (i + rank) % 2, 3, 8, 8, generator=generator),
             "labels": torch.randint(0, 5, (2 + (i + rank) % 2,), generator=generator)}
            for i in range(length - (rank if length > 3 else 0))
        ]
        for length in (3, 4)
    ]  # fmt: skip


def one_model(
    kind: str, what: str, overlap_micro_batches: int, options: dict[str, Any]
) -> list[str]:
    """The differences of one model from the plain order. Options are of the accumulator, and what
    is named here."""
    options = dict(options)
    dtype, policy = options.pop("dtype", torch.float32), options.pop("policy", None)
    views = options.pop("views", False)
    data = images() if what.startswith("resnet") else windows((3, 4))
    if what.startswith("resnet"):
        options["objective"] = da.Classification()
    if options.get("objective") == "two terms":
        options["objective"] = two_terms()
    if options.get("objective") == "autocast":
        options["objective"] = da.autocast(tokens(), torch.bfloat16)

    def run(overlap: int) -> Any:
        model = make(what).to(dtype)
        wrapped = (
            DistributedDataParallel(model, gradient_as_bucket_view=True)
            if views
            else wrap(model, kind, policy)
        )
        return trained(wrapped, kind, overlap, data, **options)

    return differences(run(overlap_micro_batches), run(1))


BOTH: list[tuple[str, dict[str, Any]]] = [
    ("gpt", {"dtype": torch.float64}),
    ("gpt", {"objective": "two terms"}),
    ("gpt", {"objective": "autocast"}),
    ("checkpointed", {}),
    ("tied", {}),  # with a head that has layers of its own
    ("tied twice", {}),
    ("dict", {}),  # blocks that cannot be cut
    *(
        (f"frozen {part}", {})
        for part in ("embedding", "first blocks", "blocks", "last block", "head")
    ),
    ("inplace head", {}),
    # sync is refused
    *((f"resnet {mode.value}", {}) for mode in BatchNormMode if mode is not BatchNormMode.sync),
]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize(("what", "options"), BOTH, ids=lambda value: str(value))
def test_models(
    worlds: Callable[[int], World], kind: str, what: str, options: dict[str, Any]
) -> None:
    assert worlds(3).run(one_model, kind, what, 3, options) == [[]] * 3


@pytest.mark.parametrize(
    ("kind", "what", "options"),
    [
        ("ddp", "gpt", {"views": True}),
        ("fsdp", "gpt", {"policy": NARROW}),
        ("fsdp", "checkpointed", {"policy": NARROW}),
    ],
    ids=["gradients in buckets", "bf16 parameters", "bf16 parameters computed again"],
)
def test_wraps(
    worlds: Callable[[int], World], kind: str, what: str, options: dict[str, Any]
) -> None:
    assert worlds(3).run(one_model, kind, what, 3, options) == [[]] * 3


def checked_in_any_order(kind: str) -> list[str]:
    """Evaluation between windows, and another T from one window to the next."""

    def run(overlaps: list[int]) -> Any:
        model = wrap(make_gpt(), kind)
        # DDP's buckets are those of its first window: the ledger of a later accumulator cannot know
        # it.
        made = [accumulator(model, kind, t, audit="never") for t in overlaps]
        records = []
        for one, micro_batches in zip(made, windows((3, 4, 2)), strict=True):
            records.append(one.step(micro_batches))
            with one.strategy.evaluating() as evaluated:
                evaluated(torch.ones(1, 3, dtype=torch.int64))
        return [(record.losses, record.grad_norm) for record in records], state(model)

    return differences(run([4, 1, 2]), run([1, 1, 1]))


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_evaluation_between_windows_and_another_overlap(
    worlds: Callable[[int], World], kind: str
) -> None:
    assert worlds(2).run(checked_in_any_order, kind) == [[]] * 2
