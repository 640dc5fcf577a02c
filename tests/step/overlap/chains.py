"""Models that are chains of blocks, wrapped in every way, and trainings of them that are compared
to the bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from setting import whole
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from worlds import mesh_of

import distaccum as da
from distaccum.models.gpt import GPT, GPTConfig
from distaccum.nn.blocks import blocks_of

WINDOWS = (3, 1, 8, 4)  # micro-batches of the rank that has most
VOCABULARY = 19


def make_gpt(dropout: float = 0.2, num_layers: int = 3) -> nn.Module:
    """A GPT, whose embedding and head are one matrix."""
    torch.manual_seed(0)
    return GPT(GPTConfig("gpt", VOCABULARY, 12, num_layers, 2, 8, dropout, True))


class Block(nn.Module):
    """[B, T, width] -> the same; with `what` changed in the way that it names."""

    def __init__(self, width: int, what: str = "") -> None:
        super().__init__()
        self.norm, self.linear, self.what = nn.LayerNorm(width), nn.Linear(width, width), what

    def forward(self, given: Any) -> Any:
        if self.what == "inplace":
            given += 1.0
        x = given["x"] if self.what == "dict" else given
        x = x + torch.tanh(self.linear(self.norm(x)))
        return {"x": x} if self.what == "dict" else x


class Chain(nn.Module):
    """Embedding, four blocks, and a head with layers of its own; with `what` changed in the way
    that it names."""

    def __init__(self, what: str = "", num_blocks: int = 4) -> None:
        super().__init__()
        torch.manual_seed(1)
        width = 6
        self.what = what
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(Block(width, what) for _ in range(num_blocks))
        self.before_head, self.norm = nn.Linear(width, width), nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY)
        if what in ("tied", "tied twice"):
            self.head.weight = self.embedding.weight
        if what == "shared":
            self.blocks[2].linear = self.blocks[1].linear
        frozen: dict[str, list[nn.Module]] = {
            "frozen embedding": [self.embedding],
            "frozen first blocks": [self.embedding, *self.blocks[:2]],
            "frozen blocks": [self.embedding, self.blocks],
            "frozen last block": [self.blocks[-1]],
            "frozen head": [self.before_head, self.norm, self.head],
        }
        for module in frozen.get(what, []):
            module.requires_grad_(False)

    def forward(self, ids: Tensor, left_out: int | None = None) -> Tensor:
        """Logits [B, T, V] of ids [B, T]."""
        x = self.embedding(ids)
        if self.what == "tied twice":
            x = x + 0.5 * self.embedding(ids.flip(1))
        kept = [x]
        for index in [*range(len(self.blocks)), *([0, 1] if self.what == "twice" else [])]:
            if index != left_out:
                given = {"x": x} if self.what == "dict" else x
                x = self.blocks[index](given)
                x = x["x"] if self.what == "dict" else x
            kept.append(x)
        if self.what.startswith("skip"):
            x = x + kept[int(self.what[-1])]
        if self.what == "inplace head":
            x = F.relu_(x)
        out: Tensor = self.head(self.norm(torch.tanh(self.before_head(x))))
        return out + 0.0  # FSDP2 warns of outputs that are views


def cross_entropy(model: nn.Module, micro_batch: dict[str, Any]) -> Tensor:
    """Summed over tokens; 0 is ignored."""
    more = (micro_batch["left_out"],) if "left_out" in micro_batch else ()
    logits = model(micro_batch["ids"], *more).float().flatten(0, 1)
    return F.cross_entropy(logits, micro_batch["labels"].flatten(), ignore_index=0, reduction="sum")


def counted(micro_batch: dict[str, Any]) -> int:
    """Tokens that are not ignored."""
    return int((micro_batch["labels"] != 0).sum())


def tokens() -> da.Objective:
    """One term."""
    return da.Objective(cross_entropy, counted)


def two_terms() -> da.Objective:
    """Beside the tokens' loss a square of all logits, over samples; and a forward without
    gradients, as a reference."""

    def sums(model: nn.Module, micro_batch: dict[str, Any]) -> dict[str, Tensor]:
        with torch.no_grad():
            reference = model(micro_batch["ids"])
        logits = model(micro_batch["ids"])
        loss = F.cross_entropy(
            logits.flatten(0, 1), micro_batch["labels"].flatten(), ignore_index=0, reduction="sum"
        )
        return {"tokens": loss, "far": (logits - 0.5 * reference).square().mean((1, 2)).sum()}

    return da.Objective(
        sums, lambda micro_batch: {"tokens": counted(micro_batch), "far": len(micro_batch["ids"])}
    )


def windows(
    lengths: Sequence[int] = WINDOWS, more: Callable[[int], dict[str, Any]] | None = None
) -> list[list[Any]]:
    """This rank's micro-batches. Sizes differ, ranks have none, fewer and more of them, and some
    micro-batches count nothing."""
    rank, size = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(rank)
    made = []
    for step, length in enumerate(lengths):
        lacking = 0 if rank == step % size else min(length, (rank + step) % 3)
        micro_batches = []
        for index in range(length - lacking):
            shape = (1 + (index + rank) % 2, 4 + index)
            ids, labels = (
                torch.randint(1, VOCABULARY, shape, generator=generator) for _ in range(2)
            )
            labels[:, : index % 3] = 0
            if index == 1 and rank == step % size:
                labels.zero_()
            micro_batches.append(
                {"ids": ids, "labels": labels} | (more(index + step) if more else {})
            )
        made.append(micro_batches)
    return made


def wrap(model: nn.Module, kind: str, policy: MixedPrecisionPolicy | None = None) -> nn.Module:
    """`ddp` in many buckets, `fsdp` with a group for each block, or HSDP as `2x2`."""
    if kind == "ddp":
        return DistributedDataParallel(model, bucket_cap_mb=0.002)
    shape = (dist.get_world_size(),) if kind == "fsdp" else tuple(map(int, kind.split("x")))
    mesh = mesh_of(*shape, names=("replicate", "shard")[-len(shape) :])
    policy = policy or MixedPrecisionPolicy()
    for block in blocks_of(model):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


def accumulator(
    model: nn.Module, kind: str, overlap_micro_batches: int | str, **options: Any
) -> da.Accumulator:
    """With momentum, clipping and the ledger; `gather_once` under FSDP2."""
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9
    )
    options = {
        "objective": tokens(),
        "sync": "boundary" if kind == "ddp" else "gather_once",
        "seed": 3,
        "audit": "always",
    } | options
    return da.Accumulator(
        model, optimizer, clip_norm=0.5, overlap_micro_batches=overlap_micro_batches, **options
    )


def state(model: nn.Module) -> dict[str, Tensor]:
    """Whole parameters, and this rank's buffers."""
    return {
        name: whole(value) for name, value in [*model.named_parameters(), *model.named_buffers()]
    }


def trained(
    model: nn.Module,
    kind: str,
    overlap_micro_batches: int,
    data: Sequence[list[Any]],
    **options: Any,
) -> Any:
    """What each window told, and the model after all."""
    made = accumulator(model, kind, overlap_micro_batches, **options)
    records = [made.step(micro_batches) for micro_batches in data]
    assert all(record.verdict is not None and record.verdict.agrees for record in records)
    return [(record.losses, record.grad_norm) for record in records], state(model)


def differences(found: Any, expected: Any) -> list[str]:
    """What is not the same to the bit."""
    told = [
        f"window {i}: {a} {b}"
        for i, (a, b) in enumerate(zip(found[0], expected[0], strict=True))
        if a != b
    ]
    return told + [
        name for name, value in expected[1].items() if not torch.equal(found[1][name], value)
    ]


def hooks_left(model: nn.Module) -> int:
    """Hooks of modules, FSDP2's own among them."""
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())
