"""Float32 accumulation for gradients that autograd delivers in bf16 or fp16."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

BUCKET_BYTES = 25 * 2**20  # of one all-reduce, like DDP's own buckets


class WideGradients:
    """Sums each parameter's gradient in float32 over a window and hands it back once, rounded once.

    A bf16 sum stalls: adding 1 to 256 gives 256 again, so that of 512 equal micro-batches half are lost.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], reduce: Callable[[list[Tensor]], None] | None = None
    ) -> None:
        """Serve the parameters that are trained; `reduce` makes the sums global in place, where nothing else does."""
        self._parameters = [p for p in parameters if p.requires_grad]
        self._reduce = reduce
        self._sums: dict[int, Tensor] = {}

    @torch.no_grad()
    def absorb(self) -> None:
        """Add the gradients of one backward and clear them."""
        known_sums, known_grads = [], []
        for index, parameter in enumerate(self._parameters):
            grad = parameter.grad
            if grad is None:
                continue
            if index in self._sums:
                known_sums.append(self._sums[index])
                known_grads.append(grad)
            else:
                self._sums[index] = grad.float()
            parameter.grad = None
        if known_sums:
            torch._foreach_add_(known_sums, [grad.float() for grad in known_grads])

    @torch.no_grad()
    def deliver(self) -> None:
        """Reduce the sums over ranks, where that is ours to do, and put them into `.grad` in the parameters' dtype."""
        if self._reduce is not None:
            # Ranks may have used different parameters; all must send the same ones.
            for index, parameter in enumerate(self._parameters):
                if index not in self._sums:
                    self._sums[index] = torch.zeros_like(parameter, dtype=torch.float32)
            self._reduce([self._sums[index] for index in range(len(self._parameters))])
        for index, total in self._sums.items():
            self._parameters[index].grad = total.to(self._parameters[index].dtype)
        self._sums.clear()

    def clear(self) -> None:
        """Forget the sums of an unfinished window."""
        self._sums.clear()


def is_narrow(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether any trained parameter is of a dtype in which sums stall."""
    return any(p.requires_grad and p.dtype in (torch.bfloat16, torch.float16) for p in parameters)


def buckets(tensors: list[Tensor]) -> list[list[Tensor]]:
    """Consecutive tensors in groups of about `BUCKET_BYTES`, the last ones first as backward delivers them."""
    groups: list[list[Tensor]] = []
    size = BUCKET_BYTES
    for tensor in reversed(tensors):
        if size >= BUCKET_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.numel() * tensor.element_size()
    return groups


def all_reduce_sum(tensors: list[Tensor], group: dist.ProcessGroup) -> None:
    """Replace each tensor by its sum over ranks, in place, a few large all-reduces in flight together."""
    flats = []
    for bucket in buckets(tensors):
        flat = torch.cat([tensor.flatten() for tensor in bucket])
        flats.append((bucket, flat, dist.all_reduce(flat, group=group, async_op=True)))
    for bucket, flat, work in flats:
        work.wait()
        parts = flat.split([tensor.numel() for tensor in bucket])
        torch._foreach_copy_(bucket, [part.view_as(tensor) for part, tensor in zip(parts, bucket, strict=True)])
