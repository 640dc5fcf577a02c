"""Tiny heads of transformers and ragged micro-batches for them. Everything is drawn from seeds;
nothing is fetched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

IGNORED = -100
VOCAB = 50
FAR = 10_000  # a position outside of every sequence
SIZES = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
WIDE = {**SIZES, "intermediate_size": 32, "max_position_embeddings": 32}
GPT2 = {
    **SIZES,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
T5 = {
    "vocab_size": VOCAB,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 1,
    "num_heads": 2,
    "dropout_rate": 0.0,
}
BART = {
    "vocab_size": VOCAB,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 32,
    "dropout": 0.0,
    "decoder_start_token_id": 2,
}
MOE = {"num_key_value_heads": 1, "output_router_logits": True, "router_aux_loss_coef": 0.02}
QWEN2_MOE = {
    **MOE,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}


@dataclass(frozen=True)
class Head:
    """A head, the labels it takes, and the denominator that its mean must be found to have."""

    model: str
    config: str
    options: dict[str, Any]
    labels: str
    denominator: str


HEADS = {
    "gpt2": Head(
        "GPT2LMHeadModel",
        "GPT2Config",
        {**GPT2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
        "tokens",
        "shifted_tokens",
    ),
    "llama": Head("LlamaForCausalLM", "LlamaConfig", WIDE, "tokens", "shifted_tokens"),
    "qwen2": Head(
        "Qwen2ForCausalLM",
        "Qwen2Config",
        {**WIDE, "num_key_value_heads": 1},
        "tokens",
        "shifted_tokens",
    ),
    "gpt_neox": Head("GPTNeoXForCausalLM", "GPTNeoXConfig", WIDE, "tokens", "shifted_tokens"),
    "bert_masked": Head(
        "BertForMaskedLM", "BertConfig", {**WIDE, **NO_DROPOUT}, "tokens", "tokens"
    ),
    "roberta_masked": Head(
        "RobertaForMaskedLM", "RobertaConfig", {**WIDE, **NO_DROPOUT}, "tokens", "tokens"
    ),
    "distilbert_masked": Head(
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        {
            **SIZES,
            "hidden_dim": 32,
            "max_position_embeddings": 32,
            "dropout": 0.0,
            "attention_dropout": 0.0,
        },
        "tokens",
        "tokens",
    ),
    "bert_classes": Head(
        "BertForSequenceClassification",
        "BertConfig",
        {**WIDE, **NO_DROPOUT, "num_labels": 3},
        "class",
        "tokens",
    ),
    "llama_classes": Head(
        "LlamaForSequenceClassification",
        "LlamaConfig",
        {**WIDE, "num_labels": 3, "pad_token_id": 0},
        "class",
        "tokens",
    ),
    "bert_token_classes": Head(
        "BertForTokenClassification",
        "BertConfig",
        {**WIDE, **NO_DROPOUT, "num_labels": 3},
        "token_classes",
        "tokens",
    ),
    "bert_regression": Head(
        "BertForSequenceClassification",
        "BertConfig",
        {**WIDE, **NO_DROPOUT, "num_labels": 1},
        "number",
        "samples",
    ),
    "roberta_multi_label": Head(
        "RobertaForSequenceClassification",
        "RobertaConfig",
        {**WIDE, **NO_DROPOUT, "num_labels": 3},
        "multi_label",
        "numbers",
    ),
    "bert_answers": Head(
        "BertForQuestionAnswering", "BertConfig", {**WIDE, **NO_DROPOUT}, "positions", "samples"
    ),
    "t5": Head(
        "T5ForConditionalGeneration",
        "T5Config",
        {**T5, "decoder_start_token_id": 0},
        "tokens",
        "tokens",
    ),
    "bart": Head("BartForConditionalGeneration", "BartConfig", BART, "tokens", "tokens"),
    "mixtral": Head(
        "MixtralForCausalLM",
        "MixtralConfig",
        {**WIDE, **MOE, "num_local_experts": 4},
        "tokens",
        "shifted_tokens",
    ),
    "qwen2_moe": Head(
        "Qwen2MoeForCausalLM", "Qwen2MoeConfig", {**WIDE, **QWEN2_MOE}, "tokens", "shifted_tokens"
    ),
}
MIXTURES = ("mixtral", "qwen2_moe")


def make(name: str, **options: Any) -> nn.Module:
    """The same weights in every process, larger than at their initialisation so that losses of
    samples differ."""
    import transformers

    head = HEADS[name]
    torch.manual_seed(11)
    config = getattr(transformers, head.config)(**{**head.options, **options}, use_cache=False)
    model: nn.Module = getattr(transformers, head.model)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(2.0)
    return model


def make_micro_batch(
    labels: str, seed: int, size: int, length: int, counted: str = "some"
) -> dict[str, Tensor]:
    """A padded micro-batch: samples of 3 to `length` tokens, of which all, some or none have labels
    that count."""
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=generator)

    lengths = 3 + draw(length - 2, size)
    lengths[0] = length
    mask = (torch.arange(length)[None] < lengths[:, None]).long()
    micro_batch = {"input_ids": (5 + draw(VOCAB - 5, size, length)) * mask, "attention_mask": mask}
    ignored = {
        "all": torch.zeros(size, length),
        "some": draw(3, size, length) == 0,
        "none": torch.ones(size, length),
    }
    left_out = ignored[counted].bool() | (mask == 0)
    if labels in ("tokens", "token_classes"):
        high = VOCAB if labels == "tokens" else 3
        micro_batch["labels"] = draw(high, size, length).masked_fill(left_out, IGNORED)
    elif labels == "class":
        micro_batch["labels"] = draw(3, size).masked_fill(left_out[:, 0], IGNORED)
    elif labels == "number":
        micro_batch["labels"] = torch.randn(size, generator=generator)
    elif labels == "multi_label":
        micro_batch["labels"] = draw(2, size, 3).float()
    else:
        starts = torch.where(left_out[:, 0], FAR, draw(3, size))
        micro_batch |= {
            "start_positions": starts,
            "end_positions": torch.where(starts == FAR, FAR, starts + 1),
        }
    return micro_batch


def make_window(labels: str, rank: int, num_micro_batches: int = 4) -> list[dict[str, Tensor]]:
    """The micro-batches of one rank, of ragged sizes and lengths; the last but one of rank 1 has no
    label that counts.

    Question answering has one length: its softmax runs over padding too, so that more of it is
        another loss.
    """
    return [
        make_micro_batch(labels, 100 * rank + i, 1 + (i + rank) % 3,
                         8 if labels == "positions" else 5 + (3 * i + rank) % 5,
                         "none" if (rank, i) == (1, num_micro_batches - 2) else "some")
        for i in range(num_micro_batches)
    ]  # fmt: skip


def one_big_batch(micro_batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """All samples in one batch, padded to the longest."""
    width = max(micro_batch["input_ids"].shape[1] for micro_batch in micro_batches)

    def padded(name: str, tensor: Tensor) -> Tensor:
        if tensor.ndim < 2 or tensor.is_floating_point():
            return tensor
        fill = IGNORED if name == "labels" else 0
        return torch.nn.functional.pad(tensor, (0, width - tensor.shape[1]), value=fill)

    return {
        name: torch.cat([padded(name, micro_batch[name]) for micro_batch in micro_batches])
        for name in micro_batches[0]
    }


def gradient(model: nn.Module, loss: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """A loss and its whole gradient as one vector, parameters that are not trained left out."""
    value = loss()
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(value, trained, allow_unused=True, materialize_grads=True)
    return float(value.detach()), torch.cat([g.flatten() for g in gradients])
