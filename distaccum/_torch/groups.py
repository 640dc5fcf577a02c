"""Uses private names of torch.distributed, to send nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist


def fake_process_group(world_size: int, rank: int) -> dist.ProcessGroup:
    """Return a process group whose collectives return at once and send nothing.

    Only this one of its ranks exists. torch keeps such groups for its own tests. If this process
    has no process group, the fake one becomes its default.

    Args:
        world_size: the number of ranks, if this process has no process group yet; otherwise the
            default group's number is used.
        rank: this rank, under the same condition.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        group: dist.ProcessGroup | None = dist.new_group(
            backend="fake", use_local_synchronization=True
        )
    else:
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
        group = dist.group.WORLD
    assert group is not None
    return group


@contextmanager
def no_communication() -> Iterator[None]:
    """Return a context in which all collectives of this process return at once and send nothing.

    Inside, the default process group, from which other groups are made, is a fake one; torch has no
    public way to replace it. Groups are numbered, and ranks find each other by these numbers, so
    the numbering is restored on exit. Groups that were made inside are destroyed.
    """
    if not dist.is_initialized():
        yield
        return
    world: Any = dist.distributed_c10d._world
    own, known, count = world.default_pg, set(world.pg_map), world.group_count
    silent: Any = fake_process_group(own.size(), own.rank())
    # Inherited from an NCCL group. With it, torch would make new groups by splitting communicators.
    silent.bound_device_id = None
    world.default_pg = silent
    try:
        yield
    finally:
        world.default_pg, world.group_count = own, count
        for group in set(world.pg_map) - known:
            dist.destroy_process_group(group)
