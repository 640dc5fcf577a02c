"""Runs a window so that all ranks learn if one of them runs out of memory in it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from distaccum import _torch
from distaccum.errors import OutOfMemoryError
from distaccum.parallel.base import Strategy, Sync
from distaccum.step import plain_order
from distaccum.step.consensus import Consensus
from distaccum.step.micro_batches import MicroBatchRunner


def run(
    strategy: Strategy,
    consensus: Consensus,
    runner: MicroBatchRunner,
    compute: Callable[[MicroBatchRunner], Callable[[], None]],
) -> Callable[[], None]:
    """Compute a window with all its backwards, and raise on all ranks if one ran out of memory.

    Args:
        strategy: one that sends gradients within micro-batches (FSDP2) or after the window.
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
        if not _torch.is_out_of_memory(error):
            raise
        message = str(error).strip().split("\n")[0].rstrip(".") + "."
    # Not in the except block, where the error keeps all tensors of the forward alive.
    if message is not None:
        strategy.abort()
        if strategy.world.device.type == "cuda":
            torch.cuda.empty_cache()
        runner.switch_to_padding()
        _make_up(strategy, runner)
    out_of_memory = consensus.out_of_memory_ranks(message is not None)
    if out_of_memory:
        consensus.padding = runner.last_micro_batch
        ranks = f"rank{'s' if len(out_of_memory) > 1 else ''} {', '.join(map(str, out_of_memory))}"
        raise OutOfMemoryError(f"Out of memory on {ranks}{f': {message}' if message else '.'}")
    return lambda: None


def _make_up(strategy: Strategy, runner: MicroBatchRunner) -> None:
    """Issue the collectives that other ranks wait for in the rest of this window.

    Their contents do not matter. The round that ran out of memory is computed from its beginning,
    and the collectives that this rank has already issued in it are not sent again. Under
    `gather_once` all ranks gather parameters in the first round only, so the all-gathers that
    repeating a later round causes are not sent.
    """
    groups, index, rounds = strategy.groups, runner.num_started - 1, runner.rounds
    if not groups:
        return
    pairs = zip(groups, _torch.issued(groups), runner.sent_before, strict=True)
    first = {str(group.group_name): now - before for group, now, before in pairs}
    with _torch.Withheld(first, gathers=strategy.sync is Sync.gather_once and index > 0):
        plain_order.one(strategy, runner, first=index == 0, last=index == rounds - 1)
    for later in range(index + 1, rounds):
        plain_order.one(strategy, runner, first=False, last=later == rounds - 1)
