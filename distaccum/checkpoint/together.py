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
    return _values(world.gather_objects(tried(call)))


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
    own = tried(call)
    if world.group is None:
        return deal(_values([own]))[0]
    rows: list[Any] | None = [None] * world.size if world.rank == 0 else None
    dist.gather_object(own, rows, group=world.group, group_dst=0)
    parts: list[Any] | None = None
    if rows is not None:
        done = tried(lambda: deal(_values(rows)))
        parts = [done] * world.size if isinstance(done, CheckpointError) else done
    box: list[Any] = [None]
    dist.scatter_object_list(box, parts, group=world.group, group_src=0)
    if isinstance(box[0], CheckpointError):
        raise box[0]
    return box[0]  # type: ignore[no-any-return]


def tried(call: Callable[[], T]) -> T | CheckpointError:
    """Return the result of a call, or its error as a CheckpointError."""
    try:
        return call()
    except CheckpointError as error:
        return error
    except Exception as error:
        return CheckpointError(f"{type(error).__name__}: {error}")


def _values(rows: list[T | CheckpointError]) -> list[T]:
    """Return the results of all ranks, or raise an error that says which ranks failed, and why."""
    troubles: dict[str, list[str]] = {}
    for rank, row in enumerate(rows):
        if isinstance(row, CheckpointError):
            troubles.setdefault(str(row), []).append(str(rank))
    if troubles:
        alone = len(rows) == 1
        texts = [text if alone else f"{_ranks(troubles[text])}: {text}" for text in troubles]
        raise CheckpointError("; ".join(texts))
    return [row for row in rows if not isinstance(row, CheckpointError)]


def _ranks(ranks: list[str]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(ranks)}"
