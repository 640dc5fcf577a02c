"""Tokens per second and peak memory of GPT-2 124M: ours against a loop written by hand, in one process, in turns.

A guard for the GPU check. What is measured with care, and against the peers, is in gpu.py.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from gpu_arms import GPT2_124M, TINY, Micro, Micros, Sizes, Training, adamw, by_hand, ours
from gpu_ranks import Found, Place
from torch import nn

NUM_MICROS = 8
# Guards against gross regressions, not claims: the loops issue the same kernels, and a busy machine adds noise.
SLOWEST, LARGEST = 0.95, 1.05

Loop = Callable[[Sequence[Micro]], list[tuple[float, float]]]  # loss and gradient norm of each window


def loop_of(
    arm: Callable[[Training], None], model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device
) -> Loop:
    """It trains on windows of NUM_MICROS."""

    def loop(micros: Sequence[Micro]) -> list[tuple[float, float]]:
        told: list[tuple[float, float]] = []
        arm(Training(model, optimizer, device, micros, NUM_MICROS, lambda loss, norm: told.append((loss, norm))))
        return told

    return loop


def speed(place: Place) -> Found:
    """Blocks of windows in turns: by hand, ours, by hand, ours, ...; medians over blocks."""
    found, device = Found(), place.device
    blocks, block_s = (2, 0.2) if place.tiny else (4, 12.0)
    asked = TINY if place.tiny else GPT2_124M
    model = asked.model().to(device)
    # One model and one optimizer for both loops: what differs is the loop alone, and so does the peak of memory.
    optimizer = adamw(model, lr=0.0)
    loops = {name: loop_of(arm, model, optimizer, device) for name, arm in (("by hand", by_hand), ("ours", ours))}

    sizes = _largest_micro(asked, loops["by hand"], device)
    one_window = Micros(sizes, NUM_MICROS, NUM_MICROS, device)
    tokens = NUM_MICROS * sizes.micro * sizes.length
    found.figures |= {
        "model": f"GPT {sizes.layers} layers, {sizes.heads} heads, width {sizes.width}, vocabulary {sizes.vocab}, "
        f"sequences of {sizes.length}",
        "data": "random tokens",
        "parameters": sum(p.numel() for p in model.parameters()),
        "micro": sizes.micro, "micros per window": NUM_MICROS, "tokens per window": tokens,
    }  # fmt: skip

    # With a learning rate of 0 both see the same weights: do they compute the same thing?
    told = {name: loop(one_window)[0] for name, loop in loops.items()}
    for index, what in enumerate(("loss", "gradient norm")):
        hand, own = told["by hand"][index], told["ours"][index]
        found.figures[f"{what}, by hand and ours"] = [hand, own]
        # float32 sums of bf16 products in two orders
        found.require(abs(own / hand - 1) <= 1e-3, f"the loops differ: {what} {hand} by hand, {own} ours")

    for group in optimizer.param_groups:
        group["lr"] = 1e-4
    seconds = _seconds(loops["by hand"], list(one_window) * 2, device) / 2
    num_windows = max(2, min(200, round(block_s / seconds)))
    micros = list(one_window) * num_windows
    rates: dict[str, list[float]] = {name: [] for name in loops}
    peaks: dict[str, list[int]] = {name: [] for name in loops}
    for _ in range(blocks):
        for name, loop in loops.items():
            loop(one_window)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            rates[name].append(num_windows * tokens / _seconds(loop, micros, device))
            if device.type == "cuda":
                peaks[name].append(torch.cuda.max_memory_allocated(device))
    found.figures["windows per block"] = num_windows
    for name, values in rates.items():
        found.figures[f"tokens/s {name}"] = _summary(values)
    ratio = statistics.median(rates["ours"]) / statistics.median(rates["by hand"])
    found.figures["ratio of tokens/s, ours to by hand"] = ratio
    if device.type == "cuda":
        found.figures |= {f"peak memory in MiB {name}": max(values) / 2**20 for name, values in peaks.items()}
        memory = max(peaks["ours"]) / max(peaks["by hand"])
        found.figures["ratio of peak memory, ours to by hand"] = memory
        found.require(ratio >= SLOWEST, f"ours has {ratio:.3f} of the hand-written loop's tokens/s, at least {SLOWEST}")
        found.require(
            memory <= LARGEST, f"ours takes {memory:.3f} of the hand-written loop's memory, at most {LARGEST}"
        )
    return found


def _largest_micro(sizes: Sizes, loop: Loop, device: torch.device) -> Sizes:
    """The asked one, halved until a window fits into three quarters of the device's memory."""
    while True:
        try:
            if device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(device)
            loop(Micros(sizes, NUM_MICROS, NUM_MICROS, device))
        except torch.cuda.OutOfMemoryError:
            fits = False
        else:
            fits = True
            if device.type == "cuda":
                # Not at the edge, where the allocator's retries would be measured instead of the loops.
                total = torch.cuda.get_device_properties(device).total_memory
                fits = torch.cuda.max_memory_allocated(device) <= 0.75 * total
        if fits:
            return sizes
        if sizes.micro == 1:
            raise RuntimeError("GPT-2 124M does not fit into this GPU's memory with a micro of 1 x 1024 tokens")
        sizes = replace(sizes, micro=sizes.micro // 2)


def _seconds(loop: Loop, micros: Sequence[Micro], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    loop(micros)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def _summary(values: list[float]) -> dict[str, Any]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values), "blocks": values}
