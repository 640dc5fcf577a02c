"""Finding a good checkpoint and loading it, the same one on every rank."""

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
from .together import together

_FOLDER = "checkpoints"  # within a run


@dataclass(frozen=True)
class TensorInfo:
    """What a checkpoint says of one tensor, without reading it."""

    shape: torch.Size  # of the whole tensor
    dtype: torch.dtype


class Checkpoint:
    """A complete checkpoint, checked to the last byte when it was opened.

    Attributes:
        path: its folder.
        step: the step after which it was saved.
        facts: the plain values that were saved with it.
        tensors: shape and dtype by name.
        passed_over: newer ones that were looked at before and are not good, one line each.
    """

    def __init__(self, path: Path, manifest: Manifest, world: World, passed_over: tuple[str, ...]) -> None:
        """By `Checkpoint.open` or `Checkpoints.newest`."""
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
        """Open a checkpoint's folder, or the newest good one of a `checkpoints` folder or of a run. On all ranks.

        Raises:
            CheckpointError: on all ranks; what is wrong with it, or with each that was looked at.
        """
        told = together(world, lambda: _within(path) if world.rank == 0 else None)[0]
        if told is None:
            try:
                return _examine(path, world, ())
            except CheckpointError as error:
                raise CheckpointError(f"{path}: {error}") from None
        found, troubles = newest_good(told, world)
        if found is None:
            raise CheckpointError(f"{told} has no good checkpoint: " + "; ".join(lines(troubles)))
        return found

    def load(self, into: Mapping[str, Tensor]) -> None:
        """Fill tensors in place, on all ranks: plain ones wholly, DTensors of any mesh each rank its part.

        Args:
            into: by the names they were saved under; the checkpoint may hold more.

        Raises:
            CheckpointError: on all ranks. A name is missing or has another shape or dtype (then nothing was filled on
                the rank that says so), or a file cannot be read (then tensors are half filled).
        """
        together(self._world, lambda: read_into(self.path, self._manifest, into))


def newest_good(folder: Path, world: World) -> tuple[Checkpoint | None, dict[Path, str]]:
    """The newest good checkpoint, and what is wrong with those that were passed over for it. On all ranks."""

    def look() -> tuple[dict[Path, str], list[tuple[Path, str]]]:
        if world.rank != 0:
            return {}, []
        found = [(entry.path, entry.trouble) for entry in files.entries(folder)]
        latest = files.pointed(folder, files.LATEST)
        gone = latest is not None and folder / latest not in dict(found)
        return {folder / files.LATEST: f"names {latest}, which is not there"} if gone else {}, found

    troubles, found = together(world, look)[0]
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
    """One line each."""
    return [f"{path}: {trouble}" for path, trouble in troubles.items()]


def _within(path: Path) -> Path | None:
    """The folder of checkpoints that a path means, or None where it is a checkpoint itself."""
    for folder in (path, path / _FOLDER):
        if files.entries(folder):
            return folder
    if path.is_dir() and not (path / _FOLDER).is_dir():
        return None
    found = "it is a file" if path.is_file() else "none is there"
    raise CheckpointError(
        f"{path} is no checkpoint: {found}. Name a folder step-..., a folder checkpoints, or the folder of a run."
    )


def _examine(path: Path, world: World, passed_over: tuple[str, ...]) -> Checkpoint:
    """Look at every byte of a checkpoint; the ranks share its files."""
    entry = files.look(path)

    def own() -> str:
        if entry.manifest is None:
            raise CheckpointError(entry.trouble)
        for name in sorted(entry.manifest.files)[world.rank :: world.size]:
            check_file(path, name, entry.manifest)
        return hashlib.sha256(entry.manifest.to_json().encode()).hexdigest()

    if len(set(together(world, own))) > 1:
        raise CheckpointError("ranks read different manifests; let it lie on one file system")
    assert entry.manifest is not None
    return Checkpoint(path, entry.manifest, world, passed_over)
