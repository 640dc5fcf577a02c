"""Defines a GPT-2 style decoder that maps token ids to logits.

It knows nothing about losses, accumulation or ranks. Architecture and initialization: Radford et
al., "Language Models are Unsupervised Multitask Learners" (2019). Positions are initialized like
all other weights (std 0.02).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distaccum.errors import ConfigError
from distaccum.models.weights import checked_sizes, draw


@dataclass
class GPTConfig:
    """Configures the sizes of a GPT; conf/model contains the values, so nothing has a default here.

    Attributes:
        name: "gpt", by which the application finds this class.
        vocab_size: number of token ids V. None: the caller fills it in from the data before the
            model is built.
        max_seq_len: number of learned positions, in tokens. None: the caller fills it in from the
            data before the model is built.
        num_layers: number of decoder blocks.
        num_heads: attention heads per block; must divide `width`.
        width: features of the residual stream.
        dropout: probability in [0, 1), applied after the embedding, to attention weights and to
            each residual branch.
        bias: whether linear layers and layer norms have a bias (GPT-2: true).
    """

    name: str
    vocab_size: int | None
    max_seq_len: int | None
    num_layers: int
    num_heads: int
    width: int
    dropout: float
    bias: bool


@final
class GPT(nn.Module):
    """Implements a pre-norm decoder with learned positions and one matrix for embedding and head.

    Built inside `torch.device("meta")`, it uses no memory; then call `to_empty(device=...)` (after
    sharding, if any) and `init_weights()`. Built elsewhere, it is initialized at once, with the
    same values for the same seed. It has no buffers.

    The embeddings and the head belong to the root module, so that sharding each of `blocks` and
    then the root (FSDP2) keeps the tied matrix in one group. Dropout draws from torch's global
    generator.

    Raises:
        ConfigError: if no model can have these sizes.
    """

    # the decoder blocks in the order of computation, each [B, T, width] -> [B, T, width]
    blocks: nn.ModuleList

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.vocab_size, self.max_seq_len = _check(config)
        device = torch.get_default_device()
        # On meta first: torch's own initialization would be discarded, and its random draws would
        # make the weights depend on how the model was built.
        with torch.device("meta"):
            self.wte = nn.Embedding(self.vocab_size, config.width)
            self.wpe = nn.Embedding(self.max_seq_len, config.width)
            self.dropout = nn.Dropout(config.dropout)
            self.blocks = nn.ModuleList(_Block(config) for _ in range(config.num_layers))
            self.norm = nn.LayerNorm(config.width, bias=config.bias)
        if device.type != "meta":
            self.to_empty(device=device).init_weights()

    def init_weights(self) -> None:
        """Initialize all parameters by `distaccum.models.weights.draw`, matrices with std 0.02.

        The projections that add to the residual stream have std 0.02 / sqrt(2 * num_layers),
        because 2 * num_layers of them are summed (GPT-2, section 2.3).

        Raises:
            ConfigError: if a parameter is on the meta device.
        """
        residual = 0.02 / math.sqrt(2 * len(self.blocks))
        draw(self, lambda name, _: residual if name.endswith("project.weight") else 0.02)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Compute the logits of the next token at every position.

        Args:
            input_ids: [B, T] int64, values in [0, vocab_size), T <= max_seq_len. Padding belongs at
                the end: attention is causal, so a token never depends on what follows it.

        Returns:
            [B, T, vocab_size] in the dtype of the parameters, or of autocast if it is on.

        Raises:
            ConfigError: if the dtype or the shape is different, or a sequence is too long.
        """
        if input_ids.dtype != torch.int64 or input_ids.ndim != 2:
            raise ConfigError(
                f"GPT got input_ids of {input_ids.dtype} {list(input_ids.shape)}, not torch.int64 "
                "[B, T]. Pass a batch of token ids."
            )
        num_tokens = input_ids.shape[1]
        if num_tokens > self.max_seq_len:
            raise ConfigError(
                f"GPT got a sequence of {num_tokens} tokens, but model.max_seq_len is "
                f"{self.max_seq_len}. Use shorter sequences, or model.max_seq_len={num_tokens}."
            )
        # A slice of the positions, not a look-up: its backward is deterministic on every device.
        x: Tensor = self.dropout(self.wte(input_ids) + self.wpe.weight[:num_tokens])
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.wte.weight)


class _Attention(nn.Module):
    """Computes causal self-attention of all heads, [B, T, width] -> [B, T, width]."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=config.bias)
        self.project = nn.Linear(config.width, config.width, bias=config.bias)
        self.dropout = config.dropout

    def forward(self, x: Tensor) -> Tensor:
        # [B, heads, 3, T, width / heads]
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).transpose(1, 3)
        query, key, value = qkv.unbind(2)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True)
        out: Tensor = self.project(mixed.transpose(1, 2).flatten(2))
        return out


class _MLP(nn.Module):
    """Applies two linear layers with a GELU between them, [B, T, width] -> [B, T, width].

    The GELU is GPT-2's tanh form. Between the layers there are four times as many features.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.expand = nn.Linear(config.width, 4 * config.width, bias=config.bias)
        self.project = nn.Linear(4 * config.width, config.width, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.project(F.gelu(self.expand(x), approximate="tanh"))
        return out


class _Block(nn.Module):
    """Applies one decoder block: each branch reads a normalized residual stream and adds to it."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width, bias=config.bias)
        self.attention = _Attention(config)
        self.mlp_norm = nn.LayerNorm(config.width, bias=config.bias)
        self.mlp = _MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x)))
        out: Tensor = x + self.dropout(self.mlp(self.mlp_norm(x)))
        return out


def _check(config: GPTConfig) -> tuple[int, int]:
    """Refuse impossible sizes, and return (vocab_size, max_seq_len), which are not None."""
    others = ("num_layers", "num_heads", "width")
    vocab_size, max_seq_len = checked_sizes(config, ("vocab_size", "max_seq_len"), others)
    if remainder := config.width % config.num_heads:
        below = config.width - remainder
        nearest = f"{below} or {below + config.num_heads}" if below else config.num_heads
        raise ConfigError(
            f"model.width ({config.width}) must be a multiple of model.num_heads "
            f"({config.num_heads}), because each head has width / num_heads features. Use "
            f"model.width={nearest}."
        )
    if not 0 <= config.dropout < 1:
        raise ConfigError(
            f"model.dropout ({config.dropout}) must be a probability in [0, 1); 0 switches dropout "
            "off."
        )
    return vocab_size, max_seq_len
