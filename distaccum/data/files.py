"""The files of a corpus: which they are, how they are split, and what is read of them."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from distaccum.errors import ConfigError

# A file with a zero byte in its first 8,000 bytes is binary: the rule that git diff goes by.
_SNIFF_BYTES = 8000


@dataclass(frozen=True)
class SourceFile:
    """One file as it was found. `name` is its POSIX path relative to the root, and all that the split looks at."""

    name: str
    path: str
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class Piece:
    """The bytes [begin, end) of a file: a document, or a part of one. It ends with the mark if the file ends there."""

    file: SourceFile
    begin: int
    end: int
    last: bool = True  # of its document


def find_files(root: Path, suffix: str, without: frozenset[str]) -> list[SourceFile]:
    """List the files of a corpus, sorted by their relative POSIX path. No content is read.

    Args:
        root: a folder, or one file (then `suffix` and `without` do not matter).
        suffix: how the names end, "" for all.
        without: names of folders that are left out, at any depth. Hidden files and folders always are, and folders that
            are symbolic links are not followed.
    """
    if root.is_file():
        return [_source_file(root.name, root)]
    found = []
    for folder, folders, names in os.walk(root, onerror=_cannot_read):
        folders[:] = [name for name in folders if name not in without and not name.startswith(".")]
        for name in names:
            path = Path(folder, name)
            if name.endswith(suffix) and not name.startswith(".") and path.is_file():
                found.append(_source_file(path.relative_to(root).as_posix(), path))
    return sorted(found, key=lambda file: file.name)


def is_heldout(name: str, heldout_fraction: float) -> bool:
    """Whether the file of this relative path is held out: a function of the path and the fraction only, everywhere."""
    head = hashlib.sha256(encoded(name)).digest()[:8]
    return int.from_bytes(head, "big") < heldout_fraction * 2**64


def split(
    files: list[SourceFile], heldout_fraction: float, whole_characters: bool
) -> tuple[list[Piece], list[Piece], str]:
    """The training and the held-out documents, and by which rule; see `corpus.open_corpus`.

    Args:
        files: all of them, with two bytes at least.
        heldout_fraction: in (0, 1).
        whole_characters: whether a cut inside a file moves to the first byte of the UTF-8 character there.
    """
    heldout = [Piece(file, 0, file.size) for file in files if is_heldout(file.name, heldout_fraction)]
    train = [Piece(file, 0, file.size) for file in files if not is_heldout(file.name, heldout_fraction)]
    if any(piece.end for piece in train) and any(piece.end for piece in heldout):
        return train, heldout, "by file"
    total = sum(file.size for file in files)
    cut = total - min(max(1, round(total * heldout_fraction)), total - 1)
    train, heldout, offset = [], [], 0
    for file in files:
        here = min(max(cut - offset, 0), file.size)  # the bytes of this file that lie before the cut
        if whole_characters and 0 < here < file.size:
            here = _character_start(file, here)
        if here or not file.size:
            train.append(Piece(file, 0, here))
        if here < file.size:
            heldout.append(Piece(file, here, file.size))
        offset += file.size
    return train, heldout, f"the last {heldout_fraction:.4g} of the bytes"


def _character_start(file: SourceFile, place: int) -> int:
    """The first byte of the UTF-8 character that the byte at `place` belongs to; four bytes are the longest."""
    around = read(Piece(file, max(0, place - 3), place + 1))
    back = next((i for i, byte in enumerate(reversed(around)) if byte & 0xC0 != 0x80), 0)
    return place - back


def read(piece: Piece) -> bytes:
    """The bytes of this piece.

    Raises:
        ConfigError: the file cannot be read, or is another one than was found.
    """
    try:
        with open(piece.file.path, "rb") as source:
            # What was found and what is read must be one thing: the name of the cache folder says so.
            same = os.fstat(source.fileno()).st_size == piece.file.size
            source.seek(piece.begin)
            content = source.read(piece.end - piece.begin)
    except OSError as error:
        _cannot_read(error)
    if len(content) < piece.end - piece.begin or not same:
        raise ConfigError(f"{piece.file.path} changed while it was read, it had {piece.file.size} bytes: start again")
    return content


def is_text(file: SourceFile) -> bool:
    """Whether the file is not binary."""
    try:
        with open(file.path, "rb") as source:
            return b"\0" not in source.read(_SNIFF_BYTES)
    except OSError as error:
        _cannot_read(error)


def _source_file(name: str, path: Path) -> SourceFile:
    try:
        status = path.stat()
    except OSError as error:
        _cannot_read(error)
    return SourceFile(name, str(path), status.st_size, status.st_mtime_ns)


def encoded(name: str) -> bytes:
    """The bytes of a path."""
    return name.encode("utf-8", "surrogateescape")


def _cannot_read(error: OSError) -> NoReturn:
    raise ConfigError(
        f"the text at {error.filename} cannot be read: {error.strerror}. Leave it out, or allow reading it"
    ) from error
