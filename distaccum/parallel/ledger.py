"""Keeps the ledger: the forecast and the count of what a window sends over the network."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from distaccum.core.traffic import Traffic
from distaccum.errors import LedgerError


class Audit(Enum):
    """Selects the windows that the ledger counts; a window that is not counted costs nothing."""

    first = "first"
    always = "always"
    never = "never"


# The collectives that carry gradients and parameters. The names of c10d's operators differ between
# versions of torch in underscores and endings.
_KINDS = {
    "allreduce": "all_reduce",
    "reducescatter": "reduce_scatter",
    "allgather": "all_gather",
    "alltoall": "all_to_all",
}


@dataclass(frozen=True)
class Verdict:
    """Compares the forecast of one window's traffic with its count."""

    forecast: Traffic
    counted: Traffic

    @property
    def agrees(self) -> bool:
        """Return whether every kind of collective has the forecast number and bytes."""
        return self.forecast == self.counted

    def require(self, step: int) -> None:
        """Raise LedgerError unless the forecast and the count agree.

        Args:
            step: the number of the step, for the message.
        """
        if self.agrees:
            return
        if sum(self.counted.bytes.values()) < sum(self.forecast.bytes.values()):
            causes = (
                "Less was sent than expected: perhaps the objective calls model.module, or a part "
                "of it, instead of the model it is given"
            )
        else:
            causes = (
                "Either a module communicates on its own (synchronized BatchNorm, tensor "
                "parallelism), or gradients are sent when they should not be"
            )
        raise LedgerError(
            f"The window of step {step} sent {self.counted}, but its forecast is {self.forecast}. "
            f"{causes}. If the difference is intended, use audit='never' (accum.audit=never)."
        )


class Ledger(TorchDispatchMode):
    """Counts every collective that this process issues while the context is entered.

    It sees c10d's operators at the dispatcher, which is below DDP's reducer, FSDP2 and the
    functions of torch.distributed alike.
    """

    supports_higher_order_operators = True  # checkpoints in compiled code are such operators

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._entries: list[tuple[str, int]] = []

    @staticmethod
    def of_window(audit: Audit, verdict: Verdict | None) -> AbstractContextManager[Ledger | None]:
        """Return a ledger to enter for a window, or an empty context if it is not to be counted.

        Args:
            audit: which windows are counted.
            verdict: that of the latest counted window; None if none was counted yet.
        """
        pauses = audit is Audit.never or (audit is Audit.first and verdict is not None)
        return nullcontext() if pauses else Ledger()

    @property
    def traffic(self) -> Traffic:
        """Return the traffic that was counted so far."""
        return Traffic.of(self._entries)

    def judge(self, forecast: Traffic, step: int) -> Verdict:
        """Compare what was counted with its forecast.

        Args:
            forecast: the forecast of the window.
            step: the number of the step, for the message.

        Raises:
            LedgerError: if they differ.
        """
        verdict = Verdict(forecast, self.traffic)
        verdict.require(step)
        return verdict

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Return True, so that compiled code stays compiled under this mode.

        The collectives to be counted are issued outside of compiled code.
        """
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # DTensor turns its operators into plain ones and collectives, which arrive here separately.
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
