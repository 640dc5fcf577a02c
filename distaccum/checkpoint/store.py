"""The checkpoints of one run: all ranks save, load and choose together, and what one cannot do, none has done."""

from __future__ import annotations

import time
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any, NoReturn

import torch
from torch import Tensor

from distaccum.errors import CheckpointError, ConfigError
from distaccum.metrics.format import duration, size
from distaccum.parallel.world import World

from . import folder as files
from .manifest import MANIFEST, Manifest, StoredFile, check_plain
from .reading import Checkpoint, TensorInfo, lines, newest_good
from .storage import Piece, contents, local, pieces_of, shard_name, share_out, write_file
from .together import dealt, own_group, together

__all__ = ["Checkpoint", "Checkpoints", "Saved", "TensorInfo"]


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is in place."""

    path: Path
    step: int
    blocked_s: float  # for which the training stood still
    total_s: float  # until it was in place
    bytes: int  # of all ranks' files
    remarks: tuple[str, ...]  # what went wrong afterwards: an old checkpoint that could not be removed

    def told(self) -> str:
        """One line."""
        line = f"saved {self.path}: {size(self.bytes)} in {duration(self.total_s)}, of which the training stood still "
        return "; ".join([line + duration(self.blocked_s), *self.remarks])


@dataclass(frozen=True)
class _Save:
    """One save, as this rank knows it."""

    name: str
    step: int
    serial: int
    facts: Mapping[str, Any]
    best: bool
    share: list[Piece]  # what this rank writes
    held: list[list[Piece]]  # by rank, known to rank 0 only: what each holds
    shares: list[list[Piece]]  # by rank, known to rank 0 only: what each writes
    started: float


class Checkpoints:
    """The checkpoints of one run: RUN/checkpoints/step-00000100/, with the pointers `latest` and `best`.

    One object per rank; every method is called on all ranks. The ranks talk over a gloo group of their own, so that a
    save in the background meets no collective of the training.
    """

    def __init__(self, folder: Path, world: World, *, keep: int, asynchronous: bool = False) -> None:
        """Sends nothing but what makes the group.

        Args:
            folder: RUN/checkpoints, on a file system that all ranks see. Need not be there.
            world: the ranks that save.
            keep: how many of the newest stay, besides the best one.
            asynchronous: let `save` return once the tensors are copied to the host.
        """
        if keep < 1:
            raise ConfigError(f"checkpoints must keep at least 1, got keep={keep}; use keep=1 or more.")
        self._folder = folder
        self._world = own_group(world)
        self._keep = keep
        self._asynchronous = asynchronous
        self._done: list[Saved] = []
        self._error: BaseException | None = None
        self._thread: Thread | None = None
        self._known: dict[Path, Manifest] = {}  # on rank 0
        self._damaged: set[Path] = set()
        self.passed_over: list[str] = []

    def save(self, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], *, best: bool = False) -> None:
        """Save the run. Asynchronous: first waits for the save before, and returns when the tensors may change again.

        Args:
            step: how many steps were made.
            tensors: plain ones are taken to be equal wherever they have the same name and are written by one rank;
                of DTensors each rank writes parts that it holds.
            facts: plain JSON; rank 0's is saved.
            best: let the pointer `best` name this one, too.

        Raises:
            CheckpointError: on all ranks, for this save or (asynchronous) for the one before: which rank, why, and
                which checkpoint is the last good one. Nothing is left of the failed one, and saving may go on.
        """
        started = time.monotonic()
        self._join()
        name, serial = "", 0  # known to rank 0 as soon as there is a folder
        held: list[list[Piece]] = []
        shares: list[list[Piece]] = []

        def announce() -> list[Piece]:
            nonlocal name, serial
            pieces = pieces_of(tensors)
            if self._world.rank == 0:
                check_plain(dict(facts), "facts")
                serial = 1 + max((e.manifest.serial for e in self._entries() if e.manifest), default=0)
                name = files.begin(self._folder, step)
            return pieces

        def deal(pieces: list[list[Piece]]) -> list[tuple[str, list[Piece]]]:
            nonlocal held, shares
            held, shares = pieces, share_out(pieces)
            return [(name, share) for share in shares]

        try:
            name, share = dealt(self._world, announce, deal)
        except CheckpointError as error:
            self._give_up(step, name, error)
        own = {piece.name: tensors[piece.name] for piece in share}
        save = _Save(name, step, serial, deepcopy(dict(facts)), best, share, held, shares, started)
        if not self._asynchronous:
            self._finish(save, {key: local(tensor) for key, tensor in own.items()}, None)
            return
        staged: dict[str, Tensor] | Exception
        try:
            staged = _on_host(own)
        except Exception as error:  # told to the other ranks by the thread, which they meet in any case
            staged = error
        self._thread = Thread(
            target=self._finish_aside, args=(save, staged, time.monotonic() - started), name="checkpoint", daemon=True
        )
        self._thread.start()

    def wait(self) -> None:
        """Wait for the save that is on its way, if any. Without it, such a save ends with the process.

        Raises:
            CheckpointError: on all ranks, as `save`.
        """
        self._join()

    def saved(self) -> list[Saved]:
        """What was put in place since the last call. Does not wait: ranks may be told at different calls."""
        done, self._done = self._done, []
        return done

    def newest(self) -> Checkpoint | None:
        """The newest good checkpoint, the same on every rank; None where there is none.

        It is the one that `latest` names, or else the newest one, whose manifest reads well and whose files have the
        right sizes and checksums. The ranks share the reading. What was passed over for it is in `passed_over`, one
        line each, and stays where it is.
        """
        self._join()
        found, troubles = newest_good(self._folder, self._world)
        self.passed_over, self._damaged = lines(troubles), set(troubles)
        return found

    def clean(self) -> list[str]:
        """At the start of a run, before any save: remove what a killed one left half-written. One line each."""
        self._join()
        return together(self._world, lambda: files.clean(self._folder) if self._world.rank == 0 else [])[0]

    def _join(self) -> None:
        """Wait for the thread, and raise what it met: at the same call on every rank."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _finish_aside(self, save: _Save, staged: Mapping[str, Tensor] | Exception, blocked_s: float) -> None:
        try:
            self._finish(save, staged, blocked_s)
        except BaseException as error:  # raised by the next call, on the thread of the training
            self._error = error

    def _finish(self, save: _Save, own: Mapping[str, Tensor] | Exception, blocked_s: float | None) -> None:
        """Write this rank's file, and let rank 0 put the checkpoint in place."""
        rank = self._world.rank
        share = save.share

        def write() -> StoredFile | None:
            if isinstance(own, Exception):
                raise own
            if not share:
                return None
            path = files.part(self._folder, save.name) / shard_name(rank)
            return write_file(path, [(piece.name, piece.dtype, piece.sizes) for piece in share], own.__getitem__)

        try:
            written = together(self._world, write)
            stored = {shard_name(i): file for i, file in enumerate(written) if file is not None}
            remarks = together(self._world, lambda: self._publish(save, stored) if rank == 0 else ())[0]
        except CheckpointError as error:
            self._give_up(save.step, save.name, error)
        total_s = time.monotonic() - save.started
        num_bytes = sum(file.bytes for file in stored.values())
        blocked_s = total_s if blocked_s is None else blocked_s
        self._done.append(Saved(self._folder / save.name, save.step, blocked_s, total_s, num_bytes, remarks))

    def _publish(self, save: _Save, stored: Mapping[str, StoredFile]) -> tuple[str, ...]:
        """Rank 0: all files are written. The checkpoint is put in place, and old ones go."""
        manifest = Manifest(save.step, save.serial, save.facts, stored, contents(save.held, save.shares))
        part = files.part(self._folder, save.name)
        files.write_durably(part / MANIFEST, manifest.to_json().encode())
        files.publish(self._folder, save.name, [files.LATEST, files.BEST] if save.best else [files.LATEST])
        self._known[self._folder / save.name] = manifest
        return tuple(self._retire())

    def _retire(self) -> list[str]:
        """Remove what is beyond `keep`; what hinders it, in words, for the new checkpoint is in place all the same."""
        remarks = []
        for path in files.superfluous(self._entries(), self._keep, self._folder, self._damaged):
            try:
                files.remove(path)
            except OSError as error:
                remarks.append(f"the old checkpoint {path} could not be removed: {error}")
        return remarks

    def _entries(self) -> list[files.Entry]:
        """What is in place. A manifest that was read or written by this process is not read again to count it."""
        found = files.entries(self._folder, self._known)
        self._known = {entry.path: entry.manifest for entry in found if entry.manifest is not None}
        return found

    def _give_up(self, step: int, name: str, error: CheckpointError) -> NoReturn:
        """All ranks are here, so nobody writes any more: rank 0 removes what there is, and all raise."""

        def last_good() -> str:
            if self._world.rank != 0:
                return ""
            if name:
                files.give_up(self._folder, name)
            return next((e.path.name for e in files.entries(self._folder) if e.manifest), "")

        try:
            last = together(self._world, last_good)[0]
            left = f"The last good one is {last}, as it was." if last else "There is no earlier one."
        except CheckpointError as trouble:
            left = f"Nor could its folder be removed: {trouble}."
        raise CheckpointError(
            f"The checkpoint of step {step} was not saved in {self._folder}: {error}. {left}"
        ) from None


def _on_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies in host memory that nobody else changes."""
    copies = {}
    devices = set()
    for name, tensor in tensors.items():
        part = local(tensor)
        if part.device.type == "cpu":
            copies[name] = part.clone(memory_format=torch.contiguous_format)
        else:
            copies[name] = part.to("cpu", non_blocking=True)  # into pinned memory
            devices.add(part.device)
    for device in devices:
        torch.get_device_module(device).current_stream(device).synchronize()
    return copies
