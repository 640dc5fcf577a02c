"""Sets the learning rate, and Adam's beta2, from the position and the effective batch size."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, final

import torch

from distaccum.core.batch_schedule import ScheduleUnit
from distaccum.errors import ConfigError
from distaccum.optim.scale import LRRule, ScaleConfig, base_batch, lr_scale, scaled_beta2

AUTO = "auto"  # a warmup that depends on the length of the training, see `with_warmup`
MOST_WARMUP_STEPS = 20  # the longest such warmup


class ScheduleName(Enum):
    """Names the curve of the learning rate, see `lr_factor`; wsd is warmup, stable, decay."""

    constant = "constant"
    linear = "linear"
    cosine = "cosine"
    wsd = "wsd"


@dataclass
class ScheduleConfig:
    """Configures a learning-rate schedule; conf/optim has the values.

    Attributes:
        name: the curve after the warmup.
        unit: what positions and lengths count. The caller passes positions in this unit.
        warmup: length of the linear warmup; 0: none. auto: filled in by the caller, see
            `with_warmup`.
        total: where the curve ends. None: at the end of the training, filled in by the caller.
        decay: length of the decay of wsd; other curves ignore it.
        final_ratio: the learning rate at the end as a fraction of `lr`, in [0, 1]; constant ignores
            it.
    """

    name: ScheduleName
    unit: ScheduleUnit
    warmup: Any  # an int or "auto", a union that OmegaConf does not support
    total: int | None
    decay: int
    final_ratio: float


def lr_factor(position: float, schedule: ScheduleConfig, total: int | None) -> float:
    """Return the learning rate at a position, as a fraction of the peak.

    A position is what was consumed **before** the step, in `schedule.unit` over all ranks; ranks
    and micro-batches do not matter here. With the end E = `schedule.total`, or `total` if that is
    None, and the warmup W:

    * warmup, position < W: (position + 1) / W. Position 0 gives 1 / W, the last position of the
      warmup gives 1.
    * then, with x = (position - W) / (E - W) and f = `final_ratio`: linear is 1 - (1 - f) x; cosine
      is f + (1 - f) (1 + cos(pi x)) / 2 (Loshchilov and Hutter, "SGDR", 2017); wsd is 1, and over
      the last `decay` units before E linear from 1 to f; constant is 1.
    * from E on: exactly f, but 1 for constant.

    N steps therefore have positions 0 ... N - 1, and f itself is the value at N, when training is
    over. The last step is not lost to a learning rate of 0: for linear its factor is f + (1 - f) /
    (N - W).

    Args:
        position: >= 0.
        schedule: the curve.
        total: length of the training in `schedule.unit`; None if it is unknown.

    Returns:
        The factor, which is continuous in the position: in (0, 1] during warmup, then in [f, 1].

    Raises:
        ConfigError: if the lengths do not fit into each other, or a decaying curve has no end.
        ValueError: if the position is negative.
    """
    end = _check_schedule(schedule, total)
    if not position >= 0:
        raise ValueError(f"the position in a schedule must be at least 0, got {position}")
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

    The length is `tenth`, but at most a tenth of `schedule.total` if that is set, and it never
    reaches into the decay of wsd.

    Args:
        schedule: the curve; a warmup that is a number is not changed.
        total: length of the training in `schedule.unit`; None if the curve has an end of its own.
        tenth: a tenth of the training's steps, at most `MOST_WARMUP_STEPS`, in `schedule.unit`;
            None if unknown.

    Raises:
        ConfigError: if the length is unknown in this unit.
    """
    if schedule.warmup != AUTO:
        return schedule
    if tenth is None:
        raise ConfigError(
            f"optim.schedule.warmup=auto cannot be converted to {schedule.unit.value}, because "
            f"samples differ in length. Set optim.schedule.warmup in {schedule.unit.value} (0 for "
            "none), or use optim.schedule.unit=steps or samples."
        )
    end = total if schedule.total is None else schedule.total
    assert end is not None, "`tenth` is None if the length of the training is unknown"
    most = end - schedule.decay if schedule.name is ScheduleName.wsd else end
    if schedule.total is not None:
        most = min(most, end // 10)
    return replace(schedule, warmup=max(0, min(tenth, most)))


@final
class LRSchedule:
    """Sets the learning rate of every parameter group by position.

    It has no counter, so a resumed run is on the same curve. The constructor reads the peak of each
    group once: its "initial_lr" if it has one (torch's schedulers write it too), otherwise its
    "lr", which is then stored as "initial_lr". An optimizer that was loaded in the middle of a
    curve therefore gives its peak as well. With a `scale`, this also holds for the second of its
    "betas", stored as "initial_beta2".

    Args:
        optimizer: the optimizer whose groups are set.
        config: the curve.
        total: length of the training in `config.unit`; None if it is unknown.
        scale: what depends on the effective batch size; None: nothing.

    Raises:
        ConfigError: if `lr_factor` refuses the curve, or the scaling has no base batch size or no
            betas.
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
        self._scale = scale or ScaleConfig(LRRule.none, None, False)
        self._base_batch = base_batch(self._scale, optimizer)
        self._peaks = [
            float(group.setdefault("initial_lr", group["lr"])) for group in optimizer.param_groups
        ]
        self._beta2s = [
            (
                float(group.setdefault("initial_beta2", group["betas"][1]))
                if scale and "betas" in group
                else None
            )
            for group in optimizer.param_groups
        ]

    def set(self, position: int, effective_batch_size: int | None = None) -> float:
        """Write the learning rate and beta2 of a step into each group; call it before the step.

        The learning rate is peak times `lr_factor` times `lr_scale`, and beta2 is `scaled_beta2`.

        torch corrects the start of Adam's averages by beta2 ** step, as if beta2 had always had its
        present value. After a change within the first few times 1 / (1 - beta2) steps, updates are
        therefore too large for a while if the batch grew, and too small if it shrank, by up to the
        square root of the change.

        Args:
            position: steps, samples or tokens (`config.unit`) of all ranks before this step, the
                same on every rank.
            effective_batch_size: samples that the plan asks for here,
                `Window.effective_batch_size`; required if something is scaled. It is not the number
                of samples in the window: the few samples at the end of an epoch do not change the
                scaling. With a constant effective batch size, the chosen lr and beta2 apply
                throughout.

        Returns:
            The learning rate of the first group.
        """
        factor = lr_factor(position, self._config, self._total)
        ratio = self._ratio(effective_batch_size)
        for group, peak, beta2 in zip(
            self._optimizer.param_groups, self._peaks, self._beta2s, strict=True
        ):
            group["lr"] = peak * factor * lr_scale(ratio, self._scale.lr)
            if beta2 is not None:
                group["betas"] = (
                    group["betas"][0],
                    scaled_beta2(beta2, ratio if self._scale.beta2 else 1.0),
                )
        return float(self._optimizer.param_groups[0]["lr"])

    def _ratio(self, effective_batch_size: int | None) -> float:
        if self._base_batch is None:
            return 1.0
        if effective_batch_size is None:
            raise ValueError(
                "optim.scale needs the effective batch size: set(position, "
                "window.effective_batch_size)"
            )
        return effective_batch_size / self._base_batch


def _check_schedule(schedule: ScheduleConfig, total: int | None) -> int | None:
    """Refuse a schedule that does not fit its length, and return its end (constant: None)."""
    key, unit = "optim.schedule", schedule.unit.value
    if schedule.warmup < 0:
        raise ConfigError(f"{key}.warmup ({schedule.warmup}) must be 0 (none) or more {unit}.")
    if schedule.name is ScheduleName.constant:
        return None
    if not 0 <= schedule.final_ratio <= 1:
        raise ConfigError(
            f"{key}.final_ratio ({schedule.final_ratio}) must be in [0, 1], as a fraction of "
            "optim.lr."
        )
    end = total if schedule.total is None else schedule.total
    name = schedule.name.value
    if end is None:
        raise ConfigError(
            f"{key}.name={name} needs an end. Set {key}.total (in {unit}), or use "
            f"{key}.name=constant."
        )
    decay = schedule.decay if schedule.name is ScheduleName.wsd else 1
    if decay < 1:
        raise ConfigError(
            f"{key}.decay ({decay}) must be at least 1 with name=wsd. For no decay, use "
            "name=constant."
        )
    if schedule.warmup + decay > end:
        fits = (
            f"a warmup of at most {end - decay}"
            if decay <= end
            else f"a decay of at most {max(1, end)}"
        )
        raise ConfigError(
            f"{key}: a warmup of {schedule.warmup} and the decay of {name} (at least {decay}) do "
            f"not fit into {end} {unit}. Use {fits}, or a longer training."
        )
    return end
