"""Compares tokens per second and peak memory of distaccum with a hand-written loop, on GPT-2 124M.

Both run in one process, in turns. This is a quick guard for the GPU check. gpu.py measures with
more care and compares with the peers.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from gpu_arms import (
    GPT2_124M,
    TINY,
    MicroBatch,
    MicroBatchSet,
    Sizes,
    Training,
    adamw,
    by_hand,
    ours,
)
from gpu_ranks import Found, Place
from torch import nn

NUM_MICRO_BATCHES = 8
# Guards against gross regressions, not claims: the loops issue the same kernels, and a busy machine
# adds noise.
SLOWEST, LARGEST = 0.95, 1.05

# loss and gradient norm of each window
Loop = Callable[[Sequence[MicroBatch]], list[tuple[float, float]]]


def loop_of(
    arm: Callable[[Training], None],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
) -> Loop:
    """Return a loop that trains the model on windows of NUM_MICRO_BATCHES micro-batches."""

    def loop(micro_batches: Sequence[MicroBatch]) -> list[tuple[float, float]]:
        windows: list[tuple[float, float]] = []

        def report(loss: float, norm: float) -> None:
            windows.append((loss, norm))

        arm(Training(model, optimizer, device, micro_batches, NUM_MICRO_BATCHES, report))
        return windows

    return loop


def speed(place: Place) -> Found:
    """Time blocks of windows in turns (hand-written, ours, ...) and compare medians over blocks."""
    found, device = Found(), place.device
    blocks, block_s = (2, 0.2) if place.tiny else (4, 12.0)
    asked = TINY if place.tiny else GPT2_124M
    model = asked.model().to(device)
    # Both loops share model and optimizer, so that speed and memory differ by the loop alone.
    optimizer = adamw(model, lr=0.0)
    loops = {
        name: loop_of(arm, model, optimizer, device)
        for name, arm in (("by hand", by_hand), ("ours", ours))
    }

    sizes = _largest_micro_batch(asked, loops["by hand"], device)
    one_window = MicroBatchSet(sizes, NUM_MICRO_BATCHES, NUM_MICRO_BATCHES, device)
    tokens = NUM_MICRO_BATCHES * sizes.micro_batch_size * sizes.length
    found.figures |= {
        "model": f"GPT {sizes.layers} layers, {sizes.heads} heads, width {sizes.width}, "
        f"vocabulary {sizes.vocab}, sequences of {sizes.length}",
        "data": "random tokens",
        "parameters": sum(p.numel() for p in model.parameters()),
        "micro": sizes.micro_batch_size, "micro-batches per window": NUM_MICRO_BATCHES,
        "tokens per window": tokens,
    }  # fmt: skip

    # With a learning rate of 0 both see the same weights and must compute the same numbers.
    first = {name: loop(one_window)[0] for name, loop in loops.items()}
    for index, what in enumerate(("loss", "gradient norm")):
        hand, own = first["by hand"][index], first["ours"][index]
        found.figures[f"{what}, by hand and ours"] = [hand, own]
        # float32 sums of bf16 products in two orders
        found.require(
            abs(own / hand - 1) <= 1e-3,
            f"the loops differ: {what} {hand} in the hand-written one, {own} in ours",
        )

    for group in optimizer.param_groups:
        group["lr"] = 1e-4
    seconds = _seconds(loops["by hand"], list(one_window) * 2, device) / 2
    num_windows = max(2, min(200, round(block_s / seconds)))
    micro_batches = list(one_window) * num_windows
    rates: dict[str, list[float]] = {name: [] for name in loops}
    peaks: dict[str, list[int]] = {name: [] for name in loops}
    for _ in range(blocks):
        for name, loop in loops.items():
            loop(one_window)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            rates[name].append(num_windows * tokens / _seconds(loop, micro_batches, device))
            if device.type == "cuda":
                peaks[name].append(torch.cuda.max_memory_allocated(device))
    found.figures["windows per block"] = num_windows
    for name, values in rates.items():
        found.figures[f"tokens/s {name}"] = _summary(values)
    ratio = statistics.median(rates["ours"]) / statistics.median(rates["by hand"])
    found.figures["ratio of tokens/s, ours to by hand"] = ratio
    if device.type == "cuda":
        found.figures |= {
            f"peak memory in MiB {name}": max(values) / 2**20 for name, values in peaks.items()
        }
        memory = max(peaks["ours"]) / max(peaks["by hand"])
        found.figures["ratio of peak memory, ours to by hand"] = memory
        found.require(
            ratio >= SLOWEST,
            f"ours has {ratio:.3f} of the hand-written loop's tokens/s, at least {SLOWEST}",
        )
        found.require(
            memory <= LARGEST,
            f"ours takes {memory:.3f} of the hand-written loop's memory, at most {LARGEST}",
        )
    return found


def _largest_micro_batch(sizes: Sizes, loop: Loop, device: torch.device) -> Sizes:
    """Halve the micro-batch size until a window fits into three quarters of the device's memory."""
    while True:
        try:
            if device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(device)
            loop(MicroBatchSet(sizes, NUM_MICRO_BATCHES, NUM_MICRO_BATCHES, device))
        except torch.cuda.OutOfMemoryError:
            fits = False
        else:
            fits = True
            if device.type == "cuda":
                # With less room, the allocator's retries would be measured instead of the loops.
                total = torch.cuda.get_device_properties(device).total_memory
                fits = torch.cuda.max_memory_allocated(device) <= 0.75 * total
        if fits:
            return sizes
        if sizes.micro_batch_size == 1:
            raise RuntimeError(
                "GPT-2 124M does not fit into this GPU's memory with a micro-batch of 1 x 1024 "
                "tokens"
            )
        sizes = replace(sizes, micro_batch_size=sizes.micro_batch_size // 2)


def _seconds(loop: Loop, micro_batches: Sequence[MicroBatch], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    loop(micro_batches)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def _summary(values: list[float]) -> dict[str, Any]:
    return {
        "median": statistics.median(values),
        "least": min(values),
        "most": max(values),
        "blocks": values,
    }
