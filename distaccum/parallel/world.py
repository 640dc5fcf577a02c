"""The ranks that train together, and the one small collective by which they agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This rank among those that share one effective batch."""

    rank: int
    size: int
    device: torch.device  # where the model lives
    group: dist.ProcessGroup | None  # None on one process

    @staticmethod
    def of(device: torch.device, group: dist.ProcessGroup | None = None) -> World:
        """The world of a process group (default: all ranks), or of this process alone."""
        if not (dist.is_available() and dist.is_initialized()):
            return World(0, 1, device, None)
        group = group if group is not None else dist.group.WORLD
        return World(dist.get_rank(group), dist.get_world_size(group), device, group)

    def share(self, known: Sequence[float], measured: Sequence[Tensor] = ()) -> Shared:
        """Start to show one row to all ranks; nothing waits here.

        Args:
            known: the beginning of this rank's row; as many numbers on every rank.
            measured: the rest of it, [n] each, on any device; as many on every rank.

        Returns:
            What becomes the table of all rows. All ranks must call this in the same order.
        """
        if self.group is None:
            return Shared(1, list(known), list(measured), None)
        # Where this device has no backend of its own (a model on a GPU, ranks that share gloo) the CPU's serves.
        served = f"{self.device.type}:" in dist.get_backend_config(self.group)
        device = self.device if served else torch.device("cpu")
        told = torch.tensor(known, dtype=torch.float64, pin_memory=device.type == "cuda")
        row = torch.cat([told.to(device, non_blocking=True), *(part.to(device) for part in measured)])
        table = torch.zeros(self.size * row.numel(), dtype=torch.float64, device=device)
        table[self.rank * row.numel() : (self.rank + 1) * row.numel()] = row
        # One all-reduce in which each rank adds to its own row only: a gather whose name is the same in every torch.
        return Shared(self.size, [], [table], dist.all_reduce(table, group=self.group, async_op=True))

    def gather_objects(self, value: T) -> list[T]:
        """One small object of each rank, in rank order. Pickled: for set-up only, between ranks of this job."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def lend(self, value: object, lender: int) -> object:
        """An object of one rank, given to all."""
        if self.group is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, group=self.group, group_src=lender)
        return box[0]


class Shared:
    """A table of one row a rank that is on its way."""

    def __init__(self, size: int, known: list[float], parts: list[Tensor], work: dist.Work | None) -> None:
        """Keep the table of `size` rows: what is known of it, then [n] each; and the collective that fills them."""
        self._size = size
        self._known = known
        self._parts = parts
        self._work = work

    def read(self, *others: Tensor) -> tuple[list[list[float]], list[float]]:
        """Wait, and bring the table and other scalars [] to the host: the one host sync of a window.

        Returns:
            The rows in rank order, and the scalars.
        """
        if self._work is not None:
            self._work.wait()
        parts = self._parts + [other[None] for other in others]
        found = torch.cat([part.to(parts[0]) for part in parts]).tolist() if parts else []
        numbers = self._known + found
        columns = (len(numbers) - len(others)) // self._size
        table = [numbers[i * columns : (i + 1) * columns] for i in range(self._size)]
        return table, numbers[self._size * columns :]
