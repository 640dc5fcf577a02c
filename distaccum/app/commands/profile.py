"""Runs `distaccum profile`, which measures the speeds of a machine with the configured model."""

from __future__ import annotations

import math
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd import backward

from distaccum.app.assembly import batch_arithmetic
from distaccum.app.build import ranks
from distaccum.app.config import Config, typed
from distaccum.app.task import Task, build_task, in_precision, make_model
from distaccum.core.loss import Denominator, SupportsObjective, denominators_of, joined, sums_of
from distaccum.core.strategies import StrategyName
from distaccum.data.device import to_device
from distaccum.errors import ConfigError
from distaccum.grads.clip import clip, squared_norm
from distaccum.launch import Job
from distaccum.metrics import Console, count
from distaccum.metrics.table import table
from distaccum.nn.blocks import checkpoint_blocks, compile_blocks
from distaccum.optim import make_optimizer
from distaccum.parallel.world import World
from distaccum.planner.hardware import KINDS, HardwareProfile, LinkTimings, fit
from distaccum.planner.trace import trace
from distaccum.step.overlap.schedule import AUTO
from distaccum.version import __version__

MACHINE_FILE = "machine.json"
COMPUTE_BUDGET_S, MESSAGE_BUDGET_S = 3.0, 0.2  # total seconds of the repetitions of one measurement
LEAST, MOST = 5, 200  # fewest and most repetitions
SMALLEST_BYTES, GROWTH, LARGEST_BYTES = 4 * 2**10, 4, 64 * 2**20  # message sizes
# Messages need not grow beyond this time. A link with a token-bucket limit first sends faster than
# its rate, often for some milliseconds. A message that ends within that time says little about the
# rate.
LONG_S = 0.1

Work = Callable[[], object]


def profile(job: Job) -> None:
    """Measure the speeds of this machine on all ranks of the job, and write them to a file.

    Every rank of the job runs this. Rank 0 writes the hardware profile to a file, and prints it as
    a table.

    Args:
        job: the configuration, and this process's rank.

    Raises:
        ConfigError: before the measurement, if the file cannot be written, or exists and is not a
            hardware profile.
    """
    config = typed(job.config)
    path = Path(config.machine or MACHINE_FILE)
    if job.rank == 0 and path.exists():
        HardwareProfile.load(path)  # so that only a hardware profile is ever replaced
    elif job.rank == 0 and not path.absolute().parent.is_dir():
        raise ConfigError(
            f"machine={path}: there is no folder {path.parent}. Create it, or name a file "
            "elsewhere."
        )
    with ranks(config, job) as world:
        machine = measure(config, world)
    if job.rank == 0:
        machine.save(path)
        Console().line(
            f"{shown(machine)}\nwritten to {path}; `distaccum plan machine={path}` predicts step"
            " times with it"
        )


def measure(config: Config, world: World) -> HardwareProfile:
    """Measure the speeds on all ranks at the same time, and return the same profile on every rank.

    Ranks measure together because they share cores and links in training too.

    Args:
        config: the configuration.
        world: the ranks of the job.

    Raises:
        ConfigError: if the FLOPs of a micro-batch do not depend on its size.
    """
    task = build_task(config)
    parallel = replace(config.parallel, name=StrategyName.single)  # autocast replaces FSDP2's casts
    objective = in_precision(replace(config, parallel=parallel), task.objective)
    model = make_model(config, task, world.device)
    blocks = task.blocks_of(model)
    if config.nn.checkpoint:
        checkpoint_blocks(blocks)
    micro_batches = [_micro_batch(task, samples, world) for samples in _sizes(config, task, world)]
    # Counted in the same way as by `distaccum plan`.
    counted = (
        trace(
            model, task.blocks_of, objective.loss_sum, micro_batch, samples=1, device=world.device
        )
        for micro_batch in micro_batches
    )
    flops = [one.flops for one in counted]
    if flops[0] == flops[1]:
        raise ConfigError(
            f"{config.model.name}: torch counts {flops[0]} FLOPs in micro-batches of both measured "
            "sizes, so no speed can be derived. Use a model with matrix products or convolutions."
        )
    if config.nn.compile:
        compile_blocks(blocks)
    works = [_forward_backward(model, objective, micro_batch) for micro_batch in micro_batches]
    *micro_batch_s, update_s = _seconds(
        world, [*works, _update(config, model, world)], COMPUTE_BUDGET_S
    )
    small, large = sorted(zip(flops, micro_batch_s, strict=True))
    micro_batch_overhead_s, s_per_flop = fit(small, large)
    return HardwareProfile(
        device=torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu",
        threads=torch.get_num_threads(),
        model=f"{config.model.name}, {sum(p.numel() for p in model.parameters()):,} parameters",
        precision=config.precision.name.value,
        micro_batch_overhead_s=micro_batch_overhead_s,
        flops_per_s=1 / s_per_flop,
        update_s_per_number=update_s
        / sum(p.numel() for p in model.parameters() if p.requires_grad),
        ranks=world.size,
        links={kind: _link(world, kind) for kind in KINDS} if world.size > 1 else {},
        overlaps=world.device.type == "cuda",
        versions={
            "torch": str(torch.__version__),
            "distaccum": __version__,
            "python": platform.python_version(),
        },
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def _sizes(config: Config, task: Task, world: World) -> tuple[int, int]:
    """Return the micro-batch size of the training, and another size."""
    if config.accum.micro_batch_size == AUTO:
        config = replace(config, accum=replace(config.accum, micro_batch_size=None))
    size = batch_arithmetic(config, task, world.size).micro_batch_size
    return size, size // 2 if size > 1 else 2


def _micro_batch(task: Task, samples: int, world: World) -> Any:
    """Return a micro-batch of training samples on the device."""
    indices = [index % len(task.train) for index in range(samples)]
    return to_device(task.train.batch(indices, torch.Generator().manual_seed(0)), world.device)


def _forward_backward(model: nn.Module, objective: SupportsObjective, micro_batch: Any) -> Work:
    """Return a function that runs forward and backward as in the middle of a window."""
    denominators = denominators_of(objective, micro_batch)

    def work() -> None:
        sums = sums_of(objective, model, micro_batch, [*denominators])
        backward(joined(sums), Denominator(denominators).gradient(sums, 1.0))

    return work


def _update(config: Config, model: nn.Module, world: World) -> Work:
    """Return a function that computes the gradient norm, clips and runs the optimizer."""
    optimizer = make_optimizer(model, config.optim)

    def work() -> None:
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norm = math.sqrt(squared_norm(gradients, world.device).item())
        if config.optim.clip_norm is not None:
            clip(gradients, norm, config.optim.clip_norm)
        optimizer.step()

    return work


def _link(world: World, kind: str) -> LinkTimings:
    """Measure messages of growing size until one takes at least `LONG_S` seconds."""
    sizes: list[int] = []
    seconds: list[float] = []
    while not sizes or (sizes[-1] < LARGEST_BYTES and seconds[-1] < LONG_S):
        num_bytes, work = _message(world, kind, sizes[-1] * GROWTH if sizes else SMALLEST_BYTES)
        sizes.append(num_bytes)
        seconds += _seconds(world, [work], MESSAGE_BUDGET_S)
    return LinkTimings(tuple(sizes), tuple(seconds))


def _message(world: World, kind: str, num_bytes: int) -> tuple[int, Work]:
    """Return the bytes of a message, and a function that runs its collective.

    The message has about `num_bytes` bytes. The function also makes the copies that DDP and FSDP2
    make.
    """
    part = torch.zeros(max(1, num_bytes // 4 // world.size), device=world.device)
    whole = part.repeat(world.size)
    bucket = torch.zeros_like(whole)
    # The names after `or` are deprecated since torch 2.13; older versions have only these.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

    def all_reduce() -> None:  # copies gradients into a bucket and back
        bucket.copy_(whole)
        dist.all_reduce(bucket, group=world.group)
        whole.copy_(bucket)

    def all_gather() -> None:  # copies shards in and parameters out, in new memory
        gathered = torch.empty_like(whole)
        gather(gathered, part.clone(), group=world.group)
        gathered.clone()

    def reduce_scatter() -> None:  # copies gradients into one message
        scatter(torch.empty_like(part), whole.clone(), group=world.group)

    works: dict[str, Work] = {
        "all_reduce": all_reduce,
        "all_gather": all_gather,
        "reduce_scatter": reduce_scatter,
    }
    return whole.nbytes, works[kind]


def _seconds(world: World, works: Sequence[Work], budget_s: float) -> list[float]:
    """Return the median seconds of each function on the slowest rank; all ranks run them together.

    The functions take turns in every round. The number of rounds follows from `budget_s`.
    """
    for work in works:
        work()
    first = _slowest(world, [_once(world, work) for work in works])
    rounds = min(MOST, max(LEAST, math.ceil(budget_s / sum(first))))
    taken = [[_once(world, work) for work in works] for _ in range(rounds)]
    return _slowest(world, [statistics.median(column) for column in zip(*taken, strict=True)])


def _once(world: World, work: Work) -> float:
    """Return the seconds that a function takes, including its work on the device."""
    _wait(world.device)
    began = time.perf_counter()
    work()
    _wait(world.device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _slowest(world: World, seconds: Sequence[float]) -> list[float]:
    """Return the largest value over ranks for each position; this also synchronizes the ranks."""
    rows, _ = world.gather_rows(seconds).read()
    return [max(column) for column in zip(*rows, strict=True)]


def shown(machine: HardwareProfile) -> str:
    """Format a hardware profile as a table for a terminal."""
    where = f"{machine.ranks} rank(s) on {machine.device}, {machine.threads} thread(s) each"
    rows: list[Sequence[str]] = [
        [
            "forward and backward",
            f"{machine.micro_batch_overhead_s * 1e3:.3g} ms",
            f"{count(machine.flops_per_s)}FLOP/s",
        ],
        [
            "optimizer update",
            "-",
            f"{count(1 / max(machine.update_s_per_number, 1e-15))} parameters/s",
        ],
    ]
    for kind, link in machine.links.items():
        largest = f"{link.sizes[-1] / link.seconds[-1] / 1e6:.4g} MB/s"
        rows.append([kind.replace("_", "-"), f"{link.latency_s * 1e3:.3g} ms", largest])
    title = f"{machine.model} in {machine.precision}; {where}; speeds of the slowest rank"
    return f"{title}\n{table(['operation', 'fixed cost', 'rate'], rows)}"
