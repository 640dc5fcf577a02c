"""Compares distaccum on one GPU with a hand-written loop and with peers: GPT-2 124M in bf16.

    python benchmarks/gpu.py [--out benchmarks/results/gpu.json]    takes ten minutes at most
    python benchmarks/gpu.py --device cpu --smoke                   a tiny model, to try the program

Compares tokens/s, MFU, peak memory (torch.cuda.max_memory_allocated) and host syncs per window of
480 x 1024 tokens, with the plain and with the compiled model. All arms (gpu_arms.py) have the same
model, micro-batches, AdamW and clipping, with float32 weights under bf16 autocast. Each arm has a
process and a memory peak of its own (gpu_turns.py). The arms take turns, A B C A B C. The first
window of a turn fills the allocator's cache and is not timed. Printed are median, minimum and
maximum. All losses and gradient norms must be those of the hand-written loop, and losses must fall.

MFU: the FLOPs of forward and backward (see `Sizes.flops`), divided by the dense bf16 peak of the
GPU from --peak-tflops or the table below. Host syncs: those that torch.cuda.set_sync_debug_mode
detects. distaccum has one at the end of each window, when the table of the small collective is
read; any other one raises.

Exit codes: 0; 1: an arm failed or computed something else; 2: there is no GPU. An arm for which no
time is left within --limit-s is reported as such.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from gpu_arms import ARMS, GPT2_124M, NEEDS, TINY, Sizes, missing
from gpu_check import describe
from gpu_turns import Arm, GoneError, Job, Order, Turn, preload

WINDOW_SAMPLES = 480
# Dense bf16 TFLOP/s by the driver's name of the GPU, from NVIDIA's data sheets of H200 SXM, H100
# SXM and A100.
PEAK_TFLOPS = {"NVIDIA H200": 989.0, "NVIDIA H100 80GB HBM3": 989.0, "NVIDIA A100": 312.0}
# A loss is a float32 mean over thousands of tokens. The bf16 logits have relative errors of at most
# 2^-9 each.
LOSS_LIMIT = 2**-8
# A gradient norm differs by a few independent roundings of 2^-9 in bf16 products and earlier
# updates. A micro-batch that is lost or counted twice changes it by 1 / 30 or more.
NORM_LIMIT = 2**-6


@dataclass
class Row:
    """Holds the measurements of one arm, with the plain or the compiled model."""

    arm: str
    status: str = "measured"  # or "not installed", "no time left", "failed"
    reason: str = ""
    turns: list[Turn] = field(default_factory=list)  # with the warm-up and the count of syncs
    first_s: float = 0.0  # seconds of the first turn, with compilation
    samples_s: list[float] = field(default_factory=list)  # seconds per window in each timed turn
    window_syncs: float | None = None
    window_reads: float | None = None

    @property
    def losses(self) -> list[float]:
        """Return the losses of all windows."""
        return [loss for turn in self.turns for loss in turn.losses]

    @property
    def norms(self) -> list[float]:
        """Return the gradient norms of all windows, before clipping."""
        return [norm for turn in self.turns for norm in turn.norms]

    def drop(self, status: str, reason: str) -> None:
        """Exclude the arm from further measurements, with the given status and reason."""
        self.status, self.reason = status, reason


@dataclass(frozen=True)
class Setting:
    """Holds the settings of the measurement."""

    device_type: str
    sizes: Sizes
    num_micro_batches: int
    rounds: int
    turn_windows: int
    backend: str
    limit_s: float

    @property
    def window_tokens(self) -> int:
        """Return the number of tokens in a window."""
        return self.sizes.micro_batch_size * self.sizes.length * self.num_micro_batches


def main(arguments: list[str] | None = None) -> int:
    """Measure, print and write the results; the exit codes are described above."""
    asked = _arguments(arguments)
    if asked.device == "cuda":
        # One GPU even if there are more, because some of the peers would use all of them.
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[
            0
        ]
        if not torch.cuda.is_available():
            print("There is no GPU here. To try the program without one: --device cpu --smoke")
            return 2
    began = time.monotonic()
    preload(asked.device)
    if asked.smoke:
        setting = Setting(
            asked.device, TINY, 4, rounds=2, turn_windows=1, backend="eager", limit_s=asked.limit_s
        )
    else:
        sizes = replace(GPT2_124M, micro_batch_size=asked.micro_batch_size)
        num_micro_batches = WINDOW_SAMPLES // asked.micro_batch_size
        setting = Setting(
            asked.device,
            sizes,
            num_micro_batches,
            asked.rounds,
            2,
            backend="inductor",
            limit_s=asked.limit_s,
        )
    peers = sorted({name.split(".")[0] for names in NEEDS.values() for name in names})
    machine = describe(asked.device, *peers)
    print("\n".join(f"{name:20} {value}" for name, value in machine.items()), flush=True)
    peak = asked.peak_tflops or known_peak(str(machine["device"]))
    flops = setting.sizes.flops() * setting.num_micro_batches
    print(_explained(setting, flops, peak), flush=True)

    compiled = {"as it is": None, f"torch.compile({setting.backend})": setting.backend}
    groups: dict[str, list[Row]] = {}
    problems: list[str] = []
    for index, (group, backend) in enumerate(compiled.items()):
        left_s = setting.limit_s - (time.monotonic() - began)
        groups[group] = measure(setting, backend, left_s / (len(compiled) - index))
        problems += [f"{group}: {problem}" for problem in judge(groups[group])]
        print(
            f"\nthe model {group}\n{table(groups[group], setting.window_tokens, flops, peak)}",
            flush=True,
        )
    print(
        "\n"
        + "".join(f"FAILED: {problem}\n" for problem in problems)
        + f"{time.monotonic() - began:.0f} s in total"
    )
    if asked.out is not None:
        found = {
            "smoke": asked.smoke,
            "machine": machine,
            "setting": asdict(setting) | {"window_tokens": setting.window_tokens},
            "window_flops": flops,
            "peak_tflops": peak,
            "problems": problems,
            "groups": {group: [asdict(row) for row in rows] for group, rows in groups.items()},
        }
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        asked.out.write_text(json.dumps(found, indent=1) + "\n")
    return 1 if problems else 0


def measure(setting: Setting, backend: str | None, limit_s: float) -> list[Row]:
    """Measure all arms in turns; the first of the returned rows is the hand-written loop."""
    deadline = time.monotonic() + limit_s
    rows = [Row(name) for name in ARMS]
    with tempfile.TemporaryDirectory(prefix="gpu") as folder:
        arms: dict[str, Arm] = {}
        for number, row in enumerate(rows):
            if packages := missing(row.arm):
                row.drop("not installed", f"needs {', '.join(packages)}")
                continue
            log = str(Path(folder, f"{number}.log"))
            job = Job(
                row.arm, setting.device_type, setting.sizes, setting.num_micro_batches, backend, log
            )
            arms[row.arm] = Arm(job)
        try:
            _in_turns([row for row in rows if row.arm in arms], arms, setting, deadline)
        finally:
            for arm in arms.values():
                arm.end()
    return rows


def _in_turns(rows: list[Row], arms: dict[str, Arm], setting: Setting, deadline: float) -> None:
    """Warm up each arm, time all rounds, then run a window that counts host syncs."""
    whole, short = Order(1, setting.turn_windows), Order(1, 1)
    window_s: dict[str, float] = {}

    def late() -> bool:
        return time.monotonic() >= deadline

    def take(row: Row, order: Order) -> Turn | None:
        began = time.monotonic()
        try:
            turn = arms[row.arm].turn(order, deadline - began)
        except GoneError as gone:
            row.drop("no time left" if late() else "failed", str(gone))
            return None
        row.turns.append(turn)
        row.first_s = row.first_s or time.monotonic() - began
        window_s[row.arm] = turn.seconds / order.timed
        return turn

    def needed_s(order: Order, candidates: list[Row]) -> float:
        return sum(window_s[row.arm] for row in candidates) * (order.untimed + order.timed)

    for row in rows:
        try:
            arms[row.arm].ready(deadline - time.monotonic())
        except GoneError as gone:
            row.drop("no time left" if late() else "failed", str(gone))
    warm: list[Row] = []
    for row in [row for row in rows if row.status == "measured"]:
        # Start an arm only if two rounds with one more arm, and the windows that count syncs, still
        # fit. The first arm compiles what the others find in the cache.
        slowest_s = max((other.first_s for other in warm[1:] or warm), default=0.0)
        rounds_s = (
            (2 * needed_s(whole, warm) + needed_s(short, warm))
            * (len(warm) + 1)
            / max(1, len(warm))
        )
        if deadline - time.monotonic() < slowest_s + rounds_s:
            row.drop("no time left", "not started")
        elif take(row, short) is not None:
            warm.append(row)
    for _ in range(setting.rounds):
        alive = [row for row in warm if row.status == "measured"]
        if deadline - time.monotonic() < 1.1 * (needed_s(whole, alive) + needed_s(short, alive)):
            break
        for row in alive:
            if (turn := take(row, whole)) is not None:
                row.samples_s.append(turn.seconds / whole.timed)
    watched = Order(short.untimed, short.timed, watch=True)
    for row in warm:
        if row.status != "measured":
            continue
        if not row.samples_s:
            row.drop("no time left", "not even for one round")
        elif deadline - time.monotonic() < needed_s(short, [row]):
            row.reason = "no time left to count host syncs"
        elif (turn := take(row, watched)) is not None:
            row.window_reads = turn.reads / watched.timed
            row.window_syncs = None if turn.syncs is None else turn.syncs / watched.timed


def judge(rows: list[Row]) -> list[str]:
    """Return what is wrong: arms that failed or did not train as the hand-written loop did."""
    problems = [f"{row.arm}: {row.reason}" for row in rows if row.status == "failed"]
    hand = rows[0]
    if not hand.samples_s:
        problems.append(
            "the hand-written loop was not measured, so there is nothing to compare with"
        )
    if len(hand.losses) > 1 and not hand.losses[-1] < hand.losses[0] * (1 - 4 * LOSS_LIMIT):
        problems.append(f"the hand-written loop learned too little to compare with: {hand.losses}")
    for row in rows[1:]:
        for what, limit, right, own in (
            ("loss", LOSS_LIMIT, hand.losses, row.losses), ("gradient norm", NORM_LIMIT, hand.norms,
            row.norms)
        ):  # fmt: skip
            errors = [abs(b / a - 1) for a, b in zip(right, own, strict=False)]
            if not all(error <= limit for error in errors):  # also for nan
                problems.append(
                    f"{row.arm}: its {what} is not that of the hand-written loop: {own} and {right}"
                )
        if row.arm == "distaccum" and row.window_syncs not in (None, 1):
            problems.append(
                f"{row.arm}: {row.window_syncs} host syncs per window, expected 1 at its end"
            )
    return problems


def known_peak(device: str) -> float | None:
    """Return the dense bf16 TFLOP/s of a GPU by its name, or None if it is not known here."""
    return next(
        (
            peak
            for name, peak in PEAK_TFLOPS.items()
            if device == name or device.startswith(f"{name}-")
        ),
        None,
    )


def table(rows: list[Row], window_tokens: int, window_flops: int, peak_tflops: float | None) -> str:
    """Format the rows as a table."""
    head = [
        "arm",
        "tokens/s (min, max)",
        "vs by hand",
        "MFU",
        "peak MiB",
        "host syncs",
        "first turn s",
        "",
    ]
    lines = [head]
    hand_s = statistics.median(rows[0].samples_s) if rows[0].samples_s else None
    for row in rows:
        if not row.samples_s:
            lines.append([row.arm, "-", "-", "-", "-", "-", "-", f"{row.status}: {row.reason}"])
            continue
        median_s = statistics.median(row.samples_s)
        rates = [
            window_tokens / seconds
            for seconds in (median_s, max(row.samples_s), min(row.samples_s))
        ]
        peaks = [turn.peak_bytes for turn in row.turns if turn.peak_bytes is not None]
        lines.append([
            row.arm,
            "{:,.0f} ({:,.0f}, {:,.0f})".format(*rates),
            "-" if hand_s is None else f"{hand_s / median_s:.3f}",
            "-" if peak_tflops is None else f"{window_flops / median_s / (peak_tflops * 1e12):.1%}",
            f"{max(peaks) / 2**20:,.0f}" if peaks else "-",
            "-" if row.window_syncs is None else f"{row.window_syncs:g}",
            f"{row.first_s:.1f}",
            f"{row.status}: {row.reason}" if row.reason else f"{len(row.samples_s)} turns",
        ])  # fmt: skip
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _explained(setting: Setting, window_flops: int, peak: float | None) -> str:
    sizes = setting.sizes
    unknown = "unknown, give the peak of this GPU with --peak-tflops"
    mfu = unknown if peak is None else f"relative to {peak:g} TFLOP/s"
    return (
        f"\nGPT of {sizes.layers} layers, {sizes.heads} heads, width {sizes.width}, vocabulary"
        f" {sizes.vocab:,}; {setting.num_micro_batches} micro-batches of {sizes.micro_batch_size} x"
        f" {sizes.length} tokens: {setting.window_tokens:,} per window, {window_flops / 1e12:,.4g}"
        f" TFLOP; MFU {mfu}"
    )


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu needs --smoke"
    )
    parser.add_argument("--smoke", action="store_true", help="a tiny model and few windows")
    parser.add_argument(
        "--micro-batch-size",
        type=int,
        default=GPT2_124M.micro_batch_size,
        help="samples; divides 480",
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--limit-s", type=float, default=570.0, help="seconds for the whole program"
    )
    parser.add_argument("--peak-tflops", type=float, help="the GPU's dense bf16 peak, for MFU")
    parser.add_argument("--out", type=Path, help="JSON file to write all samples to")
    asked = parser.parse_args(arguments)
    if asked.device == "cpu" and not asked.smoke:
        parser.error("--device cpu needs --smoke, because the full model is too slow on a CPU")
    if asked.micro_batch_size < 1 or WINDOW_SAMPLES % asked.micro_batch_size:
        parser.error(
            f"--micro-batch-size must divide {WINDOW_SAMPLES} samples, got {asked.micro_batch_size}"
        )
    return asked


if __name__ == "__main__":
    sys.exit(main())
