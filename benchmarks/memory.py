"""Compares the predicted with the measured peak memory of a rank.

python benchmarks/memory.py [--device cuda] [--out FILE.json] [--smoke]

1. The peak for windows of K = 1, 2, 4, ..., 64 micro-batches of one size on one process.
2. Weights, gradients, optimizer and activations of one effective batch in K micro-batches and in 1.
3. On a CPU: all strategies and sync policies on 2 and 4 ranks.

On a CPU, the measured value is the bytes of all tensors, counted at every operator of two windows,
from before the model is made. On a GPU, it is the allocator's peak in the second window. The
predicted value is that of `distaccum plan`, from shapes and from two micro-batches of other sizes
that run on tensors without memory. The models are GPTs, on a GPU GPT-2 124M and 350M in fp32 and
bf16, with and without checkpointing. A plot of 1 and 2 is written beside the JSON file.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import machine
import torch
import torch.distributed as dist
from torch import Tensor, nn

import distaccum as da
from distaccum.core.objectives import autocast
from distaccum.core.strategies import StrategyName, Sync
from distaccum.models.gpt import GPT, GPTConfig
from distaccum.nn.blocks import checkpoint_blocks
from distaccum.parallel.apply import ParallelConfig, wrap
from distaccum.parallel.precision import Precision
from distaccum.parallel.world import World
from distaccum.planner.meter import Meter
from distaccum.planner.peak import peak
from distaccum.planner.segments import MicroBatchTrace
from distaccum.planner.shapes import Setup, describe
from distaccum.planner.timeline import Peak
from distaccum.planner.trace import trace, update

SIZES = {  # tokens in a sample, vocabulary, layers, heads, width
    "smoke": (16, 500, 2, 4, 64),
    "medium": (32, 1000, 4, 4, 128),
    "small": (64, 1000, 6, 4, 256),
    "gpt2_124m": (1024, 50257, 12, 12, 768),
    "gpt2_350m": (1024, 50257, 24, 16, 1024),
}
TRACED = (2, 8)  # samples in the micro-batches that the prediction runs


@dataclass(frozen=True)
class Way:
    """Describes one way to train."""

    model: str
    strategy: str = "single"
    sync: str = "boundary"
    precision: str = "fp32"
    checkpoint: bool = False
    num_micro_batches: int = 1
    samples: int = 4

    def __str__(self) -> str:
        return (
            f"{self.strategy} {self.sync} "
            f"{self.precision}{' checkpointed' if self.checkpoint else ''}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--out", type=Path)
    parser.add_argument(
        "--smoke", action="store_true", help="a tiny model, few micro-batches, two ranks"
    )
    asked = parser.parse_args()
    on_gpu = asked.device == "cuda"
    counts = [1, 2, 4] if asked.smoke else [2**power for power in range(7)]
    models = ["smoke"] if asked.smoke else (["gpt2_124m", "gpt2_350m"] if on_gpu else ["small"])
    first = Way(models[0], samples=4)
    flat = [_both(replace(first, num_micro_batches=count), asked.device) for count in counts]
    _show("1. peak over the number of micro-batches in a window", flat, "num_micro_batches")
    ways = [
        Way(
            model,
            precision=precision,
            checkpoint=checkpoint,
            num_micro_batches=count,
            samples=samples,
        )
        for model in models
        for precision in ("fp32", "bf16")
        for checkpoint in (False, True)
        for count, samples in ((8, 4), (1, 32))
    ]
    table = [_both(way, asked.device) for way in ways]
    _show_parts("2. 32 samples in one window: 8 micro-batches of 4, and one of 32", table)
    spread = []
    if not on_gpu:
        many = replace(first, model="smoke" if asked.smoke else "medium")
        spread = [
            found for ranks in ((2,) if asked.smoke else (2, 4)) for found in _on_ranks(ranks, many)
        ]
    _show("3. strategies and sync policies on several ranks", spread, "ranks")
    ratios = sorted(found["predicted"] / found["measured"] for found in [*flat, *table, *spread])
    print(
        f"predicted / measured: {ratios[0]:.3f} to {ratios[-1]:.3f}, median "
        f"{ratios[len(ratios) // 2]:.3f}"
    )
    if asked.out is not None:
        gpu = {"gpu": torch.cuda.get_device_name()} if on_gpu else {}
        found = {
            "machine": {**machine.describe(), **gpu},
            "flat": flat,
            "table": table,
            "spread": spread,
        }
        asked.out.write_text(json.dumps(found, indent=1) + "\n")
        _draw(flat, table, asked.out.with_suffix(".png"))


def _both(way: Way, device: str, world: World | None = None) -> dict[str, Any]:
    """Predict and measure one way on one rank."""
    ranks = 1 if world is None else world.size
    predicted = _predicted(way, ranks, device)
    measured = _measured(way, world or World.of(torch.device(device)))
    return {
        **asdict(way), "ranks": ranks, "measured": measured, "predicted": predicted.total,
        "moment": predicted.moment, "parts": dict(predicted.parts),
    }  # fmt: skip


def _measured(way: Way, world: World) -> int:
    """Return the peak in bytes on this rank in two windows, or in the second one on a GPU."""
    gc.collect()
    config, precision = _config(way, world.size), Precision[way.precision]
    with Meter(world.device) as meter:
        torch.manual_seed(0)
        model = _model(way).to(world.device)
        optimizer_for, objective = _optimizer_for(world.device.type), _objective(way)
        if world.group is not None:
            model = wrap(model, model.blocks, config, world, precision.sharded_policy(None))
        accumulator = da.Accumulator(
            model, optimizer_for(model), objective, sync=way.sync, clip_norm=1.0
        )
        window = [_micro_batch(way, way.samples) for _ in range(2)] * (
            way.num_micro_batches // 2
        ) or [_micro_batch(way, way.samples)]
        accumulator.step(window)
        if world.device.type == "cuda":
            torch.cuda.synchronize()
            meter.reset_peak()
        accumulator.step(window)
        found = meter.peak_bytes
    del accumulator, model
    return found


def _predicted(way: Way, ranks: int, device: str) -> Peak:
    setup = _setup(way, ranks)
    with torch.device("meta"):
        model = _model(way)
    shape = describe(model, model.blocks)
    traced = (
        _traced(replace(way, num_micro_batches=1, samples=1, sync="boundary"), size, device)
        for size in TRACED
    )
    micro_batch = MicroBatchTrace.between(*traced, way.samples)
    shapes = [(p.local(setup.shards), p.dtype) for p in shape.trained]
    took = update(_optimizer_for(device), shapes, device)
    return peak(shape, setup, took, micro_batch, way.num_micro_batches, device=device)


@cache
def _traced(way: Way, samples: int, device: str) -> MicroBatchTrace:
    with torch.device("meta"):
        model = _model(way)
    compute = _setup(way, 1).compute
    return trace(
        model,
        lambda m: m.blocks,
        _objective(way).loss_sum,
        _micro_batch(way, samples),
        samples,
        device,
        compute,
    )


def _model(way: Way) -> nn.Module:
    tokens, vocabulary, layers, heads, width = SIZES[way.model]
    model = GPT(GPTConfig("gpt", vocabulary, tokens, layers, heads, width, 0.0, True))
    if way.checkpoint:
        checkpoint_blocks(model.blocks)
    return model


def _micro_batch(way: Way, samples: int) -> dict[str, Tensor]:
    ids = torch.zeros(samples, SIZES[way.model][0], dtype=torch.long)
    return {"input_ids": ids, "labels": ids}


def _objective(way: Way) -> Any:
    objective = da.CausalLM(shift=False)
    narrow = way.precision == "bf16" and way.strategy in ("single", "ddp")
    return autocast(objective, torch.bfloat16) if narrow else objective


def _optimizer_for(device: str) -> Callable[[nn.Module], torch.optim.Optimizer]:
    """Return a function that makes AdamW as distaccum does: fused on a GPU, foreach on a CPU."""
    return lambda model: torch.optim.AdamW(
        model.parameters(), fused=device == "cuda", foreach=device == "cpu"
    )


def _config(way: Way, ranks: int) -> ParallelConfig:
    name = StrategyName[way.strategy]
    return ParallelConfig(name, None, False, False, 25, True, None)


def _setup(way: Way, ranks: int) -> Setup:
    sharded, replicas = way.strategy in ("fsdp", "hsdp"), 2 if way.strategy == "hsdp" else 1
    compute = torch.bfloat16 if sharded and way.precision == "bf16" else None
    strategy, sync = StrategyName(way.strategy), Sync(way.sync)
    return Setup(strategy, sync, ranks, replicas, compute, None, None, True, False, 25)


def _on_ranks(ranks: int, first: Way) -> list[dict[str, Any]]:
    """Measure and predict on several ranks, which are new processes; return what rank 0 found."""
    ways = [
        replace(first, strategy=strategy, sync=sync, precision=precision, num_micro_batches=4)
        for strategy, policies in (
            ("ddp", ("boundary", "every")),
            ("fsdp", ("boundary", "gather_once", "every")),
            ("hsdp", ("boundary", "gather_once", "reduce_scatter", "every")),
        )
        for sync in policies
        for precision in (("bf16",) if first.model == "smoke" else ("fp32", "bf16"))
    ]
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_rank, args=(rank, ranks, folder, ways)) for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        return json.loads(Path(folder, "found.json").read_text())


def _rank(rank: int, ranks: int, folder: str, ways: list[Way]) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder, "store")), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    world = World.of(torch.device("cpu"))
    found = []
    for way in ways:
        row = _both(way, "cpu", world)
        if rank == 0:
            found.append(row)
    dist.barrier()
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found))
    os._exit(0)


def _show(title: str, rows: list[dict[str, Any]], column: str) -> None:
    if rows:
        print(
            f"\n{title}\n{column:>10} {'measured':>12} {'predicted':>12} {'ratio':>7}  predicted"
            " moment"
        )
    for row in rows:
        ratio = row["predicted"] / row["measured"]
        what = (
            ""
            if column == "num_micro_batches"
            else f"{row['strategy']} {row['sync']} {row['precision']}: "
        )
        print(
            f"{row[column]:>10} {_mib(row['measured'])} {_mib(row['predicted'])} {ratio:>7.3f}  "
            f"{what}{row['moment']}"
        )


PARTS = ("weights", "gradients", "optimizer", "activations")


def _show_parts(title: str, rows: list[dict[str, Any]]) -> None:
    print(
        f"\n{title}\n{'':34}"
        + "".join(f"{name:>13}" for name in [*PARTS, "predicted", "measured"])
        + "   ratio"
    )
    for row in rows:
        checkpointed = " ckpt" if row["checkpoint"] else ""
        name = (
            f"{row['model']} {row['precision']}{checkpointed} {row['num_micro_batches']} x "
            f"{row['samples']}"
        )
        sizes = [*(row["parts"][part] for part in PARTS), row["predicted"], row["measured"]]
        print(
            f"{name:34}"
            + "".join(f" {_mib(size)}" for size in sizes)
            + f" {row['predicted'] / row['measured']:>7.3f}"
        )


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:>8.1f} MiB"


def _draw(flat: list[dict[str, Any]], table: list[dict[str, Any]], file: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), width_ratios=[1, 1.25])
    counts = [row["num_micro_batches"] for row in flat]
    measured, predicted = (
        [row[name] / 2**20 for row in flat] for name in ("measured", "predicted")
    )
    left.plot(counts, predicted, color="#d1602b", linewidth=5, alpha=0.35, solid_capstyle="round")
    left.plot(counts, measured, color="#24527a", marker="o", markersize=5)
    left.annotate(
        "measured",
        (counts[-1], measured[-1]),
        (0, -16),
        textcoords="offset points",
        color="#24527a",
        ha="right",
    )
    left.annotate(
        "predicted",
        (counts[-1], measured[-1]),
        (0, 10),
        textcoords="offset points",
        color="#d1602b",
        ha="right",
    )
    left.set_xscale("log", base=2)
    left.set_xticks(counts, [str(count) for count in counts])
    left.set_ylim(0, 1.25 * max(measured))
    left.set_xlabel("micro-batches in a window (K), all of one size")
    left.set_ylabel("peak memory of a rank, MiB")
    left.set_title("flat in K", loc="left", pad=22)
    colours = dict(zip(PARTS, ("#24527a", "#5b8db8", "#a9c6de", "#d1602b"), strict=True))
    rows = [row for row in table if row["model"] == table[0]["model"]]
    for place, row in enumerate(reversed(rows)):
        start = 0.0
        for part in PARTS:
            width = row["parts"][part] / 2**20
            right.barh(place, width, left=start, color=colours[part], height=0.62)
            start += width
        right.plot(
            [row["measured"] / 2**20] * 2,
            [place - 0.36, place + 0.36],
            color="black",
            linewidth=1.6,
        )
        right.plot(row["predicted"] / 2**20, place, "o", mfc="none", mec="black", markersize=7)
    for place, part in enumerate(PARTS):
        right.text(
            0.22 * place, 1.02, part, transform=right.transAxes, color=colours[part], weight="bold"
        )
    right.set_yticks(
        range(len(rows)),
        [
            f"{r['precision']}{', checkpointed' if r['checkpoint'] else ''}, "
            f"{r['num_micro_batches']} x {r['samples']}"
            for r in reversed(rows)
        ],
    )
    right.set_xlabel("MiB; line: measured peak, ring: predicted")
    right.set_title(
        f"{rows[0]['model']}: 32 samples in micro-batches and at once", loc="left", pad=22
    )
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(file, dpi=130)


if __name__ == "__main__":
    main()
