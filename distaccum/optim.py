"""Optimizers, the choice of what decays, and learning-rate schedules as functions of the position in the training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import Any, final

import torch
from torch import nn

from distaccum.errors import ConfigError


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


class ScheduleName(Enum):
    """The course of the learning rate, see `lr_factor`. wsd: warm-up, stable, decay."""

    constant = "constant"
    linear = "linear"
    cosine = "cosine"
    wsd = "wsd"


class ScheduleUnit(Enum):
    """What positions and lengths of a schedule count: optimizer steps, samples or tokens, over all ranks."""

    steps = "steps"
    samples = "samples"
    tokens = "tokens"


@dataclass
class ScheduleConfig:
    """A learning-rate schedule. All lengths are in `unit`; conf/optim owns the values.

    Attributes:
        name: the curve after the warm-up.
        unit: what positions count. It belongs to the caller, who passes positions in this unit.
        warmup: length of the linear warm-up; 0: none.
        total: where the curve ends. None: where the training does, filled in by the caller.
        decay: length of the decay of wsd; other curves do not read it.
        final_ratio: the learning rate at the end as a part of `lr`, in [0, 1]; constant does not read it.
    """

    name: ScheduleName
    unit: ScheduleUnit
    warmup: int
    total: int | None
    decay: int
    final_ratio: float


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


def lr_factor(position: float, schedule: ScheduleConfig, total: int | None) -> float:
    """The learning rate at a position, as a part of the peak.

    A position is what was consumed **before** the step, in `schedule.unit` over all ranks: nothing here knows ranks or
    micro-batches. With end E = `schedule.total`, or `total` where that is None, and warm-up W:

    * warm-up, position < W: (position + 1) / W. Position 0 gives 1 / W, the last position of the warm-up gives 1.
    * then, with x = (position - W) / (E - W): linear 1 - (1 - f) x, cosine f + (1 - f) (1 + cos(pi x)) / 2
      (Loshchilov and Hutter, "SGDR", 2017), where f is `final_ratio`; wsd 1, and over the last `decay` units before E
      linear from 1 to f; constant 1.
    * from E on: exactly f, but 1 for constant.

    N steps therefore have positions 0 ... N - 1, and f itself is the value at N, when training is over. The last step
    is not lost to a learning rate of 0: for linear its factor is f + (1 - f) / (N - W).

    Args:
        position: >= 0.
        schedule: the curve.
        total: length of the training in `schedule.unit`; None where it is unknown.

    Returns:
        The factor, continuous in the position: in (0, 1] during warm-up, then in [f, 1].

    Raises ConfigError for lengths that do not fit into each other, or a decaying curve without an end.
    """
    end = _check_schedule(schedule, total)
    if not position >= 0:
        raise ValueError(f"a schedule has positions from 0 on, got {position}")
    if position < schedule.warmup:
        return min(1.0, (position + 1) / schedule.warmup)
    if end is None:
        return 1.0
    start = end - schedule.decay if schedule.name is ScheduleName.wsd else schedule.warmup
    progress = (position - start) / (end - start)
    if progress >= 1:
        return schedule.final_ratio
    remaining = 1 - max(0.0, progress)
    if schedule.name is ScheduleName.cosine:
        remaining = (1 + math.cos(math.pi * progress)) / 2
    return schedule.final_ratio + (1 - schedule.final_ratio) * remaining


@final
class LRSchedule:
    """Sets the learning rate of every group by position. It counts nothing, so a resumed run is on the same curve.

    The peak of each group is read once, here: its "initial_lr" if it has one (torch's schedulers write it too), else
    its "lr", which is kept as "initial_lr". Hence an optimizer that was loaded in mid-curve gives its peak as well.

    `total` is the length of the training in `config.unit`, as in `lr_factor`, which also says what is refused.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, config: ScheduleConfig, total: int | None) -> None:
        _check_schedule(config, total)
        self._optimizer = optimizer
        self._config = config
        self._total = total
        self._peaks = [float(group.setdefault("initial_lr", group["lr"])) for group in optimizer.param_groups]

    def set(self, position: int) -> None:
        """Write peak times `lr_factor` into each group. Call it before a step.

        Args:
            position: steps, samples or tokens (`config.unit`) of all ranks before this step, the same on every rank.
        """
        factor = lr_factor(position, self._config, self._total)
        for group, peak in zip(self._optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * factor


def _check_schedule(schedule: ScheduleConfig, total: int | None) -> int | None:
    """Refuse a schedule that does not fit into its length; return where it ends, or None for a constant one."""
    key, unit = "optim.schedule", schedule.unit.value
    if schedule.warmup < 0:
        raise ConfigError(f"{key}.warmup ({schedule.warmup}) must be 0 (none) or more {unit}")
    if schedule.name is ScheduleName.constant:
        return None
    if not 0 <= schedule.final_ratio <= 1:
        raise ConfigError(f"{key}.final_ratio ({schedule.final_ratio}) is the last lr as a part of optim.lr, in [0, 1]")
    end = total if schedule.total is None else schedule.total
    name = schedule.name.value
    if end is None:
        raise ConfigError(f"{key}.name={name} must know where it ends; set {key}.total (in {unit}), or name=constant")
    decay = schedule.decay if schedule.name is ScheduleName.wsd else 1
    if decay < 1:
        raise ConfigError(f"{key}.decay ({decay}) must be at least 1 of {unit} with name=wsd, or use name=constant")
    if schedule.warmup + decay > end:
        raise ConfigError(
            f"{key}: a warmup of {schedule.warmup} and the decay of {name} (at least {decay}) do not fit into {end} "
            f"{unit}; use a warmup of at most {max(0, end - decay)}, or a longer training"
        )
    return end


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
