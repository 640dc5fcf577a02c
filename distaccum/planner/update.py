"""Measures the memory of an optimizer's state and update by running it on fake tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer

from distaccum._torch import fake_tensors
from distaccum.planner.meter import Tracker


@dataclass(frozen=True)
class Update:
    """Holds the bytes of an optimizer on one rank."""

    kept: int  # optimizer state after the first update
    transient: int  # further bytes at the peak of an update


def update(
    make: Callable[[nn.Module], Optimizer],
    shapes: Sequence[tuple[tuple[int, ...], torch.dtype]],
    device: str | torch.device = "cpu",
) -> Update:
    """Run two optimizer updates on fake parameters, and return the bytes that they take.

    Args:
        make: makes an optimizer for the parameters of a module.
        shapes: shape and dtype of this rank's part of each trained parameter.
        device: the device whose memory is counted. Counts of updates are on the host, except for
            those of a fused optimizer.
    """
    device = torch.device(device)
    without_memory = fake_tensors()
    with without_memory:
        tensors = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in shapes]
        module = nn.ParameterList([nn.Parameter(tensor) for tensor in tensors])
        for parameter in module:
            parameter.grad = torch.empty_like(parameter)
    optimizer = make(module)
    # Python reads the values of update counts on the host, so these tensors must be real. A fused
    # kernel reads its counts on the device, so they may be fake.
    fused = any(group.get("fused") for group in optimizer.param_groups)
    tracker = Tracker(kind=device.type, fake_tensors=True)
    tracker.count([tensor for p in module for tensor in (p, p.grad) if tensor is not None])
    before = tracker.live
    with without_memory if fused else nullcontext(), tracker:
        optimizer.step()
        kept = tracker.live - before
        tracker.reset_peak()
        optimizer.step()
    return Update(kept, max(0, tracker.peak - before - kept))
