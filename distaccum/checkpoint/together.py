"""What one rank cannot do, none has done: errors of one rank are raised on all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from distaccum.errors import CheckpointError
from distaccum.parallel.world import World

T = TypeVar("T")
U = TypeVar("U")


def own_group(world: World) -> World:
    """The same ranks on the CPU, over a gloo group that nothing else uses."""
    cpu = torch.device("cpu")
    if world.group is None:
        return World(0, 1, cpu, None)
    ranks = dist.get_process_group_ranks(world.group)
    apart = len(ranks) < dist.get_world_size()  # then the ranks outside do not take part in making it
    group = dist.new_group(ranks, backend="gloo", use_local_synchronization=apart)
    assert group is not None
    return World.of(cpu, group)


def together(world: World, call: Callable[[], T]) -> list[T]:
    """Call something on every rank: what each returned, or on all ranks an error that says which failed, and how."""
    return _values(world.gather_objects(_tried(call)))


def dealt(world: World, call: Callable[[], T], deal: Callable[[list[T]], list[U]]) -> U:
    """Call something on every rank, and give each rank its share of what rank 0 computes from all results.

    No other rank than the first sees more than its own: what ranks return may be large, and they may be many.

    Args:
        world: the ranks.
        call: on every rank.
        deal: on rank 0, from what each rank returned to a part for each rank, in rank order.

    Raises:
        CheckpointError: on all ranks, as `together`, or where `deal` fails.
    """
    own = _tried(call)
    if world.group is None:
        return deal(_values([own]))[0]
    first = world.rank == 0
    rows: list[Any] | None = [None] * world.size if first else None
    dist.gather_object(own, rows, group=world.group, group_dst=0)
    parts: list[Any] | None = None
    if rows is not None:
        done, trouble = _tried(lambda: deal(_values(rows)))
        parts = [(None, trouble)] * world.size if done is None else [(part, "") for part in done]
    box: list[Any] = [None]
    dist.scatter_object_list(box, parts, group=world.group, group_src=0)
    part, trouble = box[0]
    if trouble:
        raise CheckpointError(trouble)
    return part  # type: ignore[no-any-return]


def _tried(call: Callable[[], T]) -> tuple[T | None, str]:
    """What a call returned, and what went wrong."""
    try:
        return call(), ""
    except CheckpointError as error:
        return None, str(error)
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"


def _values(rows: list[tuple[T | None, str]]) -> list[T]:
    """What each rank returned, or an error that says which failed, and how."""
    troubles: dict[str, list[int]] = {}
    for rank, (_, trouble) in enumerate(rows):
        if trouble:
            troubles.setdefault(trouble, []).append(rank)
    if troubles:
        raise CheckpointError(
            "; ".join(f"{_ranks(ranks) if len(rows) > 1 else ''}{text}" for text, ranks in troubles.items())
        )
    return [value for value, _ in rows]  # type: ignore[misc]


def _ranks(ranks: list[int]) -> str:
    return f"rank {ranks[0]}: " if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}: "
