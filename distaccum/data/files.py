"""Finds the files of a corpus, splits them into training and validation, and reads them."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from distaccum.errors import ConfigError

# A file with a zero byte in its first 8,000 bytes is binary. This is the rule of git diff.
_SNIFF_BYTES = 8000


@dataclass(frozen=True)
class SourceFile:
    """Describes one file at the time it was found.

    `name` is its POSIX path relative to the root. The split depends on nothing else of the file.
    """

    name: str
    path: str
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class FilePart:
    """Describes the bytes [begin, end) of a file: a document, or a part of one.

    An end token follows the part if the file ends there.
    """

    file: SourceFile
    begin: int
    end: int
    last: bool = True  # whether this is the last part of its document


def find_files(root: Path, suffix: str, without: frozenset[str]) -> list[SourceFile]:
    """List the files of a corpus, sorted by their relative POSIX path, without reading them.

    Args:
        root: a folder, or one file (then `suffix` and `without` do not matter).
        suffix: how the names end, "" for all.
        without: names of folders to leave out, at any depth. Hidden files and folders are always
            left out, and symbolic links to folders are not followed.
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


def in_validation(name: str, validation_fraction: float) -> bool:
    """Return whether the file with this relative path belongs to the validation split.

    The answer depends only on the path and the fraction, so it is the same on every machine.
    """
    head = hashlib.sha256(encoded(name)).digest()[:8]
    return int.from_bytes(head, "big") < validation_fraction * 2**64


def split(
    files: list[SourceFile], validation_fraction: float, whole_characters: bool
) -> tuple[list[FilePart], list[FilePart], str]:
    """Split the documents into training and validation; `corpus.open_corpus` describes the rules.

    Args:
        files: all files, with at least two bytes in total.
        validation_fraction: part of the text that is used for validation, in (0, 1).
        whole_characters: whether a cut inside a file moves back to the first byte of the UTF-8
            character there.

    Returns:
        The training parts, the validation parts, and the rule that was used, for display.
    """
    validation = [FilePart(file, 0, file.size) for file in files if in_validation(file.name, validation_fraction)]
    train = [FilePart(file, 0, file.size) for file in files if not in_validation(file.name, validation_fraction)]
    if any(piece.end for piece in train) and any(piece.end for piece in validation):
        return train, validation, "by file"
    total = sum(file.size for file in files)
    cut = total - min(max(1, round(total * validation_fraction)), total - 1)
    train, validation, offset = [], [], 0
    for file in files:
        here = min(max(cut - offset, 0), file.size)  # the number of bytes of this file before the cut
        if whole_characters and 0 < here < file.size:
            here = _character_start(file, here)
        if here or not file.size:
            train.append(FilePart(file, 0, here))
        if here < file.size:
            validation.append(FilePart(file, here, file.size))
        offset += file.size
    return train, validation, f"the last {validation_fraction:.4g} of the bytes"


def _character_start(file: SourceFile, place: int) -> int:
    """Return where the UTF-8 character begins to which the byte at `place` belongs.

    A character has at most four bytes.
    """
    around = read(FilePart(file, max(0, place - 3), place + 1))
    back = next((i for i, byte in enumerate(reversed(around)) if byte & 0xC0 != 0x80), 0)
    return place - back


def read(piece: FilePart) -> bytes:
    """Return the bytes of one part of a file.

    Raises:
        ConfigError: if the file cannot be read, or is not the file that was found.
    """
    try:
        with open(piece.file.path, "rb") as source:
            # The name of the cache folder depends on the file that was found, so no other is read.
            same = os.fstat(source.fileno()).st_size == piece.file.size
            source.seek(piece.begin)
            content = source.read(piece.end - piece.begin)
    except OSError as error:
        _cannot_read(error)
    if len(content) < piece.end - piece.begin or not same:
        raise ConfigError(
            f"{piece.file.path} changed while it was read. It had {piece.file.size} bytes when it was found. "
            f"Start the program again."
        )
    return content


def is_text(file: SourceFile) -> bool:
    """Return whether a file is not binary."""
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
    """Return the bytes of a path, which need not be valid UTF-8."""
    return name.encode("utf-8", "surrogateescape")


def _cannot_read(error: OSError) -> NoReturn:
    raise ConfigError(
        f"The text at {error.filename} cannot be read: {error.strerror}. Remove the file, or make it readable."
    ) from error
