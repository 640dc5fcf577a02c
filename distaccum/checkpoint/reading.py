"""Finds a good checkpoint and loads it; all ranks choose the same one.

Every byte is checked before a checkpoint is chosen, and what is needed is read again to be loaded.
A choice comes before there is a model, whose batch sizes may follow from the checkpoint, so reading
only once would mean to keep the whole checkpoint in memory meanwhile.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from distaccum.errors import CheckpointError
from distaccum.parallel.world import World

from . import folder as files
from .manifest import DTYPES, Chunk, Manifest
from .storage import LocalChunk, local, local_chunks, some
from .together import all_ranks_or_none

_FOLDER = "checkpoints"  # name of the folder inside a run folder
Candidates = list[tuple[Path, str]]  # checkpoints, and what is already known to be wrong with each


class Checkpoint:
    """Represents a complete checkpoint, every byte of which was checked when it was opened.

    Attributes:
        path: the folder of the checkpoint.
        step: the step after which it was saved.
        facts: the plain values that were saved with it.
        tensors: a tensor without memory (on `meta`) with the shape and dtype of each tensor.
        passed_over: one line on each newer checkpoint that was tried first and is not good.
    """

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        world: World,
        passed_over: list[str],
    ) -> None:
        """Store the parts; call `Checkpoint.open` or `Checkpoints.newest` instead."""
        self.path = path
        self.step = manifest.step
        self.facts = manifest.facts
        self.tensors = {
            name: torch.empty(stored.shape, dtype=getattr(torch, stored.dtype), device="meta")
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
        found, troubles = newest_good(world, lambda: _meant(path))
        if found is None:
            raise CheckpointError(f"{path} has no good checkpoint: " + "; ".join(lines(troubles)))
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
        all_ranks_or_none(self._world, lambda: _read_into(self.path, self._manifest, into))


def newest_good(
    world: World,
    list_them: Callable[[], Candidates],
) -> tuple[Checkpoint | None, dict[Path, str]]:
    """Return the first good checkpoint of a list, and what is wrong with those before it.

    Call it on every rank; the list is made on rank 0.
    """
    troubles: dict[Path, str] = {}
    found = all_ranks_or_none(world, lambda: list_them() if world.rank == 0 else [])[0]
    for path, trouble in found:
        if trouble:
            troubles[path] = trouble
            continue
        try:
            return _examine(path, world, lines(troubles)), troubles
        except CheckpointError as error:
            troubles[path] = str(error)
    return None, troubles


def lines(troubles: Mapping[Path, str]) -> list[str]:
    """Return one line on each path and what is wrong with it."""
    return [f"{path}: {trouble}" for path, trouble in troubles.items()]


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Open a safetensors file.

    Raises:
        CheckpointError: if it is not one.
    """
    try:
        file = cast(Any, safe_open(str(path), framework="pt"))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a safetensors file: {error}") from None
    with file:
        yield file


def candidates(folder: Path) -> Candidates:
    """List the checkpoints of a folder to try, in this order."""
    found = [(entry.path, entry.trouble) for entry in files.entries(folder)]
    latest = files.pointed(folder, files.LATEST)
    if latest is not None and folder / latest not in dict(found):
        found.insert(0, (folder / files.LATEST, f"names {latest}, which does not exist"))
    return found


def _meant(path: Path) -> Candidates:
    """List the checkpoints to try for a path, which may be one itself."""
    found = candidates(path) or candidates(path / _FOLDER)
    if found:
        return found
    if path.is_dir() and not (path / _FOLDER).is_dir():
        return [(path, "")]
    what = "it is a file" if path.is_file() else "no checkpoint was found there"
    raise CheckpointError(
        f"{path} is not a checkpoint: {what}. Give a folder step-..., a folder checkpoints, or a "
        "run folder."
    )


def _examine(path: Path, world: World, passed_over: list[str]) -> Checkpoint:
    """Check every byte of a checkpoint; the ranks divide its files among themselves."""
    entry = files.look(path)

    def own() -> str:
        if entry.manifest is None:
            raise CheckpointError(entry.trouble)
        for name in sorted(entry.manifest.files)[world.rank :: world.size]:
            _check_file(path / name, entry.manifest)
        return hashlib.sha256(entry.manifest.to_json().encode()).hexdigest()

    if len(set(all_ranks_or_none(world, own))) > 1:
        raise CheckpointError(
            "ranks read different manifests; put the checkpoint on a file system that all ranks "
            "share"
        )
    assert entry.manifest is not None
    return Checkpoint(path, entry.manifest, world, passed_over)


def _check_file(path: Path, manifest: Manifest) -> None:
    """Check that a file has the manifest's checksum and holds the chunks listed there.

    The caller has checked its size.

    Raises:
        CheckpointError: if the file differs from the manifest.
    """
    with path.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    if digest != manifest.files[path.name].sha256:
        raise CheckpointError(
            f"{path.name} is damaged: its checksum is not the one in the manifest",
        )
    with opened(path) as file:
        names = file.keys()
        slices = {name: file.get_slice(name) for name in names}
        held = {name: f"{part.get_dtype()} {part.get_shape()}" for name, part in slices.items()}
    for name, tensor in manifest.tensors.items():
        for chunk in tensor.chunks:
            expected = f"{DTYPES[tensor.dtype]} {list(chunk.sizes)}"
            if chunk.file != path.name or held.get(name) == expected:
                continue
            if name not in held:
                raise CheckpointError(f"{path.name} does not hold {name!r}")
            raise CheckpointError(f"{path.name} holds {name!r} as {held[name]}, not {expected}")


def _read_into(path: Path, manifest: Manifest, into: Mapping[str, Tensor]) -> None:
    """Fill this rank's part of tensors from the files that hold something of it.

    Raises:
        CheckpointError: if a tensor is missing or differs in shape or dtype (then nothing was
            filled), or if a file cannot be read.
    """
    plan: dict[str, list[tuple[str, tuple[slice, ...], tuple[slice, ...]]]] = {}
    for piece in local_chunks(into):
        stored = manifest.tensors.get(piece.name)
        if stored is None:
            held = some(manifest.tensors)
            raise CheckpointError(f"{path} does not hold {piece.name!r}; it holds {held}")
        if (stored.dtype, stored.shape) != (piece.dtype, piece.shape):
            raise CheckpointError(
                f"{path} holds {piece.name!r} as {stored.dtype} {list(stored.shape)}, "
                f"but the tensor to fill is {piece.dtype} {list(piece.shape)}"
            )
        for chunk in stored.chunks:
            both = _overlap(chunk, piece)
            if both is not None:
                plan.setdefault(chunk.file, []).append((piece.name, *both))
    for file_name, parts in plan.items():
        with opened(path / file_name) as file:
            for name, source, target in parts:
                # The file is mapped into memory, so only the part is read.
                local(into[name])[target].copy_(file.get_tensor(name)[source])


def _overlap(chunk: Chunk, piece: LocalChunk) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
    """Return where two blocks overlap, in each one's own coordinates, or None if they do not."""
    in_chunk, in_piece = [], []
    for a, s, b, t in zip(chunk.offsets, chunk.sizes, piece.offsets, piece.sizes, strict=True):
        begin, end = max(a, b), min(a + s, b + t)
        if begin >= end:
            return None
        in_chunk.append(slice(begin - a, end - a))
        in_piece.append(slice(begin - b, end - b))
    return tuple(in_chunk), tuple(in_piece)
