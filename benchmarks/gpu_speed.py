"""Tokens per second and peak memory of GPT-2 124M: ours against a loop written by hand, in one process, in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from gpu_ranks import Found, Place
from torch import Tensor, nn

import distaccum as da
from distaccum.models.gpt import GPT, GPTConfig

NUM_MICROS = 8
CLIP_NORM = 1.0
# Guards against gross regressions, not claims: the loops issue the same kernels, and a busy machine adds noise.
SLOWEST, LARGEST = 0.95, 1.05

Micro = tuple[Tensor, Tensor]
Loop = Callable[[list[Micro]], list[float]]  # trains on windows of NUM_MICROS; the loss of each


def by_hand(model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> tuple[Loop, list[float]]:
    """What one writes for one process and windows of equal size; and the gradient norms, as the loop goes."""
    norms: list[float] = []

    def loss_of(inputs: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            logits = model(inputs)
            return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())

    def loop(micros: list[Micro]) -> list[float]:
        losses = []
        for start in range(0, len(micros), NUM_MICROS):
            total = torch.zeros((), device=device)
            for inputs, labels in micros[start : start + NUM_MICROS]:
                loss = loss_of(inputs.to(device, non_blocking=True), labels.to(device, non_blocking=True)) / NUM_MICROS
                loss.backward()
                total += loss.detach()
            norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM, foreach=True)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            value, norm_value = torch.stack([total, norm]).tolist()  # one host sync a window, as ours
            losses.append(value)
            norms.append(norm_value)
        return losses

    return loop, norms


def ours(model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> tuple[Loop, list[float]]:
    """The same work through an accumulator."""
    norms: list[float] = []
    in_bf16 = da.autocast(da.CausalLM(shift=False), torch.bfloat16)
    accumulator = da.Accumulator(model, optimizer, in_bf16, clip_norm=CLIP_NORM)

    def loop(micros: list[Micro]) -> list[float]:
        losses = []
        for window in da.windows(micros, num_micros=NUM_MICROS):
            record = accumulator.step(window)
            losses.append(record.loss)
            norms.append(record.grad_norm)
        return losses

    return loop, norms


def speed(place: Place) -> Found:
    """Blocks of windows in turns: by hand, ours, by hand, ours, ...; medians over blocks."""
    found, device = Found(), place.device
    blocks, block_s = (2, 0.2) if place.tiny else (4, 12.0)
    sizes = (2, 2, 32, 256, 32) if place.tiny else (12, 12, 768, 50304, 1024)
    layers, heads, width, vocab, length = sizes
    torch.manual_seed(0)
    config = GPTConfig("gpt", vocab, length, num_layers=layers, num_heads=heads, width=width, dropout=0.0, bias=True)
    model = GPT(config).to(device)
    # One model and one optimizer for both loops: what differs is the loop alone, and so does the peak of memory.
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0, fused=True)
    loops = {"by hand": by_hand(model, optimizer, device), "ours": ours(model, optimizer, device)}

    micro = _largest_micro(2 if place.tiny else 16, loops["by hand"][0], vocab, length, device)
    one_window = _random_micros(NUM_MICROS, micro, vocab, length, device)
    tokens = NUM_MICROS * micro * length
    found.figures |= {
        "model": f"GPT {layers} layers, {heads} heads, width {width}, vocabulary {vocab}, sequences of {length}",
        "data": "random tokens",
        "parameters": sum(p.numel() for p in model.parameters()),
        "micro": micro, "micros per window": NUM_MICROS, "tokens per window": tokens,
    }  # fmt: skip

    # With a learning rate of 0 both see the same weights: do they compute the same thing?
    told = {}
    for name, (loop, norms) in loops.items():
        loss = loop(one_window)[0]
        told[name] = (loss, norms[-1])
    for index, what in enumerate(("loss", "gradient norm")):
        hand, own = told["by hand"][index], told["ours"][index]
        found.figures[f"{what}, by hand and ours"] = [hand, own]
        # float32 sums of bf16 products in two orders
        found.require(abs(own / hand - 1) <= 1e-3, f"the loops differ: {what} {hand} by hand, {own} ours")

    for group in optimizer.param_groups:
        group["lr"] = 1e-4
    seconds = _seconds(loops["by hand"][0], one_window * 2, device) / 2
    num_windows = max(2, min(200, round(block_s / seconds)))
    micros = one_window * num_windows
    rates: dict[str, list[float]] = {name: [] for name in loops}
    peaks: dict[str, list[int]] = {name: [] for name in loops}
    for _ in range(blocks):
        for name, (loop, _norms) in loops.items():
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


def _largest_micro(micro: int, loop: Loop, vocab: int, length: int, device: torch.device) -> int:
    """The asked one, halved until a window fits into three quarters of the device's memory."""
    while True:
        try:
            if device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(device)
            loop(_random_micros(NUM_MICROS, micro, vocab, length, device))
        except torch.cuda.OutOfMemoryError:
            fits = False
        else:
            fits = True
            if device.type == "cuda":
                # Not at the edge, where the allocator's retries would be measured instead of the loops.
                total = torch.cuda.get_device_properties(device).total_memory
                fits = torch.cuda.max_memory_allocated(device) <= 0.75 * total
        if fits:
            return micro
        if micro == 1:
            raise RuntimeError("GPT-2 124M does not fit into this GPU's memory with a micro of 1 x 1024 tokens")
        micro //= 2


def _random_micros(num_micros: int, size: int, vocab: int, length: int, device: torch.device) -> list[Micro]:
    generator = torch.Generator().manual_seed(5)
    micros = []
    for _ in range(num_micros):
        tokens = torch.randint(vocab, (size, length + 1), generator=generator)
        pair = (tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        micros.append(tuple(part.pin_memory() for part in pair) if device.type == "cuda" else pair)
    return micros


def _seconds(loop: Loop, micros: list[Micro], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    loop(micros)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def _summary(values: list[float]) -> dict[str, Any]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values), "blocks": values}
