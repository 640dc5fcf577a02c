"""Finds a good checkpoint and loads it; all ranks choose the same one."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from distaccum.errors import CheckpointError
from distaccum.parallel.world import World

from . import folder as files
from .manifest import Manifest
from .storage import check_file, read_into
from .together import all_ranks_or_none

_FOLDER = "checkpoints"  # name of the folder inside a run folder


@dataclass(frozen=True)
class TensorInfo:
    """Describes one tensor of a checkpoint without reading it."""

    shape: torch.Size  # of the whole tensor
    dtype: torch.dtype


class Checkpoint:
    """Represents a complete checkpoint, every byte of which was checked when it was opened.

    Attributes:
        path: the folder of the checkpoint.
        step: the step after which it was saved.
        facts: the plain values that were saved with it.
        tensors: the shape and dtype of each tensor, by name.
        passed_over: one line on each newer checkpoint that was tried first and is not good.
    """

    def __init__(self, path: Path, manifest: Manifest, world: World, passed_over: tuple[str, ...]) -> None:
        """Store the parts; call `Checkpoint.open` or `Checkpoints.newest` instead."""
        self.path = path
        self.step = manifest.step
        self.facts = manifest.facts
        self.tensors = {
            name: TensorInfo(torch.Size(stored.shape), getattr(torch, stored.dtype))
            for name, stored in manifest.tensors.items()
        }
        self.passed_over = passed_over
        self._manifest = manifest
        self._world = world

    @staticmethod
    def open(path: Path, world: World) -> Checkpoint:
        """Open a checkpoint, or the newest good one of a run.

        Call it on every rank. `path` is a checkpoint, a folder `checkpoints`, or a run folder.

        Raises:
            CheckpointError: on all ranks, with what is wrong with the checkpoint, or with each one
                that was tried.
        """
        folder = all_ranks_or_none(world, lambda: _within(path) if world.rank == 0 else None)[0]
        if folder is None:
            try:
                return _examine(path, world, ())
            except CheckpointError as error:
                raise CheckpointError(f"{path}: {error}") from None
        found, troubles = newest_good(folder, world)
        if found is None:
            raise CheckpointError(f"{folder} has no good checkpoint: " + "; ".join(lines(troubles)))
        return found

    def load(self, into: Mapping[str, Tensor]) -> None:
        """Fill tensors in place from the checkpoint.

        Call it on every rank. Plain tensors are filled completely; of a DTensor, on any mesh, each
        rank fills its part.

        Args:
            into: the tensors, by the names under which they were saved; the checkpoint may hold
                more.

        Raises:
            CheckpointError: on all ranks, if a name is missing or has another shape or dtype (a
                rank that finds this has filled nothing), or if a file cannot be read (tensors may
                be partly filled).
        """
        all_ranks_or_none(self._world, lambda: read_into(self.path, self._manifest, into))


def newest_good(folder: Path, world: World) -> tuple[Checkpoint | None, dict[Path, str]]:
    """Return the newest good checkpoint, and what is wrong with those that were tried first.

    Call it on every rank.
    """

    def look() -> tuple[dict[Path, str], list[tuple[Path, str]]]:
        if world.rank != 0:
            return {}, []
        found = [(entry.path, entry.trouble) for entry in files.entries(folder)]
        latest = files.pointed(folder, files.LATEST)
        gone = latest is not None and folder / latest not in dict(found)
        return {folder / files.LATEST: f"names {latest}, which does not exist"} if gone else {}, found

    troubles, found = all_ranks_or_none(world, look)[0]
    for path, trouble in found:
        if trouble:
            troubles[path] = trouble
            continue
        try:
            return _examine(path, world, tuple(lines(troubles))), troubles
        except CheckpointError as error:
            troubles[path] = str(error)
    return None, troubles


def lines(troubles: Mapping[Path, str]) -> list[str]:
    """Return one line on each path and what is wrong with it."""
    return [f"{path}: {trouble}" for path, trouble in troubles.items()]


def _within(path: Path) -> Path | None:
    """Return the folder of checkpoints that a path means, or None if it is a checkpoint itself."""
    for folder in (path, path / _FOLDER):
        if files.entries(folder):
            return folder
    if path.is_dir() and not (path / _FOLDER).is_dir():
        return None
    found = "it is a file" if path.is_file() else "no checkpoint was found there"
    raise CheckpointError(
        f"{path} is not a checkpoint: {found}. Give a folder step-..., a folder checkpoints, or a run folder."
    )


def _examine(path: Path, world: World, passed_over: tuple[str, ...]) -> Checkpoint:
    """Check every byte of a checkpoint; the ranks divide its files among themselves."""
    entry = files.look(path)

    def own() -> str:
        if entry.manifest is None:
            raise CheckpointError(entry.trouble)
        for name in sorted(entry.manifest.files)[world.rank :: world.size]:
            check_file(path, name, entry.manifest)
        return hashlib.sha256(entry.manifest.to_json().encode()).hexdigest()

    if len(set(all_ranks_or_none(world, own))) > 1:
        raise CheckpointError(
            "ranks read different manifests; put the checkpoint on a file system that all ranks share"
        )
    assert entry.manifest is not None
    return Checkpoint(path, entry.manifest, world, passed_over)
