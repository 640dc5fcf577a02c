"""Windows over anybody's loader of micro-batches."""

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
from distaccum.data.split import split
from distaccum.errors import ConfigError, choice


class Last(Enum):
    """What becomes of the last micro-batches of an epoch where they are fewer than a window holds."""

    keep = "keep"  # they make a shorter window
    drop = "drop"  # they are left out, on all ranks together: every rank has a full window, or none has one
    carry = "carry"  # they begin the first window of the next epoch


@dataclass
class _Epoch:
    """One pass over the loader: how far it was read, and what of it was not handed out."""

    read: int = 0  # micro-batches that the loader has given
    held: deque[Any] = field(default_factory=deque)  # those of them that are in no window yet
    over: bool = False  # whether the loader has no more
    begun: bool = False  # whether a loop runs over it, or was broken out of
    current: MicroBatches | None = None  # the window that was handed out last

    def fill(self, count: int, stream: Iterator[Any]) -> None:
        """Read until `count` micro-batches are held, or the loader has no more."""
        while len(self.held) < count and not self.over:
            try:
                self.held.append(next(stream))
                self.read += 1
            except StopIteration:
                self.over = True

    def hand_out(self, window: MicroBatches) -> None:
        """Take the first micro-batches, which are this window's, from those that are held."""
        for _ in range(len(window)):
            self.held.popleft()
        self.current = window


class Windows:
    """Groups a loader's micro-batches into windows; the last one of an epoch may be shorter.

    A window's micro-batches are read when the window begins, and not before: `break` loses none of them, a loader that
    knows its position tells that of the boundary, and whatever a generator does happens in its turn. Only where nobody
    can notice is one window read ahead, so that ranks agree on it within the step before: from a list or a tuple, and
    from a `torch.utils.data.DataLoader` with workers and torch's own samplers. Everywhere else several ranks agree on a
    window by one more small collective when it begins. A list is taken as it is when the loop begins.

    Ranks may hold different numbers of micro-batches: they end the epoch together, provided that every rank passes each
    window to `Accumulator.step` and iterates in the thread that steps. After `break`, a new loop starts a new epoch of
    the loader; an iterator goes on with its next micro-batch.
    """

    split = staticmethod(split)

    def __init__(self, loader: Iterable[Any], num_micros: int, *, last: Last | str = Last.keep) -> None:
        """Keep the loader; nothing is read yet.

        Args:
            loader: any iterable of micro-batches, with or without a length; the micro size is the loader's.
            num_micros: K, the micros per rank in a full window; the attribute of this name may be changed.
            last: what becomes of the last micro-batches of an epoch where they are fewer than K: `keep` makes a shorter
                window of them, `drop` leaves them out on all ranks together, `carry` begins the next epoch with them.

        Raises:
            ConfigError: for a `num_micros` that is not a positive integer, an unknown `last`, or a loader that is not
                an iterable of micro-batches.
        """
        _check(loader)
        self._loader = loader
        self.num_micros = num_micros
        self._last = choice(Last, last, "last")
        self._source = Source(whole=self._last is Last.drop)
        self._is_iterator = isinstance(loader, Iterator)
        self._reads_ahead = self._last is not Last.carry and _is_unnoticed(loader)
        self._has_state = hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")
        self._epoch = _Epoch()
        self._skip = 0  # micro-batches that were used before the state was saved that this began with

    @property
    def num_micros(self) -> int:
        """Micros per rank in a full window. Set it at any time, on all ranks: it holds from the next window on."""
        return self._num_micros

    @num_micros.setter
    def num_micros(self, value: int) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"num_micros is {value!r}; a window has a whole number of micro-batches, at least 1.")
        self._num_micros = value

    def __iter__(self) -> Iterator[MicroBatches]:
        """Iterate over one epoch. A rank whose loader is exhausted gets empty windows until all ranks' are."""
        if self._epoch.begun:
            self._epoch = self._following(self._epoch)
        epoch, stream = self._epoch, self._open(self._epoch)
        window = self._cut(epoch, stream)
        # What other ranks have is not known before the first step, so an empty window is handed over for that step.
        more = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        while self._exists(window, more):
            epoch.hand_out(window)
            upcoming = window.upcoming = self._cut(epoch, stream) if self._reads_ahead else None
            cut_for, more = self._num_micros, False
            yield window
            window = upcoming if upcoming is not None and self._num_micros == cut_for else self._cut(epoch, stream)
        if self._last is Last.drop:
            epoch.held.clear()
        if self._epoch is epoch:
            self._epoch = self._following(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Return the position of this rank at a boundary: what was stepped, whatever was read. Save one on each rank.

        Call it after `Accumulator.step`. A window that was handed out and not stepped is handed out again by whoever
        loads this state (where nothing was passed to an accumulator so far, windows count as used once handed out).

        Returns:
            `read`: micro-batches to skip; `loader`: instead of that, the state of a loader that has `state_dict`;
            `over`: whether the epoch has no more; `held`: micro-batches that were read and not stepped.
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
        """Continue from there: the next loop runs over the rest of that epoch. Call it before the loop.

        A loader with `load_state_dict` gets its own state back. Any other one is read from its beginning, in the order
        that it had then, and what was used is skipped; an iterator must be a new one.

        Raises:
            ConfigError: where the loader of this state had a state of its own and this one has none, or the other way
                round; from the loop, for a loader that ends before that position.
        """
        if (state["loader"] is not None) != self._has_state:
            had, has = ("no", "supports") if state["loader"] is None else ("a", "does not support")
            raise ConfigError(
                f"The saved state has {had} loader state, but this loader ({type(self._loader).__name__}) {has} "
                "state_dict() and load_state_dict(). Use the same class of loader as when it was saved."
            )
        self._epoch = _Epoch(int(state["read"]), deque(state["held"]), bool(state["over"]))
        self._reads_ahead = self._reads_ahead and not self._epoch.held  # what is held cannot be read again
        self._skip = 0 if self._has_state else self._epoch.read
        if self._has_state:
            self._loader.load_state_dict(state["loader"])  # type: ignore[attr-defined]

    def _following(self, epoch: _Epoch) -> _Epoch:
        """Make the next epoch; what was read and not used is dropped only where it will be read again."""
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
        # A list is read ahead: whatever is done to it in the loop is seen in the next epoch, wherever it is done.
        stream = iter(tuple(self._loader) if type(self._loader) is list else self._loader)
        skipped = sum(1 for _ in islice(stream, skip))
        if skipped < skip:
            raise ConfigError(
                f"The loader has {skipped} micro-batches, and {skip} of them were used when the state was saved. Make "
                "it over the same data, in micro-batches of the same size, on as many ranks."
            )
        return stream

    def _cut(self, epoch: _Epoch, stream: Iterator[Any]) -> MicroBatches:
        """Make the window after those that were handed out; its micro-batches are still held."""
        epoch.fill(self._num_micros, stream)
        micros = list(islice(epoch.held, self._num_micros))
        if len(micros) < self._num_micros and self._last is not Last.keep:
            micros = []
        window = MicroBatches(micros, len(micros))
        window.source = self._source
        return window

    def _exists(self, window: MicroBatches, by_default: bool) -> bool:
        """Whether any rank has micro-batches for it, as far as that can be known."""
        if window.rounds is None and self._source.announcer is not None:
            self._source.announcer.on(window)
        return bool(window) or by_default if window.rounds is None else window.rounds > 0


windows = Windows  # as it reads in a loop: `for window in da.windows(loader, num_micros=8)`


def _check(loader: object) -> None:
    if isinstance(loader, Mapping | Tensor | str | bytes):
        raise ConfigError(
            f"windows() got a {type(loader).__name__} as its loader. It takes an iterable of micro-batches: a "
            "DataLoader, a list, a generator. To cut one loaded batch: accumulator.step(da.windows.split(batch, K))."
        )
    if not hasattr(loader, "__iter__") and not hasattr(loader, "__getitem__"):
        raise ConfigError(
            f"windows() got a {type(loader).__name__} as its loader, which cannot be iterated over. It takes an "
            "iterable of micro-batches: a DataLoader, a list, a generator (call the function that makes it)."
        )


def _is_unnoticed(loader: object) -> bool:
    """Whether nobody can tell that micro-batches are read early. Classes of one's own may do anything when read."""
    if type(loader) in (list, tuple):
        return True
    if type(loader) is not DataLoader or loader.num_workers == 0 or loader.generator is not None:
        return False
    if isinstance(loader.dataset, IterableDataset):
        return True  # read in workers, as anything but samplers
    order = loader.sampler
    torchs_own = type(order) in (SequentialSampler, RandomSampler, DistributedSampler)
    torchs_own = torchs_own and type(loader.batch_sampler) in (BatchSampler, type(None))
    return torchs_own and getattr(order, "generator", None) is None
