"""Saves and finds the checkpoints of one run, on all ranks together.

Saves are all-or-nothing: if one rank fails, every rank raises and nothing is published.
"""

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
from .storage import LocalChunk, assign_writers, contents, local, local_chunks, shard_name, write_file
from .together import all_ranks_or_none, dealt, own_group

__all__ = ["Checkpoint", "Checkpoints", "Saved", "TensorInfo"]


@dataclass(frozen=True)
class Saved:
    """Describes a published checkpoint."""

    path: Path
    step: int
    blocked_s: float  # seconds for which the training waited
    total_s: float  # seconds until it was published
    bytes: int  # size of the files of all ranks
    remarks: tuple[str, ...]  # problems afterwards, such as an old checkpoint that could not be removed

    def message(self) -> str:
        """Return one line on the checkpoint and its cost."""
        line = (
            f"saved {self.path}: {size(self.bytes)} in {duration(self.total_s)}, during which the training waited for "
        )
        return "; ".join([line + duration(self.blocked_s), *self.remarks])


@dataclass(frozen=True)
class _Save:
    """Describes one save in progress, as far as this rank knows it."""

    name: str
    step: int
    serial: int
    facts: Mapping[str, Any]
    best: bool
    share: list[LocalChunk]  # what this rank writes
    held: list[list[LocalChunk]]  # what each rank holds, by rank; on rank 0 only
    shares: list[list[LocalChunk]]  # what each rank writes, by rank; on rank 0 only
    started: float


class Checkpoints:
    """Manages the checkpoints of one run.

    The files are RUN/checkpoints/step-00000100/ and the pointers `latest` and `best`. Make one
    object per rank, and call every method on all ranks. The ranks communicate over a gloo group of
    their own, so that a save in the background cannot mix with a collective of the training.
    """

    def __init__(self, folder: Path, world: World, *, keep: int, asynchronous: bool = False) -> None:
        """Make the process group for saves.

        Args:
            folder: RUN/checkpoints, on a file system that all ranks share. It need not exist.
            world: the ranks that save.
            keep: the number of newest checkpoints to keep, besides the best one.
            asynchronous: whether `save` returns as soon as the tensors are copied to the host.

        Raises:
            ConfigError: if `keep` is less than 1.
        """
        if keep < 1:
            raise ConfigError(f"At least one checkpoint must be kept, got keep={keep}. Use keep=1 or more.")
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
        """Save a checkpoint of the run.

        An asynchronous save first waits for the previous one, and returns as soon as the tensors
        may change again.

        Args:
            step: the number of steps made so far.
            tensors: the tensors by name. Plain tensors of one name are assumed to be equal on all
                ranks, and one rank writes them. Of a DTensor each rank writes parts that it holds.
            facts: plain JSON values; those of rank 0 are saved.
            best: whether the pointer `best` names this checkpoint too.

        Raises:
            CheckpointError: on all ranks, for this save or (if asynchronous) for the previous one.
                The text says which rank failed, why, and which checkpoint is the last good one.
                Nothing of the failed save is left, and later saves are possible.
        """
        started = time.monotonic()
        self._join()
        name, serial = "", 0  # set on rank 0 when it makes the folder
        held: list[list[LocalChunk]] = []
        shares: list[list[LocalChunk]] = []

        def announce() -> list[LocalChunk]:
            nonlocal name, serial
            pieces = local_chunks(tensors)
            if self._world.rank == 0:
                check_plain(dict(facts), "facts")
                serial = 1 + max((e.manifest.serial for e in self._entries() if e.manifest), default=0)
                name = files.begin(self._folder, step)
            return pieces

        def deal(pieces: list[list[LocalChunk]]) -> list[tuple[str, list[LocalChunk]]]:
            nonlocal held, shares
            held, shares = pieces, assign_writers(pieces)
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
        except Exception as error:  # the thread reports it to the other ranks
            staged = error
        self._thread = Thread(
            target=self._finish_aside, args=(save, staged, time.monotonic() - started), name="checkpoint", daemon=True
        )
        self._thread.start()

    def wait(self) -> None:
        """Wait for the save in progress, if there is one.

        A save that is not waited for may be lost when the process ends.

        Raises:
            CheckpointError: on all ranks, if that save failed.
        """
        self._join()

    def saved(self) -> list[Saved]:
        """Return the checkpoints that were published since the last call, without waiting.

        Ranks may get the same checkpoint at different calls.
        """
        done, self._done = self._done, []
        return done

    def newest(self) -> Checkpoint | None:
        """Return the newest good checkpoint, equal on every rank, or None if there is none.

        A checkpoint is good if its manifest is valid and its files have the right sizes and
        checksums, which the ranks check together. The one that `latest` names is tried first, then
        the others, newest first. `passed_over` then has one line on each checkpoint that is not
        good; these are not removed.
        """
        self._join()
        found, troubles = newest_good(self._folder, self._world)
        self.passed_over, self._damaged = lines(troubles), set(troubles)
        return found

    def clean(self) -> list[str]:
        """Remove what a killed run left half-written, and return one line on each removal.

        Call it at the start of a run, before any save.
        """
        self._join()
        return all_ranks_or_none(self._world, lambda: files.clean(self._folder) if self._world.rank == 0 else [])[0]

    def _join(self) -> None:
        """Wait for the background thread and raise its error, at the same call on every rank."""
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
        """Write this rank's file, and let rank 0 publish the checkpoint."""
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
            written = all_ranks_or_none(self._world, write)
            stored = {shard_name(i): file for i, file in enumerate(written) if file is not None}
            remarks = all_ranks_or_none(self._world, lambda: self._publish(save, stored) if rank == 0 else ())[0]
        except CheckpointError as error:
            self._give_up(save.step, save.name, error)
        total_s = time.monotonic() - save.started
        num_bytes = sum(file.bytes for file in stored.values())
        blocked_s = total_s if blocked_s is None else blocked_s
        self._done.append(Saved(self._folder / save.name, save.step, blocked_s, total_s, num_bytes, remarks))

    def _publish(self, save: _Save, stored: Mapping[str, StoredFile]) -> tuple[str, ...]:
        """Publish the checkpoint on rank 0 after all files are written, and remove old ones."""
        manifest = Manifest(save.step, save.serial, save.facts, stored, contents(save.held, save.shares))
        part = files.part(self._folder, save.name)
        files.write_durably(part / MANIFEST, manifest.to_json().encode())
        files.publish(self._folder, save.name, [files.LATEST, files.BEST] if save.best else [files.LATEST])
        self._known[self._folder / save.name] = manifest
        return tuple(self._retire())

    def _retire(self) -> list[str]:
        """Remove old checkpoints, and return one line on each that could not be removed.

        A failure here is no error, because the new checkpoint is already published.
        """
        remarks = []
        for path in files.to_prune(self._entries(), self._keep, self._folder, self._damaged):
            try:
                files.remove(path)
            except OSError as error:
                remarks.append(f"the old checkpoint {path} could not be removed: {error}")
        return remarks

    def _entries(self) -> list[files.Entry]:
        """List the published checkpoints; read no manifest that is already known."""
        found = files.entries(self._folder, self._known)
        self._known = {entry.path: entry.manifest for entry in found if entry.manifest is not None}
        return found

    def _give_up(self, step: int, name: str, error: CheckpointError) -> NoReturn:
        """Remove what a failed save has written, and raise the error on all ranks.

        All ranks have reached this call, so no rank is still writing when rank 0 removes the files.
        """

        def last_good() -> str:
            if self._world.rank != 0:
                return ""
            if name:
                files.give_up(self._folder, name)
            return next((e.path.name for e in files.entries(self._folder) if e.manifest), "")

        try:
            last = all_ranks_or_none(self._world, last_good)[0]
            left = f"The last good one is {last}, which is unchanged." if last else "There is no earlier one."
        except CheckpointError as trouble:
            left = f"Its unfinished folder could not be removed either: {trouble}."
        raise CheckpointError(
            f"The checkpoint of step {step} was not saved in {self._folder}: {error}. {left}"
        ) from None


def _on_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy this rank's parts of tensors to host memory, so that the originals may change."""
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
