"""Sums gradients over micro-batches and ranks in another dtype than autograd does."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distaccum.core.loss import wide
from distaccum.core.traffic import fill_buckets

BUCKET_BYTES = 25 * 2**20  # size of one all-reduce, like DDP's own buckets


class SumDtype(Enum):
    """Names the dtypes in which gradients can be summed."""

    fp64 = "fp64"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"

    @property
    def torch(self) -> torch.dtype:
        """Return the torch dtype of this name."""
        names = {
            "fp64": torch.float64,
            "fp32": torch.float32,
            "bf16": torch.bfloat16,
            "fp16": torch.float16,
        }
        return names[self.value]


@dataclass(frozen=True)
class GradientDtypes:
    """Holds the dtypes in which gradients are summed.

    None means float32, or the parameter's own dtype if that is wider.
    """

    accumulate: torch.dtype | None = None  # over the micro-batches of one rank
    reduce: torch.dtype | None = None  # over ranks, which is also the dtype that is sent

    def accumulated(self, parameter: Tensor) -> torch.dtype:
        """Return the dtype of one parameter's gradient sum over micro-batches."""
        return self.accumulate or wide(parameter.dtype)

    def reduced(self, parameter: Tensor) -> torch.dtype:
        """Return the dtype of one parameter's gradient sum over ranks."""
        return self.reduce or wide(parameter.dtype)

    def are_own(self, parameters: Iterable[nn.Parameter]) -> bool:
        """Return whether both dtypes are those of every trained parameter.

        Then autograd's own accumulation is sufficient.
        """
        trained = [p for p in parameters if p.requires_grad]
        return all(p.dtype is self.accumulated(p) and p.dtype is self.reduced(p) for p in trained)


class GradientSums:
    """Sums each parameter's gradient over a window in a chosen dtype.

    The sum is rounded to the parameter's dtype only once, when it is delivered. A sum in bfloat16
    would stall: 256 + 1 is 256 again, so half of 512 equal micro-batches would be lost.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        dtypes: GradientDtypes,
        group: dist.ProcessGroup | None = None,
        *,
        reduce_each: bool = False,
    ) -> None:
        """Start with empty sums for all trained parameters.

        Args:
            parameters: the model's parameters; frozen ones are left out.
            dtypes: the dtypes of the sums.
            group: the ranks over which to reduce; None if something else reduces, or nothing does.
            reduce_each: True: reduce the gradient of each micro-batch. False: reduce the sum of the
                window.
        """
        self.parameters = [p for p in parameters if p.requires_grad]
        self._dtypes = dtypes
        self._group = group
        self._reduce_each = reduce_each
        self._sums: dict[int, Tensor] = {}

    @torch.no_grad()
    def absorb(self) -> None:
        """Add the gradients of one backward to the sums and clear them."""
        fresh = {
            i: p.grad.to(self._dtypes.accumulated(p))
            for i, p in enumerate(self.parameters)
            if p.grad is not None
        }
        for parameter in self.parameters:
            parameter.grad = None
        if self._reduce_each:
            fresh = self._reduced(fresh)
        known = [index for index in fresh if index in self._sums]
        if known:
            torch._foreach_add_(
                [self._sums[index] for index in known], [fresh[index] for index in known]
            )
        self._sums = fresh | self._sums

    @torch.no_grad()
    def deliver(self) -> None:
        """Write the sums into `.grad` in the parameters' dtype and start with empty sums.

        If there is a group, they are the sums over all its ranks.
        """
        sums = self._sums if self._reduce_each else self._reduced(self._sums)
        for index, total in sums.items():
            self.parameters[index].grad = total.to(self.parameters[index].dtype)
        self._sums = {}

    def clear(self) -> None:
        """Discard the sums of an unfinished window."""
        self._sums = {}

    def messages(self) -> list[int]:
        """Return the size in bytes of each all-reduce of one reduction."""
        if self._group is None:
            return []
        sizes = [p.numel() * self._dtypes.reduced(p).itemsize for p in self.parameters]
        return [sum(sizes[index] for index in bucket) for bucket in _buckets(sizes)]

    def _reduced(self, sums: dict[int, Tensor]) -> dict[int, Tensor]:
        """Sum over ranks by a few large all-reduces that run at the same time."""
        if self._group is None:
            return sums
        narrowed = [
            # Ranks may have used different parameters, but all must send the same ones.
            (
                sums[i].to(self._dtypes.reduced(p))
                if i in sums
                else torch.zeros_like(p, dtype=self._dtypes.reduced(p))
            )
            for i, p in enumerate(self.parameters)
        ]
        sent = []
        for bucket in _buckets([tensor.nbytes for tensor in narrowed]):
            flat = torch.cat([narrowed[index].flatten() for index in bucket])
            sent.append((bucket, flat, dist.all_reduce(flat, group=self._group, async_op=True)))
        reduced = {}
        for bucket, flat, work in sent:
            work.wait()
            for index, part in zip(
                bucket, flat.split([narrowed[index].numel() for index in bucket]), strict=True
            ):
                parameter = self.parameters[index]
                reduced[index] = part.view_as(parameter).to(self._dtypes.accumulated(parameter))
        return reduced


def _buckets(sizes: list[int]) -> list[list[int]]:
    """Group consecutive indices into buckets of about `BUCKET_BYTES`.

    The last indices come first, as in a backward.
    """
    last = len(sizes) - 1
    return [
        [last - position for position in bucket]
        for bucket in fill_buckets(sizes[::-1], BUCKET_BYTES)
    ]
