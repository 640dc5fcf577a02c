"""What an optimizer keeps and what its update takes on the way, asked of the optimizer itself without computing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer

from distaccum._torch import weightless
from distaccum.planner.meter import Tracker


@dataclass(frozen=True)
class Update:
    """Bytes on one rank."""

    kept: int  # the optimizer's state, from the first update on
    transient: int  # beside it, at the high point of an update


def update(
    make: Callable[[nn.Module], Optimizer],
    shapes: Sequence[tuple[tuple[int, ...], torch.dtype]],
    device: str | torch.device = "cpu",
) -> Update:
    """Run two updates of parameters that have no memory.

    Args:
        make: an optimizer over the parameters of a module.
        shapes: of what this rank holds of each trained parameter, and its dtype.
        device: whose memory is counted: counts of updates stay on the host, except for a fused optimizer's.
    """
    device = torch.device(device)
    without_memory = weightless()
    with without_memory:
        tensors = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in shapes]
        module = nn.ParameterList([nn.Parameter(tensor) for tensor in tensors])
        for parameter in module:
            parameter.grad = torch.empty_like(parameter)
    optimizer = make(module)
    # Counts on the host are read as numbers, so they must be real; a fused kernel reads them itself, with the rest.
    fused = any(group.get("fused") for group in optimizer.param_groups)
    tracker = Tracker(kind=device.type, weightless=True)
    tracker.count([tensor for p in module for tensor in (p, p.grad) if tensor is not None])
    before = tracker.live
    with without_memory if fused else nullcontext(), tracker:
        optimizer.step()
        kept = tracker.live - before
        tracker.reset_peak()
        optimizer.step()
    return Update(kept, max(0, tracker.peak - before - kept))
