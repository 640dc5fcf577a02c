"""Raises the errors of one rank on all ranks, so that an action succeeds on all or on none."""

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
    """Make a gloo group of the same ranks for this use only, and return its world on the CPU."""
    cpu = torch.device("cpu")
    if world.group is None:
        return World(0, 1, cpu, None)
    ranks = dist.get_process_group_ranks(world.group)
    apart = len(ranks) < dist.get_world_size()  # then the ranks outside the group do not call this
    group = dist.new_group(ranks, backend="gloo", use_local_synchronization=apart)
    assert group is not None
    return World.of(cpu, group)


def all_ranks_or_none(world: World, call: Callable[[], T]) -> list[T]:
    """Call a function on every rank, and return what each rank returned, in rank order.

    Raises:
        CheckpointError: on all ranks, if any rank failed; it says which ranks failed, and why.
    """
    return _values(world.gather_objects(_tried(call)))


def dealt(world: World, call: Callable[[], T], deal: Callable[[list[T]], list[U]]) -> U:
    """Call a function on all ranks, and give each rank a part of what rank 0 makes of the results.

    Only rank 0 gets all results, because they may be large and the ranks may be many.

    Args:
        world: the ranks.
        call: the function that runs on every rank.
        deal: the function that runs on rank 0. It takes the results and returns one part per rank,
            in rank order.

    Returns:
        The part of this rank.

    Raises:
        CheckpointError: on all ranks, if `call` failed on any rank, or `deal` on rank 0.
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
    """Return the result of a call and an empty text, or None and the text of its error."""
    try:
        return call(), ""
    except CheckpointError as error:
        return None, str(error)
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"


def _values(rows: list[tuple[T | None, str]]) -> list[T]:
    """Return the results of all ranks, or raise an error that says which ranks failed, and why."""
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
