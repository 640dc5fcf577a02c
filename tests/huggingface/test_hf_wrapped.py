"""Wrapped models: LoRA with frozen weights, tied embeddings in shards, and measuring a denominator
on all ranks.

Gradients are compared with one big batch as in test_hf_one_big_batch.py, and with its tolerance.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from heads import gradient, make, make_micro_batch, make_window, one_big_batch
from test_hf_one_big_batch import TOLERANCE, RecordingSGD, whole, windows_of, wrap
from torch import Tensor, nn
from worlds import World

import distaccum as da
from distaccum.huggingface import HuggingFace, HuggingFaceCausalLM
from distaccum.huggingface.models import HFConfig, build_hf
from distaccum.nn.blocks import blocks_of


def make_lora() -> nn.Module:
    """GPT-2 with LoRA on its attention; B is drawn too, since with zeros half of the gradients are
    zero."""
    import peft

    base = make("gpt2")
    torch.manual_seed(5)
    config = peft.LoraConfig(
        r=2, lora_alpha=4, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM"
    )
    with warnings.catch_warnings():
        # peft asks for it by the name that transformers 5 has deprecated; nothing that we could
        # call otherwise.
        warnings.filterwarnings(
            "ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning
        )
        model: nn.Module = peft.get_peft_model(base, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0.0, 0.3)
    return model


def lora_errors(strategy: str, sync: str) -> dict[str, Any]:
    """One window against one big batch, on each rank, or on one process that has the micro-batches
    of both ranks."""
    import torch.distributed as dist

    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    model = make_lora()
    objective = HuggingFace.find(model, make_micro_batch("tokens", 7, 4, 8))
    blocks = len(blocks_of(model))
    micro_batches = windows_of("tokens")
    wrapped, own = model, [micro_batch for window in micro_batches for micro_batch in window]
    if strategy != "single":
        wrapped, own = wrap(model, strategy), micro_batches[dist.get_rank()]
    frozen = [whole(p) for p in wrapped.parameters() if not p.requires_grad]
    optimizer = RecordingSGD([p for p in wrapped.parameters() if p.requires_grad], lr=1.0)
    record = da.Accumulator(wrapped, optimizer, objective, sync=sync, audit="always").step(own)
    plain = make_lora()
    batch = one_big_batch([micro_batch for window in micro_batches for micro_batch in window])
    loss, expected = gradient(plain, lambda: plain(**batch).loss)
    left = [whole(p) for p in wrapped.parameters() if not p.requires_grad]
    assert objective.mean_over.value == "shifted_tokens"
    assert blocks == 2
    return {
        "gradient": float((optimizer.found - expected).norm() / expected.norm()),
        "loss": abs(record.loss / loss - 1),
        "frozen": all(torch.equal(a, b) for a, b in zip(frozen, left, strict=True)),
        "verdict": record.verdict is not None and record.verdict.agrees,
    }


def judge(errors: dict[str, Any]) -> None:
    assert errors["frozen"]
    assert errors["verdict"]
    assert max(errors["gradient"], errors["loss"]) <= TOLERANCE, errors


@pytest.mark.parametrize(
    ("strategy", "sync"), [("ddp", "auto"), ("fsdp", "boundary"), ("fsdp", "gather_once")]
)
def test_lora(two_ranks: World, strategy: str, sync: str) -> None:
    for errors in two_ranks.run(lora_errors, strategy, sync, timeout_s=110.0):
        judge(errors)


def test_lora_on_one_process() -> None:
    judge(lora_errors("single", "auto"))


def built(name: str) -> nn.Module:
    options = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 32,
    }
    if name == "GPT2Config":
        options |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    torch.manual_seed(3)
    return build_hf(
        HFConfig("hf", name, "causal_lm", None, {**options, "tie_word_embeddings": True}), 50, 8
    )


def text(rank: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(rank)
    tokens = [torch.randint(0, 50, (2, 9), generator=generator) for _ in range(3 - rank)]
    return [{"input_ids": t[:, :-1], "labels": t[:, 1:].contiguous()} for t in tokens]


def text_errors(name: str, strategy: str) -> list[float]:
    """Three steps on packed text with AdamW: losses, and at the end the weights, against one plain
    process."""
    import torch.distributed as dist

    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    torch.manual_seed(dist.get_rank())
    model = wrap(built(name), strategy)
    accumulator = da.Accumulator(
        model, torch.optim.SGD(model.parameters(), lr=0.1), HuggingFaceCausalLM.of(model)
    )
    plain = built(name)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    batch = {
        key: torch.cat([micro_batch[key] for rank in range(2) for micro_batch in text(rank)])
        for key in ("input_ids", "labels")
    }
    errors = []
    for _ in range(3):
        loss = F.cross_entropy(
            plain(batch["input_ids"]).logits.flatten(0, 1), batch["labels"].flatten()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append(abs(accumulator.step(text(dist.get_rank())).loss / float(loss.detach()) - 1))
    pairs = zip(model.parameters(), plain.parameters(), strict=True)
    return [
        *errors,
        *(
            float((whole(a) - b).detach().norm() / b.detach().norm())
            for a, b in pairs
            if b.ndim > 1
        ),
    ]


@pytest.mark.parametrize("name", ["GPT2Config", "LlamaConfig"])
def test_causal_language_models_with_tied_embeddings_under_fsdp2(
    two_ranks: World, name: str
) -> None:
    for errors in two_ranks.run(text_errors, name, "fsdp"):
        assert max(errors) <= TOLERANCE, errors


def found_when_wrapped(strategy: str) -> tuple[str, bool]:
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    model = wrap(make("mixtral"), strategy)
    found = HuggingFace.find(model, make_micro_batch("tokens", 5, 4, 8, "all"))
    record = da.Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1), found).step(
        make_window("tokens", 0)
    )
    return f"{found.mean_over.value} {found.aux_coef}", record.skipped is None


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_wrapped_model_is_measured_on_all_ranks_alike(two_ranks: World, strategy: str) -> None:
    assert two_ranks.run(found_when_wrapped, strategy) == [("shifted_tokens 0.02", True)] * 2
