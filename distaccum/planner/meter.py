"""The memory that a rank's tensors take on its device: counted, limited, and run out of."""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distaccum._torch import storage_resizes
from distaccum.errors import ConfigError

_UNITS = {"": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "kB": 10**3, "MB": 10**6, "GB": 10**9}


def parse_bytes(text: str | int, name: str) -> int:
    """A number of bytes as people write it: 2GiB, 512 MiB, 1.5GB, 1000000.

    Raises:
        ConfigError: for what is no positive amount, with the key `name`.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKMGT]?i?B?)\s*", str(text))
    size = float(found[1]) * _UNITS.get(found[2].replace("K", "k") if found[2] == "KB" else found[2], 0) if found else 0
    if size < 1:
        raise ConfigError(f"{name} is {text!r}; give an amount of memory such as 2GiB, 512MiB or 80GB.")
    return int(size)


class Tracker(TorchDispatchMode):
    """Counts the bytes of tensors that are alive, and the most there were at once, while it is entered.

    It sees what operators return on this thread, backwards on the CPU included, whoever calls them; also what has no
    memory (`_torch.weightless`). What a kernel takes and gives back within itself is not seen, nor what is
    inside compiled code. With a limit it is a small device: an operator that passes it raises `torch.OutOfMemoryError`.
    """

    supports_higher_order_operators = True

    def __init__(self, limit: int | None = None, kind: str = "cpu", *, weightless: bool = False) -> None:
        """Count from nothing.

        Args:
            limit: bytes; None: any number.
            kind: the type of device whose tensors count.
            weightless: whether those without memory count, and those only. DTensor asks such tensors for shapes, which
                must not be taken for real ones.
        """
        from torch.distributed.tensor import DTensor  # half a second, which a program that tracks nothing need not wait

        super().__init__()  # type: ignore[no-untyped-call]
        self.limit = limit
        self.kind = kind
        self.weightless = weightless
        self.live = 0  # bytes now
        self.peak = 0  # the most since the beginning, or since `reset_peak`
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
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, traceback)  # type: ignore[no-untyped-call]
        self._resizes.__exit__(kind, error, traceback)

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled code runs compiled under this mode too."""
        return True

    def reset_peak(self) -> None:
        """Begin anew with what is alive now."""
        self.peak = self.live

    def count(self, tensors: Iterable[Tensor]) -> None:
        """Take in tensors that were made before."""
        for tensor in tensors:
            self._add(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, self._sharded) for kind in types):
            return NotImplemented  # it calls the operators of its local tensors, which come here
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
        if key not in self._sizes and (storage.device.type == "meta") is self.weightless:
            self._watched[key] = weakref.ref(storage, lambda _: self._gone(key))
            self._sizes[key] = 0
            self._now(key, storage.nbytes())

    def _resized(self, storage: torch.UntypedStorage) -> None:
        """FSDP2 frees and takes memory in this way, past all operators."""
        if id(storage) in self._sizes:
            self._now(id(storage), storage.nbytes())

    def _gone(self, key: int) -> None:
        self.live -= self._sizes.pop(key)
        del self._watched[key]

    def _now(self, key: int, size: int) -> None:
        more = size - self._sizes[key]
        if self.limit is not None and more > 0 and self.live + more > self.limit:
            raise torch.OutOfMemoryError(  # not counted: nobody gets it
                f"{more:,} bytes were asked for where {self.live:,} of {self.limit:,} are in use (limits.memory)."
            )
        self.live += more
        self._sizes[key] = size
        self.peak = max(self.peak, self.live)


class Meter:
    """The most memory that this rank's tensors take on its device, and the limit to it.

    On the CPU a `Tracker`, which costs some microseconds an operator. On a GPU torch's allocator, which counts anyway.
    It may be entered again and again: on the CPU what is made in between is not counted.
    """

    def __init__(self, device: torch.device, limit: int | None = None) -> None:
        """Nothing is counted until it is entered.

        Args:
            device: of this rank.
            limit: bytes that tensors may take; None: what the device has.
        """
        self.device = device
        self.limit = limit
        self._tracker = Tracker(limit, device.type) if device.type == "cpu" else None
        self._begun = False

    @property
    def costs_nothing(self) -> bool:
        """Whether the device counts anyway."""
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
        """Begin anew with what is alive now."""
        if self._tracker is not None:
            self._tracker.reset_peak()
        else:
            torch.cuda.reset_peak_memory_stats(self.device)

    @property
    def live_bytes(self) -> int:
        """In use now."""
        return self._tracker.live if self._tracker is not None else torch.cuda.memory_allocated(self.device)

    @property
    def peak_bytes(self) -> int:
        """The most that was in use at once since the meter was first entered or its peak was reset."""
        return self._tracker.peak if self._tracker is not None else torch.cuda.max_memory_allocated(self.device)
