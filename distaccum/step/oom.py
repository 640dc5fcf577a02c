"""A window in which memory may run out on some rank: all ranks learn of it before anything of the window counts."""

from __future__ import annotations

from collections.abc import Callable

import torch

from distaccum import _torch
from distaccum.errors import OutOfMemoryError
from distaccum.parallel.base import Strategy, Sync
from distaccum.step import plain_order
from distaccum.step.consensus import Agreement
from distaccum.step.micro_batches import Forwards


def run(
    strategy: Strategy,
    agreement: Agreement,
    forwards: Forwards,
    compute: Callable[[Forwards], Callable[[], None]],
) -> Callable[[], None]:
    """Compute a window, all its backwards included, and agree on whether every rank could.

    Args:
        strategy: one whose gradients travel within micros (FSDP2), or after the window.
        agreement: tells all ranks.
        forwards: of the window.
        compute: the schedule, see `microbatch.run`.

    Returns:
        What is left: nothing.

    Raises:
        OutOfMemoryError: on all ranks alike. The caller drops what was computed.
    """
    said = None
    try:
        compute(forwards)()
    except Exception as error:
        if not _torch.is_out_of_memory(error):
            raise
        said = str(error).strip().split("\n")[0].rstrip(".") + "."
    # Only here, as the error holds on to all that the forward has made.
    if said is not None:
        strategy.abort()
        if strategy.world.device.type == "cuda":
            torch.cuda.empty_cache()
        forwards.give_up()
        _make_up(strategy, forwards)
    short = agreement.shortage(said is not None)
    if short:
        agreement.padding = forwards.last_micro
        ranks = f"rank{'s' if len(short) > 1 else ''} {', '.join(map(str, short))}"
        raise OutOfMemoryError(f"Out of memory on {ranks}{f': {said}' if said else '.'}")
    return lambda: None


def _make_up(strategy: Strategy, forwards: Forwards) -> None:
    """Issue what other ranks wait for in the rest of this window, whatever is in it.

    The round that broke off is computed from its beginning, and what this rank had sent of it is not sent again. Under
    `keep` parameters were gathered in the first round only: those of a later one go nowhere.
    """
    groups, index, rounds = strategy.groups, forwards.done - 1, forwards.rounds
    if not groups:
        return
    pairs = zip(groups, _torch.issued(groups), forwards.sent_before, strict=True)
    first = {str(group.group_name): now - before for group, now, before in pairs}
    with _torch.Withheld(first, gathers=strategy.sync is Sync.keep and index > 0):
        plain_order.one(strategy, forwards, first=index == 0, last=index == rounds - 1)
    for later in range(index + 1, rounds):
        plain_order.one(strategy, forwards, first=False, last=later == rounds - 1)
