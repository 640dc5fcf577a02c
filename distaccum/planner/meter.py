"""Counts the memory that a rank's tensors take on its device, and raises an error above a limit."""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distaccum._torch import storage_resizes
from distaccum.errors import ConfigError, require

_UNITS = {"": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_UNITS |= {"kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def parse_bytes(text: str | int, name: str) -> int:
    """Return the number of bytes in a text such as 2GiB, 512 MiB, 1.5GB or 1000000.

    Args:
        text: a number, with or without a unit.
        name: the configuration key that the text belongs to, for the error.

    Raises:
        ConfigError: if the text is not an amount of at least 1 byte.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKMGT]?i?B?)\s*", str(text))
    size = float(found[1]) * _UNITS.get(found[2], 0) if found else 0
    if size < 1:
        raise ConfigError(
            f"{name} is {text!r}, which is not an amount of memory. Use one such as 2GiB, 512MiB "
            "or 80GB."
        )
    return int(size)


@dataclass
class LimitsConfig:
    """Limits how much memory a rank may use on its device."""

    memory: Any  # such as 2GiB, a number of bytes, or null
    margin: float  # share of the memory that automatic choices leave free

    @property
    def memory_bytes(self) -> int | None:
        """Return the limit in bytes, or None for the memory of the device (no limit on the CPU).

        Raises:
            ConfigError: if `memory` is not a positive amount.
        """
        return None if self.memory is None else parse_bytes(self.memory, "limits.memory")

    def validate(self) -> None:
        """Refuse a margin that is no share, and a memory that is no amount."""
        require(
            0 <= self.margin < 1,
            f"limits.margin is {self.margin}; it is a share of the memory and must be at least 0 "
            "and below 1.",
        )
        _ = self.memory_bytes


class Tracker(TorchDispatchMode):
    """Counts the bytes of all live tensors, and their peak, while it is entered.

    It sees every tensor that an operator returns on this thread, including backwards on the CPU and
    fake tensors (`_torch.fake_tensors`). It does not see memory that a kernel allocates and frees
    internally, nor tensors inside compiled code. With a limit it acts as a device of that size: an
    operator that exceeds the limit raises `torch.OutOfMemoryError`.
    """

    supports_higher_order_operators = True

    def __init__(
        self, limit: int | None = None, kind: str = "cpu", *, fake_tensors: bool = False
    ) -> None:
        """Start with a count of 0 bytes.

        Args:
            limit: the most bytes that may be alive at once; None: no limit.
            kind: the type of the device whose tensors are counted.
            fake_tensors: True counts fake tensors only, False real tensors only. They are kept
                apart because DTensor makes fake tensors to compute shapes.
        """
        # This import takes half a second, which programs that track nothing should not wait for.
        from torch.distributed.tensor import DTensor

        super().__init__()  # type: ignore[no-untyped-call]
        self.limit = limit
        self.kind = kind
        self.fake_tensors = fake_tensors
        self.live = 0  # bytes that are alive now
        self.peak = 0  # the most bytes since the start, or since `reset_peak`
        self._sharded = DTensor
        self._sizes: dict[int, int] = {}
        self._watched: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._resizes: AbstractContextManager[None] = nullcontext()

    def __enter__(self) -> Self:
        self._resizes = storage_resizes(self._resized)
        self._resizes.__enter__()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, traceback)  # type: ignore[no-untyped-call]
        self._resizes.__exit__(kind, error, traceback)

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Return True, so that compiled code runs compiled under this mode too."""
        return True

    def reset_peak(self) -> None:
        """Set the peak to the bytes that are alive now."""
        self.peak = self.live

    def count(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors that were made before the tracker was entered."""
        for tensor in tensors:
            self._add(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, self._sharded) for kind in types):
            return NotImplemented  # DTensor then calls the operator on its local tensors
        results = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(results):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        return results

    def _add(self, tensor: Tensor) -> None:
        tensor = tensor.to_local() if isinstance(tensor, self._sharded) else tensor
        if tensor.device.type != self.kind:
            return
        storage = tensor.untyped_storage()
        key = id(storage)
        if key not in self._sizes and (storage.device.type == "meta") is self.fake_tensors:
            self._watched[key] = weakref.ref(storage, lambda _: self._gone(key))
            self._sizes[key] = 0
            self._now(key, storage.nbytes())

    def _resized(self, storage: torch.UntypedStorage) -> None:
        """Count the new size of a storage.

        FSDP2 frees and allocates memory by resizing storages, without an operator.
        """
        if id(storage) in self._sizes:
            self._now(id(storage), storage.nbytes())

    def _gone(self, key: int) -> None:
        self.live -= self._sizes.pop(key)
        del self._watched[key]

    def _now(self, key: int, size: int) -> None:
        more = size - self._sizes[key]
        if self.limit is not None and more > 0 and self.live + more > self.limit:
            # The bytes are not counted, since the caller does not get the tensor.
            raise torch.OutOfMemoryError(
                f"{more:,} bytes were requested, but {self.live:,} of {self.limit:,} bytes are in "
                "use (limits.memory)."
            )
        self.live += more
        self._sizes[key] = size
        self.peak = max(self.peak, self.live)


class Meter:
    """Measures the peak memory of this rank's tensors on its device, and enforces a limit.

    On the CPU it uses a `Tracker`, which costs some microseconds per operator. On a GPU it reads
    the counters of torch's allocator, which cost nothing extra. It may be entered many times; on
    the CPU, tensors that are made in between are not counted.
    """

    def __init__(self, device: torch.device, limit: int | None = None) -> None:
        """Prepare the meter; counting starts when it is entered.

        Args:
            device: the device of this rank.
            limit: bytes that tensors may take; None: all that the device has.
        """
        self.device = device
        self.limit = limit
        self._tracker = Tracker(limit, device.type) if device.type == "cpu" else None
        self._begun = False

    @property
    def costs_nothing(self) -> bool:
        """Return whether counting is free, because the device counts anyway (a GPU)."""
        return self._tracker is None

    def __enter__(self) -> Self:
        if self._tracker is not None:
            self._tracker.__enter__()
            return self
        if self.limit is not None:
            total = torch.cuda.mem_get_info(self.device)[1]
            torch.cuda.set_per_process_memory_fraction(min(1.0, self.limit / total), self.device)
        if not self._begun:
            self.reset_peak()
            self._begun = True
        return self

    def __exit__(self, *error: Any) -> None:
        if self._tracker is not None:
            self._tracker.__exit__(*error)
        elif self.limit is not None:
            torch.cuda.set_per_process_memory_fraction(1.0, self.device)

    def reset_peak(self) -> None:
        """Set the peak to the bytes that are alive now."""
        if self._tracker is not None:
            self._tracker.reset_peak()
        else:
            torch.cuda.reset_peak_memory_stats(self.device)

    @property
    def peak_bytes(self) -> int:
        """Return the peak bytes in use since the meter was first entered or its peak was reset."""
        return (
            self._tracker.peak
            if self._tracker is not None
            else torch.cuda.max_memory_allocated(self.device)
        )
