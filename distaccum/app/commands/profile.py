"""`distaccum profile`: what this machine does in a second, measured with the configured model on its ranks."""

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

from distaccum._torch import backward
from distaccum.app.assembly import batch_arithmetic
from distaccum.app.build import ranks
from distaccum.app.config import Config, typed
from distaccum.app.task import Problem, in_precision, make_model, make_problem
from distaccum.core.loss import Denominator, SupportsObjective, joined, sums_of, weights_of
from distaccum.data.device import to_device
from distaccum.errors import ConfigError
from distaccum.grads.clip import clip, squared_norm
from distaccum.launch import Job
from distaccum.metrics import Console, count
from distaccum.metrics.table import table
from distaccum.nn.blocks import checkpoint_blocks, compile_blocks
from distaccum.optim import make_optimizer
from distaccum.parallel.apply import StrategyName
from distaccum.parallel.world import World
from distaccum.planner.hardware import KINDS, Link, Machine, fit
from distaccum.planner.trace import trace
from distaccum.version import __version__

MACHINE_FILE = "machine.json"
COMPUTE_BUDGET_S, MESSAGE_BUDGET_S = 3.0, 0.2  # for what is repeated together
LEAST, MOST = 5, 200  # times that it is
SMALLEST_BYTES, GROWTH, LARGEST_BYTES = 4 * 2**10, 4, 64 * 2**20  # messages
# A message that takes as long is long enough. A link that is limited by a bucket of tokens passes what the bucket holds
# faster than its rate, often some milliseconds of it: within that time a message says little of the rate.
LONG_S = 0.1

Work = Callable[[], object]


def profile(job: Job) -> None:
    """Measure on this rank, with all others. Every rank of the job runs this; rank 0 writes the file and a table.

    Raises:
        ConfigError: for a file that cannot be written or is of something else, before anything is measured.
    """
    config = typed(job.config)
    path = Path(config.machine or MACHINE_FILE)
    if job.rank == 0 and path.exists():
        Machine.load(path)  # only a file of our own is replaced
    elif job.rank == 0 and not path.absolute().parent.is_dir():
        raise ConfigError(f"machine={path}: there is no folder {path.parent}. Make it, or name a file elsewhere.")
    with ranks(config, job) as world:
        machine = measure(config, world)
    if job.rank == 0:
        machine.save(path)
        Console().line(f"{shown(machine)}\nwritten to {path}; `distaccum plan machine={path}` tells times by it")


def measure(config: Config, world: World) -> Machine:
    """Measure on all ranks at once, since they share cores and links in training too. The same result on every rank."""
    problem = make_problem(config)
    parallel = replace(config.parallel, name=StrategyName.single)  # autocast does what FSDP2's own casts would do
    objective = in_precision(replace(config, parallel=parallel), problem.objective)
    model = make_model(config, problem, world.device)
    blocks = problem.blocks_of(model)
    if config.nn.checkpoint:
        checkpoint_blocks(blocks)
    micros = [_micro(problem, samples, world) for samples in _sizes(config, problem, world)]
    flops = [_flops(model, problem, objective, micro, world) for micro in micros]
    if flops[0] == flops[1]:
        raise ConfigError(f"{config.model.name}: torch counts {flops[0]} FLOPs in a micro of any size; nothing to fit.")
    if config.nn.compile:
        compile_blocks(blocks)
    works = [_forward_backward(model, objective, micro) for micro in micros]
    *micro_s, update_s = _seconds(world, [*works, _update(config, model, world)], COMPUTE_BUDGET_S)
    small, large = sorted(zip(flops, micro_s, strict=True))
    micro_overhead_s, s_per_flop = fit(small, large)
    return Machine(
        device=torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu",
        threads=torch.get_num_threads(),
        model=f"{config.model.name}, {sum(p.numel() for p in model.parameters()):,} parameters",
        precision=config.precision.name.value,
        micro_overhead_s=micro_overhead_s,
        flops_per_s=1 / s_per_flop,
        update_s_per_number=update_s / sum(p.numel() for p in model.parameters() if p.requires_grad),
        ranks=world.size,
        links={kind: _link(world, kind) for kind in KINDS} if world.size > 1 else {},
        overlaps=world.device.type == "cuda",
        versions={"torch": str(torch.__version__), "distaccum": __version__, "python": platform.python_version()},
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def _sizes(config: Config, problem: Problem, world: World) -> tuple[int, int]:
    """The micro size that will be trained with, and another one."""
    micro = None if config.accum.micro == "auto" else config.accum.micro
    size = batch_arithmetic(
        replace(config, accum=replace(config.accum, micro=micro)), problem, world.size
    ).micro_size  # fmt: skip
    return size, size // 2 if size > 1 else 2


def _micro(problem: Problem, samples: int, world: World) -> Any:
    """So many samples of the training's, on the device."""
    indices = [index % len(problem.train) for index in range(samples)]
    return to_device(problem.train.batch(indices, torch.Generator().manual_seed(0)), world.device)


def _flops(model: nn.Module, problem: Problem, objective: SupportsObjective, micro: Any, world: World) -> int:
    """As `distaccum plan` counts them."""
    return trace(model, problem.blocks_of, objective.loss_sum, micro, samples=1, device=world.device).flops


def _forward_backward(model: nn.Module, objective: SupportsObjective, micro: Any) -> Work:
    """As in the middle of a window: gradients add up."""
    weights = weights_of(objective, micro)

    def work() -> None:
        sums = sums_of(objective, model, micro, [*weights])
        backward(joined(sums), Denominator(weights).gradient(sums, 1.0))

    return work


def _update(config: Config, model: nn.Module, world: World) -> Work:
    """Norm, clipping and the optimizer's step, on the gradients that there are."""
    optimizer = make_optimizer(model, config.optim)

    def work() -> None:
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norm = math.sqrt(squared_norm(gradients, world.device).item())
        if config.optim.clip_norm is not None:
            clip(gradients, norm, config.optim.clip_norm)
        optimizer.step()

    return work


def _link(world: World, kind: str) -> Link:
    """Messages of growing size, until one takes long enough to hide no bucket of tokens."""
    sizes: list[int] = []
    seconds: list[float] = []
    while not sizes or (sizes[-1] < LARGEST_BYTES and seconds[-1] < LONG_S):
        num_bytes, work = _message(world, kind, sizes[-1] * GROWTH if sizes else SMALLEST_BYTES)
        sizes.append(num_bytes)
        seconds += _seconds(world, [work], MESSAGE_BUDGET_S)
    return Link(tuple(sizes), tuple(seconds))


def _message(world: World, kind: str, num_bytes: int) -> tuple[int, Work]:
    """A collective on about so many bytes: how many they are, and the work, with the copies that DDP and FSDP2 make."""
    part = torch.zeros(max(1, num_bytes // 4 // world.size), device=world.device)
    whole = part.repeat(world.size)
    bucket = torch.zeros_like(whole)
    # The names on the right are deprecated from torch 2.13 on, and the only ones before.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

    def all_reduce() -> None:  # gradients into a bucket, and back
        bucket.copy_(whole)
        dist.all_reduce(bucket, group=world.group)
        whole.copy_(bucket)

    def all_gather() -> None:  # shards into one message, and whole parameters out of it; all in new memory
        gathered = torch.empty_like(whole)
        gather(gathered, part.clone(), group=world.group)
        gathered.clone()

    def reduce_scatter() -> None:  # gradients into one message
        scatter(torch.empty_like(part), whole.clone(), group=world.group)

    works: dict[str, Work] = {"all_reduce": all_reduce, "all_gather": all_gather, "reduce_scatter": reduce_scatter}
    return whole.nbytes, works[kind]


def _seconds(world: World, works: Sequence[Work], budget_s: float) -> list[float]:
    """Of each: the median over rounds in which they take turns, of the slowest rank. All ranks are at it together."""
    for work in works:
        work()
    first = _slowest(world, [_once(world, work) for work in works])
    rounds = min(MOST, max(LEAST, math.ceil(budget_s / sum(first))))
    taken = [[_once(world, work) for work in works] for _ in range(rounds)]
    return _slowest(world, [statistics.median(column) for column in zip(*taken, strict=True)])


def _once(world: World, work: Work) -> float:
    _wait(world.device)
    began = time.perf_counter()
    work()
    _wait(world.device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _slowest(world: World, seconds: Sequence[float]) -> list[float]:
    """The largest of all ranks' numbers, each for itself; thereby ranks meet."""
    rows, _ = world.share(seconds).read()
    return [max(column) for column in zip(*rows, strict=True)]


def shown(machine: Machine) -> str:
    """The machine as a table for a terminal."""
    where = f"{machine.ranks} rank(s) on {machine.device}, {machine.threads} thread(s) each"
    rows: list[Sequence[str]] = [
        ["forward and backward", f"{machine.micro_overhead_s * 1e3:.3g} ms", f"{count(machine.flops_per_s)}FLOP/s"],
        ["update, per number", "-", f"{count(1 / max(machine.update_s_per_number, 1e-15))} numbers/s"],
    ]
    for kind, link in machine.links.items():
        largest = f"{link.sizes[-1] / link.seconds[-1] / 1e6:.4g} MB/s"
        rows.append([kind.replace("_", "-"), f"{link.latency_s * 1e3:.3g} ms", largest])
    title = f"{machine.model} in {machine.precision}; {where}; the slowest rank"
    return f"{title}\n{table(['measured', 'at no size', 'then'], rows)}"
