"""A model's blocks, and what is done to them one by one: checkpointing and compilation, under whatever wraps it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The layers of a transformer in the order of its modules: what FSDP2 gathers and checkpointing recomputes as one.

    They are the members of the outermost ModuleLists whose members are of one class and have parameters; of encoder and
    decoder alike, and of a model inside PEFT's. Embeddings, norms and head are left to the root, tied ones together.
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
