"""What one rank cannot do, none has done: errors of one rank are raised on all."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from distaccum.errors import CheckpointError
from distaccum.parallel.world import World

T = TypeVar("T")


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
    try:
        own: tuple[T | None, str] = (call(), "")
    except CheckpointError as error:
        own = (None, str(error))
    except Exception as error:
        own = (None, f"{type(error).__name__}: {error}")
    rows = world.gather_objects(own)
    troubles: dict[str, list[int]] = {}
    for rank, (_, trouble) in enumerate(rows):
        if trouble:
            troubles.setdefault(trouble, []).append(rank)
    if troubles:
        raise CheckpointError(
            "; ".join(f"{_ranks(ranks) if world.size > 1 else ''}{text}" for text, ranks in troubles.items())
        )
    return [value for value, _ in rows]  # type: ignore[misc]


def _ranks(ranks: list[int]) -> str:
    return f"rank {ranks[0]}: " if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}: "
