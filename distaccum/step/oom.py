"""Runs a window so that all ranks learn if one of them runs out of memory in it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from distaccum._torch import is_out_of_memory
from distaccum.data.device import halved
from distaccum.errors import ConfigError, OutOfMemoryError
from distaccum.parallel.base import Strategy
from distaccum.step.consensus import Consensus
from distaccum.step.micro_batches import MicroBatchRunner


def refuse(strategy: Strategy) -> None:
    """Raise ConfigError if a rank cannot leave a window of this strategy without the others."""
    if strategy.communicates:
        raise ConfigError(
            "agree_on_oom=True needs micro-batches that send nothing, but here they communicate "
            "(FSDP2, sync='every', or BatchNorm layers in mode 'sync'), so a rank that runs out of "
            "memory cannot leave the window without the others waiting for it. Let the error end "
            "the run, and continue from a checkpoint with smaller micro-batches."
        )


def run(
    strategy: Strategy,
    consensus: Consensus,
    runner: MicroBatchRunner,
    compute: Callable[[MicroBatchRunner], Callable[[], None]],
) -> Callable[[], None]:
    """Compute a window with all its backwards, and raise on all ranks if one ran out of memory.

    Args:
        strategy: one whose micro-batches send nothing.
        consensus: exchanges which ranks ran out of memory.
        runner: runs the forwards of the window.
        compute: the order of forwards and backwards, such as `plain_order.run`.

    Returns:
        A function that does nothing, in place of the last backward.

    Raises:
        OutOfMemoryError: on all ranks. The caller discards what was computed.
    """
    message = None
    try:
        compute(runner)()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        message = str(error).strip().split("\n")[0].rstrip(".") + "."
    # Not in the except block, where the error keeps all tensors of the forward alive.
    consensus.padding = (
        runner.last_micro_batch if message is None else halved(runner.last_micro_batch)
    )
    if message is not None:
        strategy.abort()
        if strategy.world.device.type == "cuda":
            torch.cuda.empty_cache()
    out_of_memory = consensus.out_of_memory_ranks(message is not None)
    if out_of_memory:
        ranks = f"rank{'s' if len(out_of_memory) > 1 else ''} {', '.join(map(str, out_of_memory))}"
        raise OutOfMemoryError(f"Out of memory on {ranks}{f': {message}' if message else '.'}")
    return lambda: None
