"""Builds optimizers, and sets learning rate and beta2 before each step by position."""

from distaccum.core.batch_schedule import ScheduleUnit
from distaccum.optim.optimizer import (
    OptimConfig,
    OptimImplementation,
    OptimName,
    decay_groups,
    make_optimizer,
)
from distaccum.optim.scale import LRRule, ScaleConfig, lr_scale, scaled_beta2
from distaccum.optim.schedule import (
    AUTO,
    MOST_WARMUP_STEPS,
    LRSchedule,
    ScheduleConfig,
    ScheduleName,
    lr_factor,
    with_warmup,
)

__all__ = [
    "AUTO",
    "MOST_WARMUP_STEPS",
    "LRRule",
    "LRSchedule",
    "OptimConfig",
    "OptimImplementation",
    "OptimName",
    "ScaleConfig",
    "ScheduleConfig",
    "ScheduleName",
    "ScheduleUnit",
    "decay_groups",
    "lr_factor",
    "lr_scale",
    "make_optimizer",
    "scaled_beta2",
    "with_warmup",
]
