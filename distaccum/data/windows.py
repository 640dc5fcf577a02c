"""Groups the micro-batches of any loader into windows."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from itertools import islice
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from distaccum.core.window import MicroBatches, Source
from distaccum.data.split import check_steps, split
from distaccum.errors import ConfigError, choice


class Last(Enum):
    """Names what happens to the last micro-batches of an epoch if they do not fill a window."""

    keep = "keep"  # they make a shorter window
    drop = "drop"  # all ranks leave them out together: every rank has a full window, or none has
    carry = "carry"  # they begin the first window of the next epoch


@dataclass
class _Epoch:
    """Tracks one pass over the loader: what was read, and what of it is in no window yet."""

    read: int = 0  # micro-batches that the loader has yielded
    held: deque[Any] = field(default_factory=deque)  # those of them that are in no window yet
    over: bool = False  # whether the loader has no more
    begun: bool = False  # whether a loop has begun, even if it was left by `break`
    current: MicroBatches | None = None  # the window that was yielded last

    def fill(self, count: int, stream: Iterator[Any]) -> None:
        """Read until `count` micro-batches are held, or the loader has no more."""
        while len(self.held) < count and not self.over:
            try:
                self.held.append(next(stream))
                self.read += 1
            except StopIteration:
                self.over = True

    def hand_out(self, window: MicroBatches) -> None:
        """Remove the micro-batches of this window from those that are held."""
        for _ in range(len(window)):
            self.held.popleft()
        self.current = window


class Windows:
    """Groups a loader's micro-batches into windows; the last one of an epoch may be shorter.

    The micro-batches of a window are read when the window begins, not earlier. Therefore `break`
    loses none of them, a loader that knows its position reports the position of the boundary, and
    side effects of a generator happen at the right time. The exception is loaders for which reading
    early has no visible effect: a list or a tuple, and a `torch.utils.data.DataLoader` with workers
    and torch's own samplers. From these one window is read ahead, so that ranks can agree on it
    within the step before. With any other loader, several ranks agree on a window by one more small
    collective when it begins. A list is copied when the loop begins.

    Ranks may hold different numbers of micro-batches. They end the epoch together, provided that
    every rank passes each window to `Accumulator.step` and iterates in the thread that calls it.
    After `break`, a new loop starts a new epoch of the loader; if the loader is an iterator, the
    loop continues with its next micro-batch.
    """

    split = staticmethod(split)

    def __init__(
        self,
        loader: Iterable[Any],
        gradient_accumulation_steps: int,
        *,
        last: Last | str = Last.keep,
    ) -> None:
        """Store the loader without reading from it.

        Args:
            loader: any iterable of micro-batches, with or without a length. The loader decides the
                micro-batch size.
            gradient_accumulation_steps: micro-batches per rank in a full window. The attribute of
                this name may be changed.
            last: what happens to the last micro-batches of an epoch if they do not fill a window:
                `keep` makes a shorter window of them, `drop` leaves them out on all ranks together,
                `carry` begins the next epoch with them.

        Raises:
            ConfigError: if `gradient_accumulation_steps` is not a positive integer, `last` is
                unknown, or the loader is not an iterable of micro-batches.
        """
        _check(loader)
        self._loader = loader
        self.gradient_accumulation_steps = gradient_accumulation_steps
        self._last = choice(Last, last, "last")
        self._source = Source(whole=self._last is Last.drop)
        self._is_iterator = isinstance(loader, Iterator)
        self._reads_ahead = self._last is not Last.carry and _is_unnoticed(loader)
        self._has_state = hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")
        self._epoch = _Epoch()
        self._skip = 0  # micro-batches that were used before the loaded state was saved

    @property
    def gradient_accumulation_steps(self) -> int:
        """Return the number of micro-batches per rank in a full window.

        It may be set at any time, on all ranks. The new value is used from the next window on.
        """
        return self._gradient_accumulation_steps

    @gradient_accumulation_steps.setter
    def gradient_accumulation_steps(self, value: int) -> None:
        check_steps(value, "the number of micro-batches per rank in a window")
        self._gradient_accumulation_steps = value

    def __iter__(self) -> Iterator[MicroBatches]:
        """Iterate over one epoch.

        A rank whose loader is exhausted gets empty windows until all ranks' loaders are exhausted.
        """
        if self._epoch.begun:
            self._epoch = self._following(self._epoch)
        epoch, stream = self._epoch, self._open(self._epoch)
        window = self._cut(epoch, stream)
        # Before the first step it is unknown what other ranks have, so an empty window is yielded.
        more = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        while self._exists(window, more):
            epoch.hand_out(window)
            upcoming = window.upcoming = self._cut(epoch, stream) if self._reads_ahead else None
            cut_for, more = self._gradient_accumulation_steps, False
            yield window
            window = (
                upcoming
                if upcoming is not None and self._gradient_accumulation_steps == cut_for
                else self._cut(epoch, stream)
            )
        if self._last is Last.drop:
            epoch.held.clear()
        if self._epoch is epoch:
            self._epoch = self._following(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Return the position of this rank at a boundary; save one on each rank.

        Call it after `Accumulator.step`. The position counts what was stepped, no matter how much
        was read. If a window was yielded but not stepped, it is yielded again after this state is
        loaded. As long as nothing has been passed to an accumulator, a window counts as used once
        it is yielded.

        Returns:
            `read`: number of micro-batches to skip; `loader`: instead of that, the state of a
            loader that has `state_dict`; `over`: whether the epoch has no more micro-batches;
            `held`: micro-batches that were read and not stepped.
        """
        epoch = self._epoch
        window = epoch.current
        used = window is None or window.stepped or self._source.announcer is None
        held = [*(() if used or window is None else window), *epoch.held]
        if self._reads_ahead:
            return {"read": epoch.read - len(held), "held": [], "over": False, "loader": None}
        loader = self._loader.state_dict() if self._has_state else None  # type: ignore[attr-defined]
        return {"read": epoch.read, "held": held, "over": epoch.over, "loader": loader}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved position: the next loop runs over the rest of that epoch.

        Call it before the loop. A loader with `load_state_dict` gets its own state back. Any other
        loader is read from its beginning, in the order that it had before, and the micro-batches
        that were used are skipped; an iterator must be a new one.

        Args:
            state: what `state_dict` returned.

        Raises:
            ConfigError: if only one of the saved loader and this loader has a state of its own. The
                loop raises it if the loader ends before the saved position.
        """
        if (state["loader"] is not None) != self._has_state:
            had, has = ("no", "supports") if state["loader"] is None else ("a", "does not support")
            raise ConfigError(
                f"The saved state has {had} loader state, but this loader "
                f"({type(self._loader).__name__}) {has} state_dict() and load_state_dict(). Use "
                "the same class of loader as when it was saved."
            )
        self._epoch = _Epoch(int(state["read"]), deque(state["held"]), bool(state["over"]))
        # held micro-batches cannot be read again
        self._reads_ahead = self._reads_ahead and not self._epoch.held
        self._skip = 0 if self._has_state else self._epoch.read
        if self._has_state:
            self._loader.load_state_dict(state["loader"])  # type: ignore[attr-defined]

    def _following(self, epoch: _Epoch) -> _Epoch:
        """Create the next epoch.

        Micro-batches that were read and not used are dropped only if they will be read again.
        """
        if not self._is_iterator and self._last is not Last.carry:
            return _Epoch()
        held, epoch.held = epoch.held, deque()
        return _Epoch(epoch.read if self._is_iterator else 0, held)

    def _open(self, epoch: _Epoch) -> Iterator[Any]:
        """Return an iterator over the loader's micro-batches, from the epoch's position on."""
        epoch.begun = True
        skip, self._skip = self._skip, 0
        if epoch.over and not self._is_iterator:
            return iter(())
        epoch.over = False
        # A list is read ahead, so changes that the loop makes to it apply from the next epoch on.
        stream = iter(tuple(self._loader) if type(self._loader) is list else self._loader)
        skipped = sum(1 for _ in islice(stream, skip))
        if skipped < skip:
            raise ConfigError(
                f"The loader has {skipped} micro-batches, but {skip} had been used when the state "
                "was saved. Build it over the same data, with the same micro-batch size and the "
                "same number of ranks."
            )
        return stream

    def _cut(self, epoch: _Epoch, stream: Iterator[Any]) -> MicroBatches:
        """Create the window after those that were yielded; its micro-batches are still held."""
        epoch.fill(self._gradient_accumulation_steps, stream)
        micro_batches = list(islice(epoch.held, self._gradient_accumulation_steps))
        if len(micro_batches) < self._gradient_accumulation_steps and self._last is not Last.keep:
            micro_batches = []
        window = MicroBatches(micro_batches, len(micro_batches))
        window.source = self._source
        return window

    def _exists(self, window: MicroBatches, by_default: bool) -> bool:
        """Return whether any rank has micro-batches for this window, as far as that is known."""
        if window.rounds is None and self._source.announcer is not None:
            self._source.announcer.totals_of(window)
        return bool(window) or by_default if window.rounds is None else window.rounds > 0


windows = Windows  # for loops: `for window in da.windows(loader, gradient_accumulation_steps=8)`


def _check(loader: object) -> None:
    if isinstance(loader, Mapping | Tensor | str | bytes):
        raise ConfigError(
            f"windows() got a {type(loader).__name__} as its loader. It takes an iterable of "
            "micro-batches: a DataLoader, a list, a generator. To cut one loaded batch, write "
            "accumulator.step(da.windows.split(batch, gradient_accumulation_steps))."
        )
    if not hasattr(loader, "__iter__") and not hasattr(loader, "__getitem__"):
        raise ConfigError(
            f"windows() got a {type(loader).__name__} as its loader, which cannot be iterated "
            "over. It takes an iterable of micro-batches: a DataLoader, a list, a generator (call "
            "the function that makes it)."
        )


def _is_unnoticed(loader: object) -> bool:
    """Return whether reading micro-batches early has no visible effect.

    User-defined classes may do anything when they are read.
    """
    if type(loader) in (list, tuple):
        return True
    if type(loader) is not DataLoader or loader.num_workers == 0 or loader.generator is not None:
        return False
    if isinstance(loader.dataset, IterableDataset):
        return True  # read in the workers, like everything but samplers
    order = loader.sampler
    has_generator = getattr(order, "generator", None) is not None
    torchs_own = type(order) in (SequentialSampler, RandomSampler, DistributedSampler)
    return (
        torchs_own
        and not has_generator
        and type(loader.batch_sampler) in (BatchSampler, type(None))
    )
