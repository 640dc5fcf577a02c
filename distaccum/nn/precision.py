"""In which dtype a model computes. Gradients are accumulated and reduced in float32 or wider, whatever it is."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy


class Precision(Enum):
    """fp64 serves proofs; bf16 keeps float32 parameters and computes matrix products in bfloat16."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp64 = "fp64"

    @property
    def parameter_dtype(self) -> torch.dtype:
        """The dtype of parameters, gradients and optimizer state."""
        return torch.float64 if self is Precision.fp64 else torch.float32

    @property
    def sharded_policy(self) -> MixedPrecisionPolicy:
        """The same for FSDP2, which casts parameters where they are gathered and reduces in float32."""
        if self is Precision.bf16:
            return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        return MixedPrecisionPolicy()

    def autocast(
        self, loss_sum: Callable[[nn.Module, Any], Any], device: torch.device
    ) -> Callable[[nn.Module, Any], Any]:
        """An objective's forward in this precision, for strategies whose parameters stay in float32."""
        if self is not Precision.bf16:
            return loss_sum

        def in_bf16(model: nn.Module, micro: Any) -> Any:
            with torch.autocast(device.type, torch.bfloat16):
                return loss_sum(model, micro)

        return in_bf16
