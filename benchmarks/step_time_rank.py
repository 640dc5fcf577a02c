"""One rank of benchmarks/step_time.py: for each machine file that it reads on its input it predicts, then measures."""

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
from distaccum.app.task import make_model, make_problem
from distaccum.core.window import MicroBatches
from distaccum.launch.processes import tie_to_parent
from distaccum.parallel.ledger import Ledger
from distaccum.parallel.world import World
from distaccum.planner.hardware import Machine
from distaccum.planner.shapes import Policy, Setup, Strategy, describe
from distaccum.planner.step_time import step_time
from distaccum.planner.trace import trace
from distaccum.planner.traffic import by_kind, control_sends, gradient_sends

WARM_WINDOWS = 2  # DDP arranges its buckets anew after the first
NUM_MICROS = (2, 8)  # K


@dataclass(frozen=True)
class Way:
    """One way to spread and to send."""

    name: str
    strategy: Strategy
    sync: Policy
    overlap_micros: int = 1  # T, at most K


WAYS = (
    Way("ddp", "ddp", "boundary"),
    Way("ddp, T = 4", "ddp", "boundary", 4),
    Way("fsdp boundary", "fsdp", "boundary"),
    Way("fsdp keep", "fsdp", "keep"),
    Way("fsdp every", "fsdp", "every"),
)


class Rank:
    """An accumulator for each way, as `distaccum train` would make it."""

    def __init__(self, overrides: list[str], world: World, rounds: int) -> None:
        self._world, self._rounds = world, rounds
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            composed = {way: compose("config", [*overrides, *_chosen(way)]) for way in WAYS}
        configs = {way: typed(OmegaConf.to_container(one, resolve=True)) for way, one in composed.items()}
        config = configs[WAYS[0]]
        problem = make_problem(config)
        size = config.accum.micro
        self._micros = [
            problem.train.batch([size * (world.size * i + world.rank) + j for j in range(size)], torch.Generator())
            for i in range(max(NUM_MICROS))
        ]
        self._objective, self._model = problem.objective, make_model(config, problem, world.device)
        model = self._model
        self.shape = describe(model, problem.blocks_of(model))
        self.micro_flops = trace(model, problem.blocks_of, problem.objective.loss_sum, self._micros[0], size).flops
        self._bucket_mb = config.parallel.bucket_mb
        self._accumulators = {way: make_accumulator(one, problem, world) for way, one in configs.items()}
        self._windows = {way: self._endless(way) for way in WAYS}
        self.traffic = {way: self._count(way) for way in WAYS}

    def setup(self, way: Way) -> Setup:
        """As the prediction wants it."""
        return Setup(way.strategy, way.sync, self._world.size, 1, None, None, None, True, False, self._bucket_mb)

    def at(self, machine: Machine) -> dict[str, Any]:
        """A row for each way and K: first all predictions, then all measurements, in turn.

        Also a micro that sends nothing, timed between the windows: whether the machine is still as it was profiled.
        """
        cases = list(itertools.product(WAYS, NUM_MICROS))
        predicted = {
            (way, k): step_time(machine, self.shape, self.setup(way), k, self.micro_flops, way.overlap_micros)
            for way, k in cases
        }
        seconds: dict[Any, list[float]] = {case: [] for case in cases}
        alone = []
        for _ in range(self._rounds):
            for k in NUM_MICROS:
                alone.append(self._alone())
                for way in WAYS:
                    seconds[way, k].append(self._step(way))
        rows = [
            {
                "way": way.name,
                "num_micros": k,
                "predicted": asdict(predicted[way, k]),
                "predicted_s": predicted[way, k].total_s,
                "seconds": seconds[way, k],
                "measured_s": statistics.median(seconds[way, k]),
                "traffic": self.traffic[way][k],
            }
            for way, k in cases
        ]
        predicted_s = machine.micro_overhead_s + self.micro_flops / machine.flops_per_s
        return {"micro": {"predicted_s": predicted_s, "seconds": alone}, "rows": rows}

    def _alone(self) -> float:
        """The slowest rank's seconds of a micro, all ranks at it and nothing sent."""
        dist.barrier()
        began = time.perf_counter()
        for micro in self._micros:
            self._objective.loss_sum(self._model, micro).backward()
        rows, _ = self._world.share([(time.perf_counter() - began) / len(self._micros)]).read()
        return max(row[0] for row in rows)

    def _step(self, way: Way) -> float:
        """The slowest rank's seconds of the next window."""
        window = next(self._windows[way])
        dist.barrier()
        began = time.perf_counter()
        self._accumulators[way].step(window)
        rows, _ = self._world.share([time.perf_counter() - began]).read()
        return max(row[0] for row in rows)

    def _count(self, way: Way) -> dict[int, dict[str, Any]]:
        """What a window of each K sends, forecast and counted."""
        for _ in range(WARM_WINDOWS * len(NUM_MICROS)):
            self._step(way)
        found = {}
        for k in NUM_MICROS:
            with Ledger() as ledger:
                self._accumulators[way].step(next(self._windows[way]))
            sends = gradient_sends(self.shape, self.setup(way), k) + control_sends(self._world.size, num_terms=1)
            counted = ledger.traffic
            found[k] = {
                "predicted": {kind: list(pair) for kind, pair in by_kind(sends).items()},
                "counted": {kind: [n, counted.bytes[kind]] for kind, n in counted.counts.items()},
            }
        return found

    def _endless(self, way: Way) -> Iterator[MicroBatches]:
        """Windows of each K in turn, each announced one ahead."""
        sizes = itertools.cycle(NUM_MICROS)
        window = MicroBatches(self._micros[: (k := next(sizes))], k)
        while True:
            window.upcoming = MicroBatches(self._micros[: (k := next(sizes))], k)
            yield window
            window = window.upcoming


def _chosen(way: Way) -> list[str]:
    return [f"parallel={way.strategy}", f"accum.sync={way.sync}", f"accum.overlap_micros={way.overlap_micros}"]


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
    print(json.dumps({"parameters": parameters, "micro_flops": rank.micro_flops}), flush=True)
    for line in sys.stdin:
        print(json.dumps(rank.at(Machine.load(Path(line.strip())))), flush=True)
    sys.stdout.flush()
    os._exit(0)  # no collective of leaving


if __name__ == "__main__":
    main()
