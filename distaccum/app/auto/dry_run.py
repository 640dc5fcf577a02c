"""One rank alone computes the windows of a run in throw-away work: what they take of its memory, measured.

All collectives go nowhere meanwhile, so that no rank can wait for another one, whatever happens to it.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from distaccum._torch import is_out_of_memory, silence
from distaccum.app.assembly import make_accumulator
from distaccum.app.config import Config
from distaccum.app.task import Problem
from distaccum.core.window import MicroBatches
from distaccum.data.base import Dataset
from distaccum.parallel.ledger import Audit
from distaccum.parallel.world import World
from distaccum.planner.meter import Meter
from distaccum.step.overlap.schedule import AUTO

WINDOWS = 2  # in the second one the optimizer's state is there from the beginning
ROUNDS = 3  # a first micro, a last one, and one between them


@dataclass(frozen=True)
class Rehearsal:
    """What a rank has seen."""

    fits: bool  # False: memory ran out
    peak_bytes: int  # the most that its tensors took at once; where memory ran out, until then


def rehearse(
    config: Config, problem: Problem, world: World, micro_size: int, num_micros: int, limit: int | None
) -> Rehearsal:  # fmt: skip
    """Compute two windows of so large micros on this rank, with real memory, on the longest samples there are.

    Model, strategy, optimizer and objective are as configured and thrown away afterwards. torch's random generators
    and process groups are left as they were. On a GPU the limit is one to what torch's allocator has reserved, so that
    fragments count; on the CPU to the tensors themselves, where those inside of compiled code are not seen.

    Args:
        config: with any `accum.micro`, which is not read.
        problem: whose training samples are read, without worker processes.
        world: this rank among those that the model is spread over.
        micro_size: samples in each micro, at most as many as there are.
        num_micros: of a window on this rank. Three tell its peak, or one more than are computed together.
        limit: bytes that tensors may take; None: what the device has.
    """
    gpus = [world.device] if world.device.type == "cuda" else []
    meter = Meter(world.device, limit)
    fits = True
    with torch.random.fork_rng(gpus), silence():
        try:
            with meter:
                _train(_harmless(config), problem, world.device, micro_size, num_micros)
        except Exception as error:
            if not _short(error):
                raise
            fits = False
        finally:  # an error held on to all tensors of its frames until here
            gc.collect()
            if gpus:
                torch.cuda.empty_cache()
            if config.nn.compile:
                torch.compiler.reset()  # or the training would find what was compiled for other sizes
    return Rehearsal(fits, meter.peak_bytes)


def _short(error: BaseException | None) -> bool:
    """Whether memory ran out: here, or before what went wrong while a window was given up for it."""
    return error is not None and (is_out_of_memory(error) or _short(error.__context__))


def _harmless(config: Config) -> Config:
    """The same in memory; updates leave the weights as they are, so that windows stay finite where the first one is."""
    accum = config.accum
    overlap_micros = 1 if accum.overlap_micros == AUTO else accum.overlap_micros
    return replace(
        config,
        accum=replace(accum, audit=Audit.never, overlap_micros=overlap_micros),
        optim=replace(config.optim, lr=0.0),
        precision=replace(config.precision, loss_scale=1.0),
    )


def _train(config: Config, problem: Problem, device: torch.device, micro_size: int, num_micros: int) -> None:
    accumulator = make_accumulator(config, problem, World.of(device))
    _answer_locally(accumulator.strategy.model)
    rounds = min(num_micros, max(ROUNDS, config.accum.overlap_micros + 1))
    for step in range(WINDOWS):
        accumulator.step(_window(problem.train, micro_size, rounds, step))
    assert accumulator.steps == WINDOWS, f"{accumulator.steps} of {WINDOWS} windows made an update"


def _window(dataset: Dataset, micro_size: int, rounds: int, step: int) -> MicroBatches:
    """The same samples in each micro, streamed where a training streams them."""
    samples = dataset.longest(micro_size)
    weight = dataset.counted(samples)
    content = (dataset.batch(samples, torch.Generator().manual_seed(step)) for _ in range(rounds))
    if weight is None:
        return MicroBatches(list(content), rounds, step=step)
    return MicroBatches(content, rounds, step=step, weights=[weight] * rounds)


def _answer_locally(model: nn.Module) -> None:
    """Reductions that go nowhere return what this rank has given, and not any numbers or none."""
    if isinstance(model, DistributedDataParallel):
        model.register_comm_hook(None, lambda _, bucket: _known(bucket.buffer()))
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_custom_reduce_scatter(_OwnShard())  # type: ignore[arg-type]


def _known(result: Tensor) -> torch.futures.Future[Tensor]:
    future: torch.futures.Future[Tensor] = torch.futures.Future()
    future.set_result(result)
    return future


class _OwnShard:
    """As torch's own reduce-scatter, whose class has no public name."""

    def allocate(self, size: torch.Size, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, *unused: object, **named: object) -> None:
        output_tensor.copy_(input_tensor[: len(output_tensor)])
