"""The learning rate, and Adam's beta2, as functions of the position in the training and its effective batch."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, final

import torch

from distaccum.core.batch_schedule import ScheduleUnit
from distaccum.errors import ConfigError

AUTO = "auto"  # a warm-up that follows the length of the training, see `with_warmup`
MOST_WARMUP_STEPS = 20  # of such a warm-up


class ScheduleName(Enum):
    """The course of the learning rate, see `lr_factor`. wsd: warm-up, stable, decay."""

    constant = "constant"
    linear = "linear"
    cosine = "cosine"
    wsd = "wsd"


@dataclass
class ScheduleConfig:
    """A learning-rate schedule. All lengths are in `unit`; conf/optim owns the values.

    Attributes:
        name: the curve after the warm-up.
        unit: what positions count. It belongs to the caller, who passes positions in this unit.
        warmup: length of the linear warm-up; 0: none. auto: filled in by the caller, see `with_warmup`.
        total: where the curve ends. None: where the training does, filled in by the caller.
        decay: length of the decay of wsd; other curves do not read it.
        final_ratio: the learning rate at the end as a part of `lr`, in [0, 1]; constant does not read it.
    """

    name: ScheduleName
    unit: ScheduleUnit
    warmup: Any  # a number or auto: OmegaConf has no union of them
    total: int | None
    decay: int
    final_ratio: float


class LRRule(Enum):
    """By how much the learning rate changes with the effective batch B, see `lr_scale`; B0 is `base_batch`."""

    none = "none"  # not at all
    linear = "linear"  # B / B0, for SGD
    sqrt = "sqrt"  # the square root of B / B0, for Adam


@dataclass
class ScaleConfig:
    """What follows the effective batch, where that changes or is another one than it was tuned for.

    Attributes:
        lr: the learning rate's rule.
        base_batch: the effective batch, in samples, that `lr` and `beta2` were chosen for. None: the first one of the
            training, filled in by the caller.
        beta2: adamw: whether the memory of the squared gradient keeps its half-life in samples, see `scaled_beta2`.
    """

    lr: LRRule
    base_batch: int | None
    beta2: bool


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
        return min(1.0, float((position + 1) / schedule.warmup))
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


def with_warmup(schedule: ScheduleConfig, total: int | None, tenth: int | None) -> ScheduleConfig:
    """Replace `warmup=auto` by a length that fits.

    It is `tenth`, but no more than a tenth of a curve with an end of its own, and never into the decay of wsd.

    Args:
        schedule: the curve; a warm-up that is a number stays.
        total: length of the training in `schedule.unit`; None where the curve has an end of its own.
        tenth: a tenth of the training's steps, at most `MOST_WARMUP_STEPS`, in `schedule.unit`; None where unknown.

    Raises ConfigError where the length cannot be told.
    """
    if schedule.warmup != AUTO:
        return schedule
    if tenth is None:
        raise ConfigError(
            f"optim.schedule.warmup=auto cannot be converted to {schedule.unit.value}, because samples differ in "
            f"length. Set optim.schedule.warmup in {schedule.unit.value} (0 for none), or use "
            "optim.schedule.unit=steps or samples."
        )
    end = total if schedule.total is None else schedule.total
    assert end is not None, "a training of unknown length has no tenth either"
    most = end - schedule.decay if schedule.name is ScheduleName.wsd else end
    if schedule.total is not None:
        most = min(most, end // 10)
    return replace(schedule, warmup=max(0, min(tenth, most)))


def lr_scale(ratio: float, rule: LRRule) -> float:
    """The factor of the learning rate where the effective batch is `ratio` times the base batch; exactly 1 at 1.

    * linear: the ratio, for SGD. Goyal et al., "Accurate, Large Minibatch SGD", 2017.
    * sqrt: its square root, which keeps the noise of an update. Krizhevsky, "One weird trick for parallelizing
      convolutional neural networks", 2014; for Adam, Malladi et al., "On the SDEs and Scaling Rules for Adaptive
      Gradient Algorithms", 2022. They scale both betas and eps as well; here beta2 can be, by `scaled_beta2`.
    """
    if rule is LRRule.none:
        return 1.0
    return ratio if rule is LRRule.linear else math.sqrt(ratio)


def scaled_beta2(beta2: float, ratio: float) -> float:
    """The beta2 that forgets as much per sample as `beta2` does at the base batch: beta2 ** ratio; exact at 1.

    Marek et al., "Small Batch Size Training for Language Models", 2025: the half-life in tokens stays. To first order
    it is the rule of Malladi et al. (2022), 1 - ratio (1 - beta2), but it never leaves [0, 1).
    """
    return float(beta2**ratio)


@final
class LRSchedule:
    """Sets the learning rate of every group by position. It counts nothing, so a resumed run is on the same curve.

    The peak of each group is read once, here: its "initial_lr" if it has one (torch's schedulers write it too), else
    its "lr", which is kept as "initial_lr". Hence an optimizer that was loaded in mid-curve gives its peak as well.
    With a `scale`, the same holds for the second of its "betas", kept as "initial_beta2".

    `total` is the length of the training in `config.unit`, as in `lr_factor`, which also says what is refused.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        config: ScheduleConfig,
        total: int | None,
        scale: ScaleConfig | None = None,
    ) -> None:
        _check_schedule(config, total)
        self._optimizer = optimizer
        self._config = config
        self.warmup: int = config.warmup
        self._total = total
        self._rule = scale.lr if scale else LRRule.none
        self._scales_beta2 = scale is not None and scale.beta2
        self._base_batch = _base_batch(scale, optimizer)
        self._peaks = [float(group.setdefault("initial_lr", group["lr"])) for group in optimizer.param_groups]
        self._beta2s = [
            float(group.setdefault("initial_beta2", group["betas"][1])) if scale and "betas" in group else None
            for group in optimizer.param_groups
        ]

    def set(self, position: int, effective_batch: int | None = None) -> float:
        """Write peak times `lr_factor` times `lr_scale`, and `scaled_beta2`, into each group. Call it before a step.

        torch corrects the start of Adam's averages by beta2 ** step, as if beta2 had always been what it is now. After
        a change within the first few times 1 / (1 - beta2) steps, updates are therefore too large for a while where the
        batch grew, too small where it shrank, by up to the square root of the change.

        Args:
            position: steps, samples or tokens (`config.unit`) of all ranks before this step, the same on every rank.
            effective_batch: samples that the plan asks for here, `Window.effective_batch`; needed where a scale
                follows it. Not the window's size: the few samples at an epoch's end are no regime of their own, and
                with one effective batch all along the lr and beta2 that were chosen for it hold throughout.

        Returns:
            The learning rate of the first group.
        """
        factor, ratio = lr_factor(position, self._config, self._total), self._ratio(effective_batch)
        for group, peak, beta2 in zip(self._optimizer.param_groups, self._peaks, self._beta2s, strict=True):
            group["lr"] = peak * factor * lr_scale(ratio, self._rule)
            if beta2 is not None:
                group["betas"] = (group["betas"][0], scaled_beta2(beta2, ratio if self._scales_beta2 else 1.0))
        return float(self._optimizer.param_groups[0]["lr"])

    def _ratio(self, effective_batch: int | None) -> float:
        if self._base_batch is None:
            return 1.0
        if effective_batch is None:
            raise ValueError("optim.scale follows the effective batch: call set(position, window.effective_batch)")
        return effective_batch / self._base_batch


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
        fits = f"a warmup of at most {end - decay}" if decay <= end else f"a decay of at most {max(1, end)}"
        raise ConfigError(
            f"{key}: a warmup of {schedule.warmup} and the decay of {name} (at least {decay}) do not fit into {end} "
            f"{unit}; use {fits}, or a longer training"
        )
    return end


def _base_batch(scale: ScaleConfig | None, optimizer: torch.optim.Optimizer) -> int | None:
    """Refuse a scaling that has no meaning; return what it is relative to, or None where nothing scales."""
    if scale is None or (scale.lr is LRRule.none and not scale.beta2):
        return None
    if scale.base_batch is None or scale.base_batch < 1:
        raise ConfigError(
            f"optim.scale.base_batch ({scale.base_batch}) is the effective batch, in samples, that optim.lr was chosen "
            "for; it must be at least 1. Where nothing shall scale: optim.scale.lr=none optim.scale.beta2=false"
        )
    if scale.beta2 and not all("betas" in group for group in optimizer.param_groups):
        raise ConfigError(
            f"optim.scale.beta2=true needs an optimizer with betas, and {type(optimizer).__name__} has none; use "
            "optim=adamw, or optim.scale.beta2=false"
        )
    return scale.base_batch
