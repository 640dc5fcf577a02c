"""Runs one rank of benchmarks/step_time.py, which predicts and measures for each machine file.

The paths of the files are read from the standard input.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from distaccum.app.assembly import make_accumulator
from distaccum.app.config import config_dir, typed
from distaccum.app.task import build_task, make_model
from distaccum.core.strategies import StrategyName, Sync
from distaccum.core.traffic import Traffic
from distaccum.core.window import MicroBatches
from distaccum.launch.processes import tie_to_parent
from distaccum.parallel.ledger import Ledger
from distaccum.parallel.world import World
from distaccum.planner.hardware import HardwareProfile
from distaccum.planner.shapes import Setup, describe
from distaccum.planner.step_time import step_time
from distaccum.planner.trace import trace
from distaccum.planner.traffic import control_sends, gradient_sends

WARM_WINDOWS = 2  # DDP rebuilds its buckets after the first
NUM_MICRO_BATCHES = (2, 8)  # K


@dataclass(frozen=True)
class Way:
    """Describes a strategy with its communication."""

    name: str
    strategy: StrategyName
    sync: Sync
    overlap_micro_batches: int = 1  # T, at most K


WAYS = (
    Way("ddp", StrategyName.ddp, Sync.boundary),
    Way("ddp, T = 4", StrategyName.ddp, Sync.boundary, 4),
    Way("fsdp boundary", StrategyName.fsdp, Sync.boundary),
    Way("fsdp gather_once", StrategyName.fsdp, Sync.gather_once),
    Way("fsdp every", StrategyName.fsdp, Sync.every),
)


class Rank:
    """Holds an accumulator for each way, made as `distaccum train` makes it."""

    def __init__(self, overrides: list[str], world: World, rounds: int) -> None:
        self._world, self._rounds = world, rounds
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            composed = {way: compose("config", [*overrides, *_chosen(way)]) for way in WAYS}
        configs = {
            way: typed(OmegaConf.to_container(one, resolve=True)) for way, one in composed.items()
        }
        config = configs[WAYS[0]]
        task = build_task(config)
        size = config.accum.micro_batch_size
        self._micro_batches = [
            task.train.batch(
                [size * (world.size * i + world.rank) + j for j in range(size)], torch.Generator()
            )
            for i in range(max(NUM_MICRO_BATCHES))
        ]
        self._objective, self._model = task.objective, make_model(config, task, world.device)
        model = self._model
        self.shape = describe(model, task.blocks_of(model))
        self.micro_batch_flops = trace(
            model, task.blocks_of, task.objective.loss_sum, self._micro_batches[0], size
        ).flops
        self._bucket_mb = config.parallel.bucket_mb
        self._accumulators = {
            way: make_accumulator(one, task, world) for way, one in configs.items()
        }
        self._windows = {way: self._endless(way) for way in WAYS}
        self.traffic = {way: self._count(way) for way in WAYS}

    def setup(self, way: Way) -> Setup:
        """Return the description of a way that the prediction needs."""
        return Setup(
            way.strategy,
            way.sync,
            self._world.size,
            1,
            None,
            None,
            None,
            True,
            False,
            self._bucket_mb,
        )

    def at(self, machine: HardwareProfile) -> dict[str, Any]:
        """Predict and then measure each way with each K, in turns.

        A micro-batch without communication is timed between the windows, to show whether the
        machine is still as fast as when it was profiled.

        Args:
            machine: the speeds that `distaccum profile` measured.

        Returns:
            One row per way and K, and the times of the micro-batch without communication.
        """
        cases = list(itertools.product(WAYS, NUM_MICRO_BATCHES))
        predicted = {
            (way, k): step_time(
                machine,
                self.shape,
                self.setup(way),
                k,
                self.micro_batch_flops,
                way.overlap_micro_batches,
            )
            for way, k in cases
        }
        seconds: dict[Any, list[float]] = {case: [] for case in cases}
        alone = []
        for _ in range(self._rounds):
            for k in NUM_MICRO_BATCHES:
                alone.append(self._alone())
                for way in WAYS:
                    seconds[way, k].append(self._step(way))
        rows = [
            {
                "way": way.name,
                "num_micro_batches": k,
                "predicted": asdict(predicted[way, k]),
                "predicted_s": predicted[way, k].total_s,
                "seconds": seconds[way, k],
                "measured_s": statistics.median(seconds[way, k]),
                "traffic": self.traffic[way][k],
            }
            for way, k in cases
        ]
        predicted_s = machine.micro_batch_overhead_s + self.micro_batch_flops / machine.flops_per_s
        return {"micro_batch": {"predicted_s": predicted_s, "seconds": alone}, "rows": rows}

    def _alone(self) -> float:
        """Return the slowest rank's seconds for a micro-batch without communication."""
        dist.barrier()
        began = time.perf_counter()
        for micro_batch in self._micro_batches:
            self._objective.loss_sum(self._model, micro_batch).backward()
        rows, _ = self._world.gather_rows(
            [(time.perf_counter() - began) / len(self._micro_batches)]
        ).read()
        return max(row[0] for row in rows)

    def _step(self, way: Way) -> float:
        """Return the slowest rank's seconds for the next window."""
        window = next(self._windows[way])
        dist.barrier()
        began = time.perf_counter()
        self._accumulators[way].step(window)
        rows, _ = self._world.gather_rows([time.perf_counter() - began]).read()
        return max(row[0] for row in rows)

    def _count(self, way: Way) -> dict[int, dict[str, Any]]:
        """Forecast and count what a window with each K sends."""
        for _ in range(WARM_WINDOWS * len(NUM_MICRO_BATCHES)):
            self._step(way)
        found = {}
        for k in NUM_MICRO_BATCHES:
            with Ledger() as ledger:
                self._accumulators[way].step(next(self._windows[way]))
            sends = gradient_sends(self.shape, self.setup(way), k) + control_sends(self.setup(way))
            found[k] = {
                "predicted": _pairs(Traffic.total(sends)),
                "counted": _pairs(ledger.traffic),
            }
        return found

    def _endless(self, way: Way) -> Iterator[MicroBatches]:
        """Yield windows with each K in turn, each announced one window ahead."""
        sizes = itertools.cycle(NUM_MICRO_BATCHES)
        window = MicroBatches(self._micro_batches[: (k := next(sizes))], k)
        while True:
            window.upcoming = MicroBatches(self._micro_batches[: (k := next(sizes))], k)
            yield window
            window = window.upcoming


def _pairs(traffic: Traffic) -> dict[str, list[int]]:
    return {kind: [n, traffic.bytes[kind]] for kind, n in traffic.counts.items()}


def _chosen(way: Way) -> list[str]:
    return [
        f"parallel={way.strategy}",
        f"accum.sync={way.sync}",
        f"accum.overlap_micro_batches={way.overlap_micro_batches}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("overrides", nargs="*")
    asked = parser.parse_args()
    tie_to_parent(asked.parent)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = Rank(asked.overrides, World.of(torch.device("cpu")), asked.rounds)
    parameters = sum(p.numel for p in rank.shape.parameters)
    print(
        json.dumps({"parameters": parameters, "micro_batch_flops": rank.micro_batch_flops}),
        flush=True,
    )
    for line in sys.stdin:
        print(json.dumps(rank.at(HardwareProfile.load(Path(line.strip())))), flush=True)
    sys.stdout.flush()
    os._exit(0)  # without a last collective


if __name__ == "__main__":
    main()
