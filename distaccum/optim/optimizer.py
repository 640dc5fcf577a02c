"""Builds optimizers, and decides which parameters have weight decay."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import nn

from distaccum.errors import ConfigError, require
from distaccum.optim.scale import ScaleConfig
from distaccum.optim.schedule import AUTO, ScheduleConfig


class OptimName(Enum):
    """Names the optimizers.

    Attributes:
        adamw: Adam with decoupled weight decay (Loshchilov and Hutter, 2019).
        sgd: SGD with momentum.
    """

    adamw = "adamw"
    sgd = "sgd"


class OptimImplementation(Enum):
    """Names how an update is computed; all choices give the same numbers up to rounding.

    Attributes:
        foreach: few kernels over lists of tensors.
        fused: one kernel, no temporary memory.
        loop: one tensor after another.
        auto: fused if all parameters are on CUDA, otherwise foreach.
    """

    foreach = "foreach"
    fused = "fused"
    loop = "loop"
    auto = "auto"


@dataclass
class OptimConfig:
    """Configures an optimizer, its gradient clipping and its schedule; conf/optim has the values.

    Attributes:
        name: which optimizer.
        lr: peak learning rate; the schedule multiplies it by a factor in [0, 1].
        beta1, beta2: adamw: decay rates, in [0, 1), of the averages of the gradient and of its
            square.
        eps: adamw: added to the root of the average squared gradient, > 0.
        momentum: sgd: decay rate of the velocity, in [0, 1); 0: plain SGD.
        weight_decay: applies to matrices only, see `decay_groups`. Decoupled (adamw), or added to
            the gradient (sgd).
        implementation: how an update is computed.
        clip_norm: largest global gradient norm, applied after the reduction. None: no clipping.
        schedule: the learning rate over the training.
        scale: what depends on the effective batch size.
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

    def validate(self) -> None:
        """Refuse numbers outside their ranges."""
        for key in ("beta1", "beta2", "momentum"):
            value = getattr(self, key)
            require(0 <= value < 1, f"optim.{key} ({value}) must be in [0, 1).")
        for key in ("lr", "weight_decay"):
            value = getattr(self, key)
            require(0 <= value < math.inf, f"optim.{key} ({value}) must be finite and at least 0.")
        require(0 < self.eps < math.inf, f"optim.eps ({self.eps}) must be finite and above 0.")
        require(
            self.clip_norm is None or self.clip_norm > 0,
            f"optim.clip_norm ({self.clip_norm}) must be above 0. Write null for no clipping.",
        )
        warmup = self.schedule.warmup
        require(
            warmup == AUTO or type(warmup) is int,
            f"optim.schedule.warmup is {warmup!r}; give a whole number in optim.schedule.unit, 0 "
            "for none, or auto.",
        )


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split the trainable parameters into those with weight decay and those without.

    Parameters of two and more dimensions (matrices, kernels, embeddings) decay; biases, norms and
    scalars do not. A sharded parameter has as many dimensions as the whole one. A parameter with
    several names counts once.

    Args:
        model: the model to train.
        weight_decay: decay of the first group.

    Returns:
        Groups for a torch optimizer, those that decay first; an empty group is left out. Parameters
        are in the order of `model.parameters()`. Groups and order are the same on every rank.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Build the optimizer over the groups of `decay_groups`.

    Call it after sharding (FSDP2), which replaces the parameters. The learning rate is the peak
    until an `LRSchedule` sets it. Clipping is left to the caller.

    Args:
        model: the model to train.
        config: which optimizer, and its numbers.

    Raises:
        ConfigError: if a number is outside its range, or the model has no trainable parameters.
    """
    config.validate()
    groups = decay_groups(model, config.weight_decay)
    if not groups:
        frozen = len(list(model.parameters()))
        raise ConfigError(
            f"The model has 0 trainable parameters ({frozen} are frozen). Set requires_grad=True "
            "on those to train."
        )
    implementation = config.implementation
    if implementation is OptimImplementation.auto:
        on_cuda = all(p.is_cuda for group in groups for p in group["params"])
        implementation = OptimImplementation.fused if on_cuda else OptimImplementation.foreach
    options: dict[str, Any] = {
        "lr": config.lr,
        "foreach": implementation is OptimImplementation.foreach,
        "fused": implementation is OptimImplementation.fused,
    }
    if config.name is OptimName.sgd:
        return torch.optim.SGD(groups, momentum=config.momentum, **options)
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, betas=betas, eps=config.eps, **options)
