"""Measures the memory of a run's windows by computing them on one rank and discarding the results.

Collectives send nothing meanwhile. So no rank waits for another one, even if one of them fails.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from distaccum._torch import is_out_of_memory, no_communication
from distaccum.app.assembly import make_accumulator
from distaccum.app.config import Config
from distaccum.app.task import Task
from distaccum.core.window import MicroBatches
from distaccum.data.base import Dataset
from distaccum.parallel.ledger import Audit
from distaccum.parallel.world import World
from distaccum.planner.meter import Meter
from distaccum.step.overlap.schedule import AUTO

WINDOWS = 2  # the second window has the optimizer state from its beginning
ROUNDS = 3  # the first micro-batch, the last one, and one in between


@dataclass(frozen=True)
class DryRun:
    """Holds the result of a dry run on one rank."""

    fits: bool  # False: the rank ran out of memory
    peak_bytes: int  # peak of its tensors; if memory ran out, the peak until then


def dry_run(
    config: Config,
    task: Task,
    world: World,
    micro_batch_size: int,
    num_micro_batches: int,
    limit: int | None,
) -> DryRun:
    """Compute two windows on this rank, in real memory, with the longest training samples.

    Model, strategy, optimizer and objective are as configured, and are discarded afterwards.
    torch's random generators and process groups are not changed. On a GPU the limit applies to the
    memory that torch's allocator has reserved, so fragmentation counts. On the CPU it applies to
    the tensors themselves, except those inside compiled code, which are not seen.

    Args:
        config: the configuration; its `accum.micro_batch_size` is not read.
        task: the task whose training samples are read, without worker processes.
        world: this rank and the ranks over which the model is distributed.
        micro_batch_size: samples in each micro-batch, at most as many as there are in the data.
        num_micro_batches: micro-batches of a window on this rank. At most three are computed, or
            `accum.overlap_micro_batches` + 1 if that is more: further ones do not raise the peak.
        limit: bytes that tensors may take; None: all that the device has.

    Returns:
        Whether the windows fit, and the peak of the tensors.
    """
    gpus = [world.device] if world.device.type == "cuda" else []
    meter = Meter(world.device, limit)
    fits = True
    with torch.random.fork_rng(gpus), no_communication():
        try:
            with meter:
                _train(
                    _with_zero_lr(config), task, world.device, micro_batch_size, num_micro_batches
                )
        except Exception as error:
            if not _ran_out_of_memory(error):
                raise
            fits = False
        finally:  # until here an error kept all tensors of its frames alive
            gc.collect()
            if gpus:
                torch.cuda.empty_cache()
            if config.nn.compile:
                # Otherwise the training would reuse code that was compiled for other sizes.
                torch.compiler.reset()
    return DryRun(fits, meter.peak_bytes)


def _ran_out_of_memory(error: BaseException | None) -> bool:
    """Return whether an error, or an earlier error that it followed, means out of memory.

    After out of memory the window is aborted, which can raise another error.
    """
    return error is not None and (is_out_of_memory(error) or _ran_out_of_memory(error.__context__))


def _with_zero_lr(config: Config) -> Config:
    """Return a configuration that takes the same memory, but whose updates change no parameters.

    With a learning rate of 0 the second window is finite if the first one is. The ledger is off,
    and the loss scale is 1.
    """
    accum = config.accum
    overlap_micro_batches = (
        1 if accum.overlap_micro_batches == AUTO else accum.overlap_micro_batches
    )
    return replace(
        config,
        accum=replace(accum, audit=Audit.never, overlap_micro_batches=overlap_micro_batches),
        optim=replace(config.optim, lr=0.0),
        precision=replace(config.precision, loss_scale=1.0),
    )


def _train(
    config: Config, task: Task, device: torch.device, micro_batch_size: int, num_micro_batches: int
) -> None:
    accumulator = make_accumulator(config, task, World.of(device))
    _answer_locally(accumulator.strategy.model)
    rounds = min(num_micro_batches, max(ROUNDS, config.accum.overlap_micro_batches + 1))
    for step in range(WINDOWS):
        accumulator.step(_window(task.train, micro_batch_size, rounds, step))
    assert accumulator.steps == WINDOWS, f"{accumulator.steps} of {WINDOWS} windows made an update"


def _window(dataset: Dataset, micro_batch_size: int, rounds: int, step: int) -> MicroBatches:
    """Make a window whose micro-batches all hold the same samples.

    It is streamed if a training would stream it.
    """
    samples = dataset.longest_samples(micro_batch_size)
    denominator = dataset.num_targets(samples)
    content = (dataset.batch(samples, torch.Generator().manual_seed(step)) for _ in range(rounds))
    if denominator is None:
        return MicroBatches(list(content), rounds, step=step)
    return MicroBatches(content, rounds, step=step, denominators=[denominator] * rounds)


def _answer_locally(model: nn.Module) -> None:
    """Make each reduction return this rank's own input.

    Otherwise the results would be undefined, because collectives send nothing.
    """
    if isinstance(model, DistributedDataParallel):
        model.register_comm_hook(None, lambda _, bucket: _known(bucket.buffer()))
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_custom_reduce_scatter(_OwnShard())  # type: ignore[arg-type]


def _known(result: Tensor) -> torch.futures.Future[Tensor]:
    """Return a future that already has its result."""
    future: torch.futures.Future[Tensor] = torch.futures.Future()
    future.set_result(result)
    return future


class _OwnShard:
    """Implements a reduce-scatter that returns this rank's part of its input.

    It has the interface of torch's own class, which has no public name.
    """

    def allocate(self, size: torch.Size, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, *unused: object, **named: object
    ) -> None:
        output_tensor.copy_(input_tensor[: len(output_tensor)])
