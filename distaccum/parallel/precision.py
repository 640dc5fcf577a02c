"""Defines in which dtypes a model is stored and computes.

The dtype in which gradients are summed is a separate choice, see `distaccum.grads`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch.distributed.fsdp import MixedPrecisionPolicy


class Precision(Enum):
    """Names the dtypes of a model's parameters and computation.

    bf16 and fp16 keep float32 parameters and compute matrix products in 16 bits; fp16 needs a loss
    scale. bf16_pure keeps parameters, gradients and optimizer state in bfloat16 too. fp64 is for
    proofs.
    """

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"
    bf16_pure = "bf16_pure"
    fp64 = "fp64"

    @property
    def parameter_dtype(self) -> torch.dtype:
        """Return the dtype of parameters, gradients and optimizer state."""
        return {Precision.fp64: torch.float64, Precision.bf16_pure: torch.bfloat16}.get(
            self, torch.float32
        )

    @property
    def compute_dtype(self) -> torch.dtype:
        """Return the dtype of matrix products."""
        return {Precision.bf16: torch.bfloat16, Precision.fp16: torch.float16}.get(
            self, self.parameter_dtype
        )

    def sharded_policy(self, reduce_dtype: torch.dtype | None) -> MixedPrecisionPolicy:
        """Return this precision as a policy for FSDP2, which casts parameters when it gathers them.

        Args:
            reduce_dtype: the dtype in which FSDP2 sums gradients, over micro-batches and over
                ranks; None: float32 or wider.
        """
        from torch.distributed.fsdp import MixedPrecisionPolicy

        compute, stored = self.compute_dtype, self.parameter_dtype
        if reduce_dtype is None and compute in (torch.bfloat16, torch.float16):
            reduce_dtype = torch.float32
        return MixedPrecisionPolicy(
            param_dtype=compute if compute is not stored else None, reduce_dtype=reduce_dtype
        )  # fmt: skip


@dataclass
class PrecisionConfig:
    """Configures the dtype in which the model computes and, for fp16, the loss scale."""

    name: Precision
    loss_scale: float
    loss_scale_growth_windows: int
