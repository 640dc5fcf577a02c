"""Measures the time that a checkpoint costs, written in the foreground or in the background.

torchrun --nproc-per-node 2 benchmarks/checkpoint_cost.py [--rounds 5] [--steps 12]
    [--out results.json] [--smoke]

A round is three runs of `--steps` steps on the same model: without a checkpoint, with one written
in the foreground, and with one written in the background ("behind" the training). The cost of a
checkpoint is the time of such a run minus the time of the run without. Its share of the step time
is this cost divided by the time of the run without, as if a checkpoint were written every `--steps`
steps. Medians and ranges over rounds are printed. The collectives of a window are counted too:
neither a checkpoint nor the preemption flag may change them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import distaccum as da
from distaccum.checkpoint.state import model_tensors, optimizer_tensors
from distaccum.checkpoint.store import Checkpoints
from distaccum.models.gpt import GPT, GPTConfig
from distaccum.parallel.world import World


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--smoke", action="store_true", help="a tiny model, one round")
    asked = parser.parse_args()
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    world = World.of(torch.device("cpu"))
    rounds = 1 if asked.smoke else asked.rounds
    found = _measure(
        world, rounds, 4 if asked.smoke else asked.steps, width=32 if asked.smoke else 320
    )
    if world.rank == 0:
        _show(found)
        if asked.out is not None:
            asked.out.write_text(json.dumps(found, indent=1) + "\n")
    if dist.is_initialized():
        dist.destroy_process_group()


def _measure(world: World, rounds: int, steps: int, width: int) -> dict[str, object]:
    torch.manual_seed(0)
    config = GPTConfig(
        name="gpt",
        vocab_size=256,
        max_seq_len=64,
        num_layers=6,
        width=width,
        num_heads=width // 16,
        dropout=0.0,
        bias=True,
    )
    model = GPT(config)
    wrapped = DistributedDataParallel(model) if world.group is not None else model
    accumulator = da.Accumulator(
        wrapped, torch.optim.AdamW(wrapped.parameters()), da.CausalLM(shift=False), audit="always"
    )
    tokens = torch.randint(0, 256, (2, 64), generator=torch.Generator().manual_seed(world.rank))
    window = [{"input_ids": tokens, "labels": tokens}] * 4
    folder = Path(world.broadcast_object(tempfile.mkdtemp() if world.rank == 0 else "", 0))
    stores = {
        name: Checkpoints(folder / name, world, keep=1, asynchronous=name == "behind")
        for name in _WAYS[1:]
    }
    seconds: dict[str, list[float]] = {name: [] for name in _WAYS}
    blocked: dict[str, list[float]] = {name: [] for name in _WAYS[1:]}
    collectives: dict[str, set[str]] = {name: set() for name in _WAYS}
    accumulator.step(window)
    num_bytes = 0
    for _ in range(rounds):
        for name in _WAYS:
            _barrier(world)
            began = time.perf_counter()
            for step in range(steps):
                record = accumulator.step(window)
                assert record.verdict is not None
                collectives[name].add(str(record.verdict.counted))
                if step == 0 and name in stores:
                    tensors = {
                        **model_tensors(model),
                        **optimizer_tensors(model, accumulator.optimizer),
                    }
                    stores[name].save(record.step, tensors, {})
            if name in stores:
                stores[name].wait()
            _barrier(world)
            seconds[name].append(time.perf_counter() - began)
            if name in stores:
                (saved,) = stores[name].saved()
                blocked[name].append(saved.blocked_s)
                num_bytes = saved.bytes
    _barrier(world)
    if world.rank == 0:
        shutil.rmtree(folder)
    assert len(set().union(*collectives.values())) == 1, collectives
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "checkpoint_bytes": num_bytes,
        "ranks": world.size,
        "steps_between_checkpoints": steps,
        "seconds": seconds,
        "blocked_s": blocked,
        "collectives_of_a_window": collectives["none"].pop(),
        "machine": {
            "cpus": os.cpu_count(),
            "torch": str(torch.__version__),
            "python": platform.python_version(),
        },
    }


_WAYS = ("none", "foreground", "behind")


def _barrier(world: World) -> None:
    if world.group is not None:
        dist.barrier()


def _show(found: dict[str, object]) -> None:
    seconds = found["seconds"]
    blocked = found["blocked_s"]
    steps = found["steps_between_checkpoints"]
    print(
        f"{found['parameters']:,} parameters, checkpoint of {found['checkpoint_bytes']:,} bytes, "
        f"{found['ranks']} rank(s), {steps} steps, {len(seconds['none'])} rounds"
    )
    step_s = statistics.median(seconds["none"]) / steps
    print(f"a step without checkpoints: {step_s * 1e3:.1f} ms (median)")
    for name in _WAYS[1:]:
        cost = [ours - plain for ours, plain in zip(seconds[name], seconds["none"], strict=True)]
        share = [each / plain for each, plain in zip(cost, seconds["none"], strict=True)]
        median, low, high = (100 * f(share) for f in (statistics.median, min, max))
        print(
            f"{name:10}  blocked for {_spread(blocked[name], step_s)} steps, total cost "
            f"{_spread(cost, step_s)} steps: {median:.1f} % of the step time ({low:.1f} to "
            f"{high:.1f})"
        )
    print(
        "collectives of every window, with and without checkpoints: "
        f"{found['collectives_of_a_window']}"
    )


def _spread(values: list[float], unit: float) -> str:
    return (
        f"{statistics.median(values) / unit:.2f} ({min(values) / unit:.2f} to "
        f"{max(values) / unit:.2f})"
    )


if __name__ == "__main__":
    main()
