"""What is done to a model block by block: activation checkpointing and compilation, under whatever wraps the model."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def checkpoint_blocks(blocks: Sequence[nn.Module]) -> None:
    """Keep only each block's input for the backward, which computes the block once more with the same randomness.

    Names of parameters stay as they are. Call it before wrapping.
    """
    for block in blocks:
        _replace_forward(block, functools.partial(checkpoint, block.forward, use_reentrant=False))


def compile_blocks(blocks: Sequence[nn.Module]) -> None:
    """Compile each block's forward; equal blocks share their code. Call it before wrapping, after checkpointing.

    The forward and not the module is compiled, so that the hooks of DDP and FSDP2 stay outside.
    """
    for block in blocks:
        _replace_forward(block, torch.compile(block.forward))


def _replace_forward(block: nn.Module, forward: Any) -> None:
    block.forward = forward  # on this object only, where nn.Module looks first
