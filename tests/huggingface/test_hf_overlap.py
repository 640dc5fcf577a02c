"""Decoders and encoders of transformers with the last micro-batches block by block: to the bit as
in the plain order."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from heads import HEADS, make, make_micro_batch
from test_hf_one_big_batch import whole, windows_of, wrap
from test_hf_wrapped import make_lora
from torch import nn
from worlds import World

import distaccum as da
from distaccum.errors import ConfigError
from distaccum.huggingface import HuggingFace


def made(name: str) -> nn.Module:
    """Three layers where there is a stack of them."""
    kind, _, change = name.partition(" ")
    if kind == "lora":
        return make_lora()
    options: dict[str, Any] = {} if kind == "t5" else {"num_hidden_layers": 3}
    if change in ("tied", "untied"):
        options["tie_word_embeddings"] = change == "tied"
    if change == "without":
        options["output_router_logits"] = False
    model = make(kind, **options)
    if change == "checkpointed":
        with warnings.catch_warnings():  # the newer name is not in older releases
            warnings.filterwarnings("ignore", category=FutureWarning)
            model.gradient_checkpointing_enable()  # type: ignore[operator]
    return model


def run(name: str, strategy: str, overlap_micro_batches: int) -> Any:
    """Two windows of ragged micro-batches."""
    rank = torch.distributed.get_rank()
    labels = HEADS["gpt2" if name == "lora" else name.split(maxsplit=1)[0]].labels
    model = made(name)
    objective = HuggingFace.find(model, make_micro_batch(labels, 7, 4, 8))
    wrapped = wrap(model, strategy)
    optimizer = torch.optim.SGD(
        [p for p in wrapped.parameters() if p.requires_grad], lr=0.1, momentum=0.9
    )
    accumulator = da.Accumulator(
        wrapped, optimizer, objective, sync="boundary" if strategy == "ddp" else "gather_once",
        clip_norm=0.5, seed=1, audit="always", overlap_micro_batches=overlap_micro_batches,
    )  # fmt: skip
    window = windows_of(labels)[rank]
    records = [accumulator.step(micro_batches) for micro_batches in (window, window[rank:])]
    return [(record.losses, record.grad_norm) for record in records], [
        whole(p) for p in wrapped.parameters()
    ]


def same(name: str, strategy: str) -> list[bool]:
    """Whether what is told, and the parameters, are the same with 3 micro-batches in the tail."""
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    warnings.filterwarnings("ignore", message=".*use_reentrant")
    plain, found = run(name, strategy, 1), run(name, strategy, 3)
    return [
        found[0] == plain[0],
        all(torch.equal(a, b) for a, b in zip(found[1], plain[1], strict=True)),
    ]


NAMES = [
    "gpt2",
    "gpt2 checkpointed",
    "llama untied",
    "llama tied",
    "qwen2",
    "bert_masked",
    "mixtral without",
    "lora",
]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", NAMES)
def test_the_same_to_the_bit(two_ranks: World, name: str, strategy: str) -> None:
    assert two_ranks.run(same, name, strategy, timeout_s=110.0) == [[True, True]] * 2


def refusal(name: str, strategy: str) -> str:
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    try:
        run(name, strategy, 3)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
# an encoder beside the decoder; a loss of every layer's router
@pytest.mark.parametrize("name", ["t5", "mixtral"])
def test_what_is_no_chain_is_refused(two_ranks: World, name: str, strategy: str) -> None:
    for message in two_ranks.run(refusal, name, strategy, timeout_s=110.0):
        assert "blocks are a chain" in message
        assert "overlap_micro_batches=1" in message
