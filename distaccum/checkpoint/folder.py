"""Manages the folder of a run's checkpoints: names, pointers, publishing and removal.

A folder `step-00000012.part` is being written or removed. Without that ending a checkpoint is
complete and is never written to again. So a process may be killed after any line below, and a
reader finds either the old state or the new.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from distaccum.errors import CheckpointError

from .manifest import MANIFEST, MAX_BYTES, Manifest, StoredFile

LATEST = "latest"
BEST = "best"
_PART = ".part"
_NAME = re.compile(r"step-([0-9]{8,18})(?:-([0-9]{1,9}))?")
_MAX_POINTER_BYTES = 100


@dataclass(frozen=True)
class Entry:
    """Describes one folder that has the name of a checkpoint."""

    path: Path
    manifest: Manifest | None
    trouble: str  # why there is no manifest, or which file has the wrong size; "" if neither


def begin(folder: Path, step: int) -> str:
    """Make the folder of a new save, and return the checkpoint's name; no name is used twice."""
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        sync_folder(folder.parent)
    attempt = 0
    while True:
        attempt += 1
        name = f"step-{step:08d}" + (f"-{attempt}" if attempt > 1 else "")
        if not os.path.lexists(folder / name):
            with suppress(FileExistsError):
                part(folder, name).mkdir()
                return name


def part(folder: Path, name: str) -> Path:
    """Return the path of a checkpoint or a pointer while it is being written or removed."""
    return folder / (name + _PART)


def publish(folder: Path, name: str, pointers: Sequence[str]) -> None:
    """Give a written checkpoint its final name, and make the pointers point to it."""
    sync_folder(part(folder, name))
    for pointer in pointers:
        # A full disk shows here, before the renames.
        write_durably(part(folder, pointer), [f"{name}\n".encode()])
    part(folder, name).rename(folder / name)
    sync_folder(folder)  # the checkpoint is on the disk before a pointer names it
    for pointer in pointers:
        part(folder, pointer).replace(folder / pointer)
    sync_folder(folder)


def give_up(folder: Path, name: str) -> None:
    """Remove everything that a failed save has written."""
    for pointer in (LATEST, BEST):
        part(folder, pointer).unlink(missing_ok=True)
    if part(folder, name).exists():
        shutil.rmtree(part(folder, name))


def remove(path: Path) -> None:
    """Remove a complete checkpoint; it is renamed first, so that nobody finds half of one."""
    doomed = part(path.parent, path.name)
    if doomed.exists():
        shutil.rmtree(doomed)
    path.rename(doomed)
    sync_folder(path.parent)
    shutil.rmtree(doomed)


def clean(folder: Path) -> list[str]:
    """Remove what a killed process left unfinished, and return one line on each removal."""
    messages = []
    for path in _listed(folder):
        name, is_part = path.name.removesuffix(_PART), path.name.endswith(_PART)
        if is_part and _NAME.fullmatch(name) and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
            messages.append(
                f"removed {path}: an unfinished save, or an old checkpoint that was only partly "
                "removed"
            )
        elif is_part and name in (LATEST, BEST):
            path.unlink()
            messages.append(f"removed {path}: an unfinished pointer")
    return messages


def pointed(folder: Path, pointer: str) -> str | None:
    """Return the name that a pointer holds, or None if it names no checkpoint or is missing."""
    try:
        name = read_plain(folder / pointer, _MAX_POINTER_BYTES).decode("ascii").strip()
    except (OSError, ValueError, CheckpointError):
        return None
    return name if _NAME.fullmatch(name) else None


def entries(folder: Path, known: Mapping[Path, Manifest] | None = None) -> list[Entry]:
    """List the checkpoints of a folder: the one that `latest` names, then the others, newest first.

    Args:
        folder: the folder of the checkpoints.
        known: manifests by path that need not be read again.
    """
    named = [
        (match, path)
        for path in _listed(folder)
        if (match := _NAME.fullmatch(path.name)) and path.is_dir()
    ]
    known = known or {}
    found = [
        look(path, known.get(path))
        for _, path in sorted(named, key=lambda item: (int(item[0][1]), int(item[0][2] or 1)))
    ]
    # A checkpoint whose manifest cannot be read has no serial. It counts as just newer than the one
    # before it in step.
    ordered: list[tuple[bool, int, bool, int, Entry]] = []
    serial, latest = -1, pointed(folder, LATEST)
    for entry in found:
        serial = serial if entry.manifest is None else entry.manifest.serial
        ordered.append(
            (entry.path.name == latest, serial, entry.manifest is None, len(ordered), entry)
        )
    return [row[-1] for row in sorted(ordered, key=lambda row: row[:-1], reverse=True)]


def look(path: Path, known: Manifest | None = None) -> Entry:
    """Read the manifest of a checkpoint and check the sizes of its files; read no tensor."""
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
    """Read and check the manifest of a checkpoint.

    Raises:
        CheckpointError: if it is missing or invalid.
    """
    if not os.path.lexists(path / MANIFEST):
        foreign = sorted(
            p.name
            for p in _listed(path)
            if p.name == ".metadata" or p.suffix in (".pt", ".bin", ".distcp")
        )
        hint = (
            f"; {foreign[0]} is a PyTorch pickle, which could run any code and is not read"
            if foreign
            else ""
        )
        raise CheckpointError(f"{MANIFEST} is missing{hint}")
    return Manifest.from_json(read_plain(path / MANIFEST, MAX_BYTES))


def to_prune(
    found: Sequence[Entry], keep: int, folder: Path, damaged: Collection[Path]
) -> list[Path]:
    """Return the complete checkpoints to remove; never damaged or unreadable ones, and never links.

    Args:
        found: the checkpoints, from `entries`.
        keep: the number of newest checkpoints to keep. Those that `latest` and `best` name are kept
            besides.
        folder: the folder of the pointers.
        damaged: checkpoints whose content is known to be damaged, although their manifest and sizes
            are right.
    """
    named = {pointed(folder, LATEST), pointed(folder, BEST)}
    sound = [entry for entry in found if entry.path not in damaged and not entry.path.is_symlink()]
    good = sorted(
        ((e.manifest.serial, e.path) for e in sound if e.manifest is not None), reverse=True
    )
    return [path for _, path in good[keep:] if path.name not in named]


def read_plain(path: Path, max_bytes: int) -> bytes:
    """Return the content of a regular file of limited size.

    Raises:
        CheckpointError: if it is not a regular file (a link, a device, a pipe), or is larger than
            `max_bytes`.
    """
    size = _regular(path).st_size
    if size > max_bytes:
        raise CheckpointError(f"{path.name} has {size} bytes, more than the limit of {max_bytes}")
    return path.read_bytes()


def write_durably(path: Path, contents: Iterable[bytes | memoryview]) -> StoredFile:
    """Write a file, part by part, and wait until it is on the disk.

    Returns:
        The size and checksum of the file.
    """
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for content in contents:
            digest.update(content)
            file.write(content)
        file.flush()
        os.fsync(file.fileno())
        return StoredFile(file.tell(), digest.hexdigest())


def sync_folder(path: Path) -> None:
    """Wait until the names in a folder are on the disk."""
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
