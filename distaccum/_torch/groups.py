"""Uses private names of torch.distributed, to send nothing and to count collectives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode


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
        group: dist.ProcessGroup | None = dist.new_group(backend="fake", use_local_synchronization=True)
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


def issued(groups: Sequence[dist.ProcessGroup]) -> list[int]:
    """Return how many collectives this process has issued in each of these groups.

    Groups count them for their own logs, without a public getter. Fake groups count 0.
    """
    return [
        0 if dist.get_backend(group) == "fake" else group._get_sequence_number_for_group()  # type: ignore[attr-defined]
        for group in groups
    ]


class Withheld(TorchDispatchMode):
    """Withholds the first collectives of some groups, which then return at once and send nothing.

    Their results are arbitrary numbers. An operator is recognized as a collective if one of its
    arguments is a boxed process group, whose type has no public name in Python.
    """

    def __init__(self, first: Mapping[str, int], *, gathers: bool) -> None:
        """Set how many collectives to withhold.

        Args:
            first: the number of collectives to withhold, by the group's name.
            gathers: whether to withhold all all-gathers too, without counting them in `first`.
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
        return _no_communication(group.rank(), group.size()).boxed()


def _no_communication(rank: int, world_size: int) -> Any:
    """Return a fake process group that torch.distributed does not know.

    `fake_process_group` registers its group, and then other ranks would have to register it too.
    """
    from torch._C import _distributed_c10d as c10d

    group: Any = dist.ProcessGroup(dist.HashStore(), rank, world_size)  # type: ignore[attr-defined]
    fake: Any = c10d.FakeProcessGroup
    backend, kind = fake._create_internal(rank, world_size, fake.Options()), dist.ProcessGroup.BackendType.CUSTOM
    for device in ("cpu", "cuda"):
        group._register_backend(torch.device(device), kind, backend)
    group._set_default_backend(kind)
    return group
