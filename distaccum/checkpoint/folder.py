"""The folder of a run's checkpoints as files: names, what is in place, pointers, what is kept.

A folder `step-00000012.part` is on its way (or on its way out); without the ending it is complete, and is never written
to again. So a process may be killed after any line below: what is found is the old state or the new one.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from distaccum.errors import CheckpointError

from .manifest import MANIFEST, MAX_BYTES, Manifest

LATEST = "latest"
BEST = "best"
_PART = ".part"
_NAME = re.compile(r"step-([0-9]{8,18})(?:-([0-9]{1,9}))?")
_MAX_POINTER_BYTES = 100
_BLOCK_BYTES = 1 << 24


@dataclass(frozen=True)
class Entry:
    """One folder that bears the name of a checkpoint."""

    path: Path
    manifest: Manifest | None
    trouble: str  # why there is no manifest, or which file has the wrong size


def begin(folder: Path, step: int) -> str:
    """Make the folder of a save that is on its way, and return the checkpoint's name. No name is used twice."""
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        sync_folder(folder.parent)
    attempt = 1
    while True:
        name = f"step-{step:08d}" + (f"-{attempt}" if attempt > 1 else "")
        attempt += 1
        if os.path.lexists(folder / name):
            continue
        try:
            part(folder, name).mkdir()
        except FileExistsError:
            continue
        return name


def part(folder: Path, name: str) -> Path:
    """Where a checkpoint lies while it is on its way."""
    return folder / (name + _PART)


def publish(folder: Path, name: str, pointers: Sequence[str]) -> None:
    """Put a written checkpoint in place, and let the pointers name it."""
    sync_folder(part(folder, name))
    for pointer in pointers:
        write_durably(part(folder, pointer), f"{name}\n".encode())  # a disk that is full is full here, not below
    part(folder, name).rename(folder / name)
    sync_folder(folder)  # the checkpoint is there before anything names it
    for pointer in pointers:
        part(folder, pointer).replace(folder / pointer)
    sync_folder(folder)


def give_up(folder: Path, name: str) -> None:
    """Remove what a save has written that did not succeed."""
    for pointer in (LATEST, BEST):
        part(folder, pointer).unlink(missing_ok=True)
    if part(folder, name).exists():
        shutil.rmtree(part(folder, name))


def remove(path: Path) -> None:
    """Remove a complete checkpoint: its name goes first, so that nobody meets half of one."""
    doomed = part(path.parent, path.name)
    if doomed.exists():
        shutil.rmtree(doomed)
    path.rename(doomed)
    sync_folder(path.parent)
    shutil.rmtree(doomed)


def clean(folder: Path) -> list[str]:
    """Remove what a killed process has left on its way, and say so, one line each."""
    said = []
    for path in _listed(folder):
        name, is_part = path.name.removesuffix(_PART), path.name.endswith(_PART)
        if is_part and _NAME.fullmatch(name) and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
            said.append(f"removed {path}: a save that did not finish, or an old checkpoint half removed")
        elif is_part and name in (LATEST, BEST):
            path.unlink()
            said.append(f"removed {path}: a pointer that was not put in place")
    return said


def pointed(folder: Path, pointer: str) -> str | None:
    """The name that a pointer holds, or None where there is no pointer, or none that names a checkpoint."""
    try:
        name = read_plain(folder / pointer, _MAX_POINTER_BYTES).decode("ascii").strip()
    except (OSError, ValueError, CheckpointError):
        return None
    return name if _NAME.fullmatch(name) else None


def entries(folder: Path, known: Mapping[Path, Manifest] | None = None) -> list[Entry]:
    """All that bear the name of a checkpoint: the one that `latest` points to, then by save, the newest first.

    Args:
        folder: of the checkpoints.
        known: manifests that need not be read again.
    """
    named = [(match, path) for path in _listed(folder) if (match := _NAME.fullmatch(path.name)) and path.is_dir()]
    known = known or {}
    found = [
        look(path, known.get(path))
        for _, path in sorted(named, key=lambda item: (int(item[0][1]), int(item[0][2] or 1)))
    ]
    # One whose manifest cannot be read has no serial: it stands just above the one before it in step.
    ordered: list[tuple[bool, int, bool, int, Entry]] = []
    serial, latest = -1, pointed(folder, LATEST)
    for entry in found:
        serial = serial if entry.manifest is None else entry.manifest.serial
        ordered.append((entry.path.name == latest, serial, entry.manifest is None, len(ordered), entry))
    return [row[-1] for row in sorted(ordered, key=lambda row: row[:-1], reverse=True)]


def look(path: Path, known: Manifest | None = None) -> Entry:
    """Read the manifest of a checkpoint and look whether its files have their sizes. Reads no tensor."""
    try:
        manifest = known or read_manifest(path)
        for name, file in manifest.files.items():
            size = _regular(path / name).st_size
            if size != file.bytes:
                raise CheckpointError(f"{name} has {size} bytes instead of {file.bytes}")
    except (OSError, CheckpointError) as error:
        return Entry(path, None, str(error))
    return Entry(path, manifest, "")


def read_manifest(path: Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        CheckpointError: what is wrong with it.
    """
    if not os.path.lexists(path / MANIFEST):
        foreign = sorted(
            p.name for p in _listed(path) if p.name == ".metadata" or p.suffix in (".pt", ".bin", ".distcp")
        )
        hint = f"; {foreign[0]} is a pickle of torch, which may run anybody's code and is not read" if foreign else ""
        raise CheckpointError(f"{MANIFEST} is missing{hint}")
    return Manifest.from_json(read_plain(path / MANIFEST, MAX_BYTES))


def superfluous(found: Sequence[Entry], keep: int, folder: Path, damaged: Collection[Path]) -> list[Path]:
    """Which complete checkpoints may go. What is damaged or cannot be read may not, nor may links.

    Args:
        found: from `entries`.
        keep: how many of the newest stay. What `latest` and `best` name stays besides.
        folder: where the pointers are.
        damaged: those whose content is known not to be good, though their manifest and sizes are.
    """
    named = {pointed(folder, LATEST), pointed(folder, BEST)}
    sound = [entry for entry in found if entry.path not in damaged and not entry.path.is_symlink()]
    good = sorted(((e.manifest.serial, e.path) for e in sound if e.manifest is not None), reverse=True)
    return [path for _, path in good[keep:] if path.name not in named]


def digest_of(path: Path) -> str:
    """The SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def read_plain(path: Path, max_bytes: int) -> bytes:
    """The content of a regular file of limited size: no device, pipe or link is followed.

    Raises:
        CheckpointError: it is something else, or larger.
    """
    size = _regular(path).st_size
    if size > max_bytes:
        raise CheckpointError(f"{path.name} has {size} bytes, more than {max_bytes}")
    return path.read_bytes()


def write_durably(path: Path, content: bytes) -> None:
    """Write a file and wait until the disk has it."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Wait until the disk has the names in a folder."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _regular(path: Path) -> os.stat_result:
    found = path.lstat()
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"{path.name} is not a regular file")
    return found


def _listed(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []
