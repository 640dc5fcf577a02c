"""Describes the ranks that train together and the small collective by which they agree."""

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
    """Describes this rank among the ranks that share one effective batch."""

    rank: int
    size: int
    device: torch.device  # the model's
    group: dist.ProcessGroup | None  # None on one process

    @staticmethod
    def of(device: torch.device, group: dist.ProcessGroup | None = None) -> World:
        """Return the world of a process group, or of this process alone without torch.distributed.

        Args:
            device: the device of the model.
            group: the process group; None: all ranks.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return World(0, 1, device, None)
        group = group if group is not None else dist.group.WORLD
        return World(dist.get_rank(group), dist.get_world_size(group), device, group)

    def gather_rows(self, known: Sequence[float], measured: Sequence[Tensor] = ()) -> PendingRows:
        """Start to gather one row of numbers from every rank, without waiting for them.

        All ranks must call this in the same order.

        Args:
            known: the first numbers of this rank's row, on the host. Every rank must give the same
                number of them.
            measured: the other numbers of the row, tensors [n] on any device. Every rank must give
                the same number of them.

        Returns:
            The pending table of all rows; its `read` waits for it.
        """
        if self.group is None:
            return PendingRows(1, list(known), list(measured), None)
        # If the group has no backend for this device (model on a GPU, group on gloo), use the CPU.
        served = f"{self.device.type}:" in dist.get_backend_config(self.group)
        device = self.device if served else torch.device("cpu")
        numbers = torch.tensor(known, dtype=torch.float64, pin_memory=device.type == "cuda")
        row = torch.cat(
            [numbers.to(device, non_blocking=True), *(part.to(device) for part in measured)]
        )
        table = torch.zeros(self.size * row.numel(), dtype=torch.float64, device=device)
        table[self.rank * row.numel() : (self.rank + 1) * row.numel()] = row
        # A gather, written as an all-reduce in which each rank adds to its own row only, because an
        # all-reduce has the same name in all versions of torch.
        return PendingRows(
            self.size, [], [table], dist.all_reduce(table, group=self.group, async_op=True)
        )

    def gather_objects(self, value: T) -> list[T]:
        """Return one small object of each rank, in rank order.

        Objects are pickled, so use this for setup only, between ranks of this job.
        """
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def broadcast_object(self, value: object, src_rank: int) -> object:
        """Return one rank's object on all ranks.

        Args:
            value: the object to send; ignored on other ranks than `src_rank`.
            src_rank: the rank in this world's group that sends it.
        """
        if self.group is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, group=self.group, group_src=src_rank)
        return box[0]


class PendingRows:
    """Holds a table with one row per rank whose collective may still be running."""

    def __init__(
        self, size: int, known: list[float], parts: list[Tensor], work: dist.Work | None
    ) -> None:
        """Store the parts of the table and the collective that fills it.

        Args:
            size: the number of rows.
            known: the first numbers of the table, on the host.
            parts: the remaining numbers as tensors [n].
            work: the collective; None where nothing is sent.
        """
        self._size = size
        self._known = known
        self._parts = parts
        self._work = work

    def read(self, *others: Tensor) -> tuple[list[list[float]], list[float]]:
        """Wait for the table and return its rows: the only host synchronization of a window.

        Args:
            others: scalars [] to copy to the host along with the table.

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
