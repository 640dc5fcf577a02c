"""The ledger: what a window sends over the network, forecast and counted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from distaccum.errors import LedgerError


class Audit(Enum):
    """Which windows the ledger counts. A window that is not counted costs nothing."""

    first = "first"
    always = "always"
    never = "never"


KINDS = ("all_reduce", "reduce_scatter", "all_gather")  # what carries gradients and parameters; the rest is set-up

# c10d's operators differ by torch version and by whether tensors come in lists; their names begin alike.
_KIND_OF = {
    "allreduce": "all_reduce",
    "_allreduce": "all_reduce",
    "allgather": "all_gather",
    "_allgather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "_reduce_scatter": "reduce_scatter",
    "all_reduce": "all_reduce",
    "all_gather": "all_gather",
    "broadcast": "broadcast",
}


@dataclass(frozen=True)
class Traffic:
    """Collectives and bytes by kind, as one rank sees them.

    Bytes are those of the whole message: the tensor of an all-reduce or broadcast, the output of an all-gather, the
    input of a reduce-scatter. What a network card sends depends on the algorithm and is not meant.
    """

    counts: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    bytes: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))

    @staticmethod
    def of(entries: Iterable[tuple[str, int]]) -> Traffic:
        """Sum up (kind, bytes) pairs, one a collective."""
        counts: dict[str, int] = {}
        sizes: dict[str, int] = {}
        for kind, size in entries:
            counts[kind] = counts.get(kind, 0) + 1
            sizes[kind] = sizes.get(kind, 0) + size
        return Traffic(MappingProxyType(counts), MappingProxyType(sizes))

    def __add__(self, other: Traffic) -> Traffic:
        kinds = {**self.counts, **other.counts}
        return Traffic(
            {kind: self.counts.get(kind, 0) + other.counts.get(kind, 0) for kind in kinds},
            {kind: self.bytes.get(kind, 0) + other.bytes.get(kind, 0) for kind in kinds},
        )

    @property
    def collectives(self) -> int:
        """How many collectives carry gradients, parameters or control numbers."""
        return sum(self.counts.get(kind, 0) for kind in KINDS)

    @property
    def total_bytes(self) -> int:
        """Their bytes."""
        return sum(self.bytes.get(kind, 0) for kind in KINDS)

    def __str__(self) -> str:
        parts = [f"{self.counts[k]} {k} ({self.bytes[k]:,} bytes)" for k in KINDS if self.counts.get(k)]
        return ", ".join(parts) or "nothing"


@dataclass(frozen=True)
class Verdict:
    """Forecast against counted for one window."""

    forecast: Traffic
    counted: Traffic

    @property
    def agrees(self) -> bool:
        """Whether every kind has the count and the bytes that were forecast."""
        return all(
            self.forecast.counts.get(kind, 0) == self.counted.counts.get(kind, 0)
            and self.forecast.bytes.get(kind, 0) == self.counted.bytes.get(kind, 0)
            for kind in KINDS
        )

    def require(self, step: int) -> None:
        """Raise LedgerError unless they agree."""
        if not self.agrees:
            raise LedgerError(
                f"The window of step {step} sent {self.counted}; its forecast is {self.forecast}. Either a module "
                "communicates on its own (synchronised BatchNorm, tensor parallelism) or gradients travel when they "
                "should not. Use audit='never' (accum.audit=never) if you know why."
            )


class Ledger(TorchDispatchMode):
    """Counts every collective that this process issues while it is entered, whoever issues it.

    It sees c10d's operators at the dispatcher, below DDP's reducer, FSDP2 and torch.distributed's functions alike.
    """

    def __init__(self) -> None:
        super().__init__()
        self._entries: list[tuple[str, int]] = []

    @property
    def traffic(self) -> Traffic:
        """What was counted so far."""
        return Traffic.of(self._entries)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            name = func._schema.name.partition("::")[2]
            kind = next((k for prefix, k in _KIND_OF.items() if name.startswith(prefix)), None)
            if kind is not None:
                self._entries.append((kind, max(_nbytes(arg) for arg in args[:2])))
        return func(*args, **(kwargs or {}))


def _nbytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, list | tuple):
        return sum(_nbytes(item) for item in value)
    return 0
