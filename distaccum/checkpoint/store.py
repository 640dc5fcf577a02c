"""Saves and finds the checkpoints of one run, on all ranks together.

Saves are all-or-nothing: if one rank fails, every rank raises and nothing is published.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Thread
from typing import Any, NoReturn

from torch import Tensor

from distaccum.errors import CheckpointError, ConfigError
from distaccum.metrics.format import duration, size
from distaccum.parallel.world import World

from . import folder as files
from .manifest import MANIFEST, Manifest, StoredFile, check_plain
from .reading import Checkpoint, candidates, lines, newest_good
from .state import on_host
from .storage import LocalChunk, local, local_chunks, shard_name, share_out, write_file
from .together import all_ranks_or_none, dealt, own_group, tried

__all__ = ["Checkpoint", "Checkpoints", "Saved"]


@dataclass(frozen=True)
class Saved:
    """Describes a published checkpoint."""

    path: Path
    step: int
    blocked_s: float  # seconds for which the training waited
    total_s: float  # seconds until it was published
    bytes: int  # size of the files of all ranks
    # problems afterwards, such as an old checkpoint that could not be removed
    remarks: tuple[str, ...]

    def message(self) -> str:
        """Return one line on the checkpoint and its cost."""
        line = (
            f"saved {self.path}: {size(self.bytes)} in {duration(self.total_s)}, during which the "
            "training waited for "
        )
        return "; ".join([line + duration(self.blocked_s), *self.remarks])


class Checkpoints:
    """Manages the checkpoints of one run.

    The files are RUN/checkpoints/step-00000100/ and the pointers `latest` and `best`. Make one
    object per rank, and call every method on all ranks. The ranks communicate over a gloo group of
    their own, so that a save in the background cannot mix with a collective of the training.
    """

    def __init__(
        self, folder: Path, world: World, *, keep: int, asynchronous: bool = False
    ) -> None:
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
            raise ConfigError(
                f"At least one checkpoint must be kept, got keep={keep}. Use keep=1 or more."
            )
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

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        facts: Mapping[str, Any],
        *,
        best: bool = False,
    ) -> None:
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
        self.wait()
        name, draft = "", Manifest(step, 0, {}, {}, {})  # rank 0 sets them when it makes the folder

        def announce() -> list[LocalChunk]:
            nonlocal name, draft
            pieces = local_chunks(tensors)
            if self._world.rank == 0:
                check_plain(dict(facts), "facts")
                serial = 1 + max(
                    (e.manifest.serial for e in self._entries() if e.manifest), default=0
                )
                draft = Manifest(step, serial, deepcopy(dict(facts)), {}, {})
                name = files.begin(self._folder, step)
            return pieces

        def deal(held: list[list[LocalChunk]]) -> list[tuple[str, list[str]]]:
            nonlocal draft
            table, shares = share_out(held)
            draft = replace(draft, tensors=table)
            return [(name, share) for share in shares]

        try:
            name, share = dealt(self._world, announce, deal)
        except CheckpointError as error:
            self._give_up(step, name, error)
        own = {key: local(tensors[key]) for key in share}
        if not self._asynchronous:
            self._finish(name, draft, best, own, started, None)
            return
        copies = tried(lambda: on_host(own))
        arguments = (name, draft, best, copies, started, time.monotonic() - started)
        self._thread = Thread(
            target=self._finish_aside,
            args=arguments,
            name="checkpoint",
            daemon=True,
        )
        self._thread.start()

    def wait(self) -> None:
        """Wait for the save in progress, if there is one.

        A save that is not waited for may be lost when the process ends.

        Raises:
            CheckpointError: on all ranks, if that save failed.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

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
        self.wait()
        found, troubles = newest_good(self._world, lambda: candidates(self._folder))
        self.passed_over, self._damaged = lines(troubles), set(troubles)
        return found

    def clean(self) -> list[str]:
        """Remove what a killed run left half-written, and return one line on each removal.

        Call it at the start of a run, before any save.
        """
        self.wait()
        return all_ranks_or_none(
            self._world, lambda: files.clean(self._folder) if self._world.rank == 0 else []
        )[0]

    def _finish_aside(self, *arguments: Any) -> None:
        """Finish a save on the background thread; the next call raises its error."""
        try:
            self._finish(*arguments)
        except BaseException as error:
            self._error = error

    def _finish(
        self,
        name: str,
        draft: Manifest,
        best: bool,
        own: Mapping[str, Tensor] | CheckpointError,
        started: float,
        blocked_s: float | None,
    ) -> None:
        """Write this rank's file, and let rank 0 publish the checkpoint.

        Args:
            name: the name of the checkpoint.
            draft: on rank 0, the manifest without its files.
            best: whether the pointer `best` names this checkpoint too.
            own: what this rank writes, or why it could not be copied to the host.
            started: when the save began, by the monotonic clock.
            blocked_s: the seconds for which the training waited; None: for the whole save.
        """
        rank = self._world.rank
        path = files.part(self._folder, name) / shard_name(rank)

        def write() -> StoredFile | None:
            if isinstance(own, CheckpointError):
                raise own
            return write_file(path, own, own.__getitem__) if own else None

        def publish() -> tuple[str, ...]:
            return self._publish(name, replace(draft, files=stored), best) if rank == 0 else ()

        try:
            written = all_ranks_or_none(self._world, write)
            stored = {shard_name(i): file for i, file in enumerate(written) if file is not None}
            remarks = all_ranks_or_none(self._world, publish)[0]
        except CheckpointError as error:
            self._give_up(draft.step, name, error)
        total_s = time.monotonic() - started
        num_bytes = sum(file.bytes for file in stored.values())
        blocked_s = total_s if blocked_s is None else blocked_s
        published = self._folder / name
        self._done.append(Saved(published, draft.step, blocked_s, total_s, num_bytes, remarks))

    def _publish(self, name: str, manifest: Manifest, best: bool) -> tuple[str, ...]:
        """Publish the checkpoint on rank 0 after all files are written, and remove old ones.

        It returns one line on each old checkpoint that could not be removed.
        """
        unfinished = files.part(self._folder, name)
        files.write_durably(unfinished / MANIFEST, [manifest.to_json().encode()])
        files.publish(self._folder, name, [files.LATEST, files.BEST] if best else [files.LATEST])
        self._known[self._folder / name] = manifest
        remarks = []  # A failure from here on is no error, because the new checkpoint is published.
        for path in files.to_prune(self._entries(), self._keep, self._folder, self._damaged):
            try:
                files.remove(path)
            except OSError as error:
                remarks.append(f"the old checkpoint {path} could not be removed: {error}")
        return tuple(remarks)

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
            left = (
                f"The last good one is {last}, which is unchanged."
                if last
                else "There is no earlier one."
            )
        except CheckpointError as trouble:
            left = f"Its unfinished folder could not be removed either: {trouble}."
        raise CheckpointError(
            f"The checkpoint of step {step} was not saved in {self._folder}: {error}. {left}"
        ) from None
