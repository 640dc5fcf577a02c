"""Uses of names that torch.distributed keeps private: groups that send nothing, and what was sent."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode


def silent_group(world_size: int, rank: int) -> dist.ProcessGroup:
    """Ranks of which only this one is there: collectives return at once and send nothing.

    torch keeps them for tests. Where this process has no process group, this becomes its default one.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        group: dist.ProcessGroup | None = dist.new_group(backend="fake", use_local_synchronization=True)
    else:
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
        group = dist.group.WORLD
    assert group is not None
    return group


@contextmanager
def silence() -> Iterator[None]:
    """All collectives of this process return at once and send nothing while it is entered, whoever calls them.

    Its default process group, which other groups are made of, is a silent one meanwhile; torch has no public way to
    exchange it. New groups are numbered, and ranks find each other by these numbers, so they are put back too.
    """
    if not dist.is_initialized():
        yield
        return
    world: Any = dist.distributed_c10d._world
    own, known, count = world.default_pg, set(world.pg_map), world.group_count
    silent: Any = silent_group(own.size(), own.rank())
    silent.bound_device_id = None  # inherited from NCCL's, whose communicators are made by splitting
    world.default_pg = silent
    try:
        yield
    finally:
        world.default_pg, world.group_count = own, count
        for group in set(world.pg_map) - known:
            dist.destroy_process_group(group)


def issued(groups: Sequence[dist.ProcessGroup]) -> list[int]:
    """How many collectives this process has issued in each group; groups count, for their own logs. Silent ones: 0."""
    return [
        0 if dist.get_backend(group) == "fake" else group._get_sequence_number_for_group()  # type: ignore[attr-defined]
        for group in groups
    ]


class Withheld(TorchDispatchMode):
    """Lets the first collectives of some groups go nowhere: they return at once and leave any numbers.

    A collective is an operator that is given its group in a box, of a type that only torch's core knows.
    """

    def __init__(self, first: Mapping[str, int], *, gathers: bool) -> None:
        """Begin to count.

        Args:
            first: by a group's name, how many of its collectives go nowhere.
            gathers: whether all-gathers go nowhere, all of them, and are not counted.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self._left = Counter(first)
        self._gathers = gathers

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            args = [self._box(func, arg) if isinstance(arg, torch.ScriptObject) else arg for arg in args]
        return func(*args, **(kwargs or {}))

    def _box(self, func: Any, box: Any) -> Any:
        if "ProcessGroup" not in str(box._type()):
            return box
        group = dist.ProcessGroup.unbox(box)
        gather = self._gathers and "allgather" in str(func).replace("_", "")
        if not gather and self._left[group.group_name] <= 0:
            return box
        self._left[group.group_name] -= not gather
        return _silent(group.rank(), group.size()).boxed()


def _silent(rank: int, world_size: int) -> Any:
    """As `silent_group`, and unknown to torch.distributed, which other ranks would have to be told of."""
    from torch._C import _distributed_c10d as c10d

    group: Any = dist.ProcessGroup(dist.HashStore(), rank, world_size)  # type: ignore[attr-defined]
    fake: Any = c10d.FakeProcessGroup
    backend, kind = fake._create_internal(rank, world_size, fake.Options()), dist.ProcessGroup.BackendType.CUSTOM
    for device in ("cpu", "cuda"):
        group._register_backend(torch.device(device), kind, backend)
    group._set_default_backend(kind)
    return group
