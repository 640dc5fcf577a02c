"""Optimizers, and the choice of what decays."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import nn

from distaccum.errors import ConfigError
from distaccum.optim.schedule import ScaleConfig, ScheduleConfig


class OptimName(Enum):
    """The optimizers: Adam with decoupled decay (Loshchilov and Hutter, 2019), and SGD with momentum."""

    adamw = "adamw"
    sgd = "sgd"


class OptimImplementation(Enum):
    """How an update is computed; all give the same numbers up to rounding.

    foreach: few kernels over lists of tensors. fused: one kernel, no temporary memory. loop: tensor after tensor.
    auto: fused where all parameters are on CUDA, else foreach.
    """

    foreach = "foreach"
    fused = "fused"
    loop = "loop"
    auto = "auto"


@dataclass
class OptimConfig:
    """An optimizer, its clipping and its schedule. conf/optim owns the values.

    Attributes:
        name: which optimizer.
        lr: peak learning rate; the schedule multiplies it by a factor in [0, 1].
        beta1, beta2: adamw: memory of the mean and of the squared gradient, in [0, 1).
        eps: adamw: added to the root of the squared gradient, > 0.
        momentum: sgd: memory of the velocity, in [0, 1); 0: plain SGD.
        weight_decay: of matrices only, see `decay_groups`. Decoupled (adamw), or added to the gradient (sgd).
        implementation: how an update is computed.
        clip_norm: largest global gradient norm, applied after the reduction. None: no clipping.
        schedule: the learning rate along the training.
        scale: what follows the effective batch.
    """

    name: OptimName
    lr: float
    beta1: float
    beta2: float
    eps: float
    momentum: float
    weight_decay: float
    implementation: OptimImplementation
    clip_norm: float | None
    schedule: ScheduleConfig
    scale: ScaleConfig


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split the trainable parameters into those that decay and those that do not.

    Parameters of two and more dimensions (matrices, kernels, embeddings) decay; biases, norms and scalars do not. The
    dimensions of a sharded parameter are those of the whole. A parameter under several names counts once.

    Returns:
        Groups for a torch optimizer in the order of `model.parameters()`, the decaying one first; an empty one is left
        out. The groups, and their order, are the same on every rank.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Build the optimizer over `decay_groups`. Call it after sharding (FSDP2), which replaces the parameters.

    Its learning rate is the peak until an `LRSchedule` sets it. Clipping is the caller's.

    Raises ConfigError for a number outside its range, or a model without trainable parameters.
    """
    _check_optim(config)
    groups = decay_groups(model, config.weight_decay)
    if not groups:
        frozen = len(list(model.parameters()))
        raise ConfigError(f"optim: 0 trainable parameters ({frozen} are frozen); set requires_grad on what shall train")
    implementation = config.implementation
    if implementation is OptimImplementation.auto:
        on_cuda = all(p.is_cuda for group in groups for p in group["params"])
        implementation = OptimImplementation.fused if on_cuda else OptimImplementation.foreach
    foreach = implementation is OptimImplementation.foreach
    fused = implementation is OptimImplementation.fused
    if config.name is OptimName.sgd:
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, foreach=foreach, fused=fused)
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, foreach=foreach, fused=fused)


def _check_optim(config: OptimConfig) -> None:
    """Refuse numbers outside their ranges."""
    for key in ("beta1", "beta2", "momentum"):
        if not 0 <= getattr(config, key) < 1:
            raise ConfigError(f"optim.{key} ({getattr(config, key)}) must be in [0, 1)")
    for key in ("lr", "weight_decay"):
        if not 0 <= getattr(config, key) < math.inf:
            raise ConfigError(f"optim.{key} ({getattr(config, key)}) must be finite and at least 0")
    if not 0 < config.eps < math.inf:
        raise ConfigError(f"optim.eps ({config.eps}) must be finite and above 0")
    if config.clip_norm is not None and not config.clip_norm > 0:
        raise ConfigError(f"optim.clip_norm ({config.clip_norm}) must be above 0; write null for no clipping")
