"""Sums of gradients in another dtype than the one in which autograd delivers them, on a rank and between ranks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distaccum.core.loss import wide

BUCKET_BYTES = 25 * 2**20  # of one all-reduce, like DDP's own buckets


class SumDtype(Enum):
    """In which dtype gradients are summed."""

    fp64 = "fp64"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"

    @property
    def torch(self) -> torch.dtype:
        """As torch calls it."""
        names = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
        return names[self.value]


@dataclass(frozen=True)
class GradientDtypes:
    """In which dtype gradients are summed; None: float32, or the parameter's own where that is wider."""

    accumulate: torch.dtype | None = None  # over the micros of one rank
    reduce: torch.dtype | None = None  # over ranks, and so what travels

    def accumulated(self, parameter: Tensor) -> torch.dtype:
        """Of one parameter's sum over micros."""
        return self.accumulate or wide(parameter.dtype)

    def reduced(self, parameter: Tensor) -> torch.dtype:
        """Of one parameter's sum over ranks."""
        return self.reduce or wide(parameter.dtype)

    def are_own(self, parameters: Iterable[nn.Parameter]) -> bool:
        """Whether both are the dtype of every trained parameter, so that autograd's own accumulation will do."""
        trained = [p for p in parameters if p.requires_grad]
        return all(p.dtype is self.accumulated(p) and p.dtype is self.reduced(p) for p in trained)


class GradientSums:
    """Sums each parameter's gradient over a window in a dtype of our choice and hands it back once, rounded once.

    A bf16 sum stalls: adding 1 to 256 gives 256 again, so that of 512 equal micro-batches half are lost.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        dtypes: GradientDtypes,
        group: dist.ProcessGroup | None = None,
        *,
        reduce_each: bool = False,
    ) -> None:
        """Serve the parameters that are trained.

        Args:
            parameters: of the model.
            dtypes: of the sums.
            group: the ranks over which to reduce, where nothing else does.
            reduce_each: whether to reduce each micro's gradient and not the window's.
        """
        self.parameters = [p for p in parameters if p.requires_grad]
        self._dtypes = dtypes
        self._group = group
        self._reduce_each = reduce_each
        self._sums: dict[int, Tensor] = {}

    @torch.no_grad()
    def absorb(self) -> None:
        """Add the gradients of one backward and clear them."""
        fresh = {i: p.grad.to(self._dtypes.accumulated(p)) for i, p in enumerate(self.parameters) if p.grad is not None}
        for parameter in self.parameters:
            parameter.grad = None
        if self._reduce_each:
            fresh = self._reduced(fresh)
        known = [index for index in fresh if index in self._sums]
        if known:
            torch._foreach_add_([self._sums[index] for index in known], [fresh[index] for index in known])
        self._sums = fresh | self._sums

    @torch.no_grad()
    def deliver(self) -> None:
        """Put the sums into `.grad` in the parameters' dtype, reduced over ranks where that is ours to do."""
        sums = self._sums if self._reduce_each else self._reduced(self._sums)
        for index, total in sums.items():
            self.parameters[index].grad = total.to(self.parameters[index].dtype)
        self._sums = {}

    def clear(self) -> None:
        """Forget the sums of an unfinished window."""
        self._sums = {}

    def messages(self) -> list[int]:
        """The bytes of each all-reduce of one reduction."""
        if self._group is None:
            return []
        sizes = [p.numel() * self._dtypes.reduced(p).itemsize for p in self.parameters]
        return [sum(sizes[index] for index in bucket) for bucket in _buckets(sizes)]

    def _reduced(self, sums: dict[int, Tensor]) -> dict[int, Tensor]:
        """Sums over ranks, a few large all-reduces in flight together."""
        if self._group is None:
            return sums
        narrowed = [
            # Ranks may have used different parameters; all must send the same ones.
            sums[i].to(self._dtypes.reduced(p)) if i in sums else torch.zeros_like(p, dtype=self._dtypes.reduced(p))
            for i, p in enumerate(self.parameters)
        ]
        sent = []
        for bucket in _buckets([tensor.nbytes for tensor in narrowed]):
            flat = torch.cat([narrowed[index].flatten() for index in bucket])
            sent.append((bucket, flat, dist.all_reduce(flat, group=self._group, async_op=True)))
        reduced = {}
        for bucket, flat, work in sent:
            work.wait()
            for index, part in zip(bucket, flat.split([narrowed[index].numel() for index in bucket]), strict=True):
                parameter = self.parameters[index]
                reduced[index] = part.view_as(parameter).to(self._dtypes.accumulated(parameter))
        return reduced


def _buckets(sizes: list[int]) -> list[list[int]]:
    """Numbers of consecutive messages in groups of about `BUCKET_BYTES`, the last ones first as in a backward."""
    groups: list[list[int]] = []
    filled = BUCKET_BYTES
    for index in reversed(range(len(sizes))):
        if filled >= BUCKET_BYTES:
            groups.append([])
            filled = 0
        groups[-1].append(index)
        filled += sizes[index]
    return groups
