"""Scales the learning rate, and Adam's beta2, with the effective batch size."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

import torch

from distaccum.errors import ConfigError


class LRRule(Enum):
    """Names how the learning rate depends on the effective batch size B; B0 is `base_batch`."""

    none = "none"  # not at all
    linear = "linear"  # B / B0, for SGD
    sqrt = "sqrt"  # the square root of B / B0, for Adam


@dataclass
class ScaleConfig:
    """Configures what is scaled if the effective batch size differs from the one tuned for.

    Attributes:
        lr: the rule for the learning rate.
        base_batch: the effective batch size, in samples, for which `lr` and `beta2` were chosen.
            None: the first one of the training, filled in by the caller.
        beta2: adamw: whether the average squared gradient keeps its half-life in samples, see
            `scaled_beta2`.
    """

    lr: LRRule
    base_batch: int | None
    beta2: bool


def lr_scale(ratio: float, rule: LRRule) -> float:
    """Return the factor of the learning rate for an effective batch `ratio` times the base batch.

    It is exactly 1 if the ratio is 1 or the rule is none.

    * linear: the ratio, for SGD. Goyal et al., "Accurate, Large Minibatch SGD", 2017.
    * sqrt: the square root of the ratio, which keeps the noise of an update. Krizhevsky, "One weird
      trick for parallelizing convolutional neural networks", 2014; for Adam, Malladi et al., "On
      the SDEs and Scaling Rules for Adaptive Gradient Algorithms", 2022. Malladi et al. scale both
      betas and eps as well; here only beta2 can be scaled, by `scaled_beta2`.
    """
    if rule is LRRule.none:
        return 1.0
    return ratio if rule is LRRule.linear else math.sqrt(ratio)


def scaled_beta2(beta2: float, ratio: float) -> float:
    """Return the beta2 that forgets as much per sample as `beta2` does at the base batch size.

    It is beta2 ** ratio, where `ratio` is the effective batch size / the base batch size. The
    half-life in tokens is constant (Marek et al., "Small Batch Size Training for Language Models",
    2025). To first order this is the rule of Malladi et al. (2022), 1 - ratio (1 - beta2), but it
    never leaves [0, 1).
    """
    return float(beta2**ratio)


def base_batch(scale: ScaleConfig, optimizer: torch.optim.Optimizer) -> int | None:
    """Refuse an impossible scaling, and return its base batch size (None if nothing is scaled)."""
    if scale.lr is LRRule.none and not scale.beta2:
        return None
    if scale.base_batch is None or scale.base_batch < 1:
        raise ConfigError(
            f"optim.scale.base_batch ({scale.base_batch}) is the effective batch size, in samples, "
            "for which optim.lr was chosen; it must be at least 1. To scale nothing, write "
            "optim.scale.lr=none optim.scale.beta2=false"
        )
    if scale.beta2 and not all("betas" in group for group in optimizer.param_groups):
        raise ConfigError(
            f"optim.scale.beta2=true needs an optimizer with betas, but {type(optimizer).__name__} "
            "has none. Use optim=adamw, or optim.scale.beta2=false"
        )
    return scale.base_batch
