"""The ledger: what a window sends over the network, forecast and counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from distaccum.errors import LedgerError


class Audit(Enum):
    """Which windows the ledger counts. A window that is not counted costs nothing."""

    first = "first"
    always = "always"
    never = "never"


# What carries gradients and parameters. The names of c10d's operators differ by version in underscores and endings.
_KINDS = {
    "allreduce": "all_reduce",
    "reducescatter": "reduce_scatter",
    "allgather": "all_gather",
    "alltoall": "all_to_all",
}


@dataclass(frozen=True)
class Traffic:
    """Collectives and bytes by kind, as one rank sees them. Broadcasts, which only set up, are not among them.

    Bytes are those of the whole message: the tensor of an all-reduce, the output of an all-gather, the input of a
    reduce-scatter. What a network card sends depends on the algorithm and is not meant.
    """

    counts: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)

    @staticmethod
    def of(entries: Iterable[tuple[str, int]]) -> Traffic:
        """Sum up (kind, bytes) pairs, one a collective."""
        traffic = Traffic()
        for kind, size in entries:
            traffic.counts[kind] += 1
            traffic.bytes[kind] += size
        return traffic

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.counts + other.counts, self.bytes + other.bytes)

    def __str__(self) -> str:
        return ", ".join(f"{n} {kind} ({self.bytes[kind]:,} bytes)" for kind, n in self.counts.items()) or "nothing"


@dataclass(frozen=True)
class Verdict:
    """Forecast against counted for one window."""

    forecast: Traffic
    counted: Traffic

    @property
    def agrees(self) -> bool:
        """Whether every kind has the count and the bytes that were forecast."""
        return self.forecast == self.counted

    def require(self, step: int) -> None:
        """Raise LedgerError unless they agree."""
        if self.agrees:
            return
        if sum(self.counted.bytes.values()) < sum(self.forecast.bytes.values()):
            causes = (
                "Less was sent than expected: perhaps the objective calls model.module, or a part of it, instead of "
                "the model it is given"
            )
        else:
            causes = (
                "Either a module communicates on its own (synchronised BatchNorm, tensor parallelism) or gradients "
                "travel when they should not"
            )
        raise LedgerError(
            f"The window of step {step} sent {self.counted}; its forecast is {self.forecast}. {causes}. Use "
            "audit='never' (accum.audit=never) if you know why."
        )


class Ledger(TorchDispatchMode):
    """Counts every collective that this process issues while it is entered, whoever issues it.

    It sees c10d's operators at the dispatcher, below DDP's reducer, FSDP2 and torch.distributed's functions alike.
    """

    supports_higher_order_operators = True  # checkpoints inside of compiled code are such operators

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._entries: list[tuple[str, int]] = []

    @property
    def traffic(self) -> Traffic:
        """What was counted so far."""
        return Traffic.of(self._entries)

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled code runs compiled under this mode too: what it counts is issued outside of it."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # DTensor turns its operators into plain ones and collectives; they come by here on their own then.
        if any(kind.__name__ == "DTensor" for kind in types):
            return NotImplemented
        if func.namespace in ("c10d", "_c10d_functional"):
            name = func._schema.name.partition("::")[2].replace("_", "")
            for beginning, kind in _KINDS.items():
                if name.startswith(beginning):
                    self._entries.append((kind, max(_nbytes(arg) for arg in args[:2])))
        return func(*args, **(kwargs or {}))


def _nbytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(_nbytes(item) for item in value) if isinstance(value, list | tuple) else 0
