"""Finds the blocks of a model, and checkpoints or compiles them one by one before wrapping."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from distaccum.nn.batchnorm_layers import BatchNormMode


@dataclass
class NNConfig:
    """Configures BatchNorm, compilation and activation checkpointing inside the model."""

    batchnorm: BatchNormMode
    compile: bool
    checkpoint: bool


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """List a model's blocks, such as the layers of a transformer, in the order of its modules.

    A block is what FSDP2 gathers, and what checkpointing recomputes, as one unit. Blocks are the
    members of the outermost ModuleLists whose members have one class and have parameters. This
    includes the lists of both an encoder and a decoder, and those of a model that PEFT wraps.
    Embeddings, norms and head are left to the root, so that tied ones stay together.
    """
    found: list[nn.Module] = []
    inside: set[int] = set()
    for module in model.modules():  # parents come before their children
        if id(module) in inside or not isinstance(module, nn.ModuleList) or not len(module):
            continue
        inside.update(id(part) for part in module.modules())
        if len({type(block) for block in module}) == 1 and any(True for _ in module.parameters()):
            found += module
    return found


def checkpoint_blocks(blocks: Sequence[nn.Module]) -> None:
    """Apply activation checkpointing to each block, in place; call it before wrapping.

    Only the input of a block is kept for the backward, which computes the block again with the same
    randomness. The names of parameters do not change.
    """
    for block in blocks:
        _replace_forward(block, functools.partial(checkpoint, block.forward, use_reentrant=False))


def compile_blocks(blocks: Sequence[nn.Module]) -> None:
    """Compile the forward of each block, in place; call it before wrapping, after checkpointing.

    Equal blocks share their compiled code. The forward is compiled and not the module, so that the
    hooks of DDP and FSDP2 stay outside.
    """
    for block in blocks:
        _replace_forward(block, torch.compile(block.forward))


def _replace_forward(block: nn.Module, forward: Any) -> None:
    block.forward = forward  # only on this object, and nn.Module looks there first
