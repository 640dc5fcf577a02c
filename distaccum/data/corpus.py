"""Which files a corpus is made of, how they are split, and their tokens stored once per machine."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np

from distaccum.errors import ConfigError

END_OF_FILE = 256
VOCAB_SIZE = 257
TOKENS_FILE, DOCUMENTS_FILE, SIDECAR_FILE = "tokens.uint16", "documents.int64", "corpus.json"

# Part of the key of the cache: raise it when the same files would give other tokens.
_FORMAT = 1
_READ_BYTES = 1 << 22
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
class Corpus:
    """A stored corpus. The tokens of all training documents come first in the file, then those held out.

    `documents.int64` holds the first token of every document and one number more, the end of the last;
    `digest` is the SHA-256 over the relative path, the size and the SHA-256 of the content of every file that was read.
    """

    folder: str
    files: int
    skipped_files: int
    bytes: int
    digest: str
    split: str
    train_tokens: int
    heldout_tokens: int
    train_documents: int
    heldout_documents: int


@dataclass(frozen=True)
class _Piece:
    """The bytes [begin, end) of a file: a document. It has the end-of-file mark if the file ends there."""

    file: SourceFile
    begin: int
    end: int


def cache_root(cache_dir: str | None) -> Path:
    """Where tokens are kept: `cache_dir`, else `$XDG_CACHE_HOME/distaccum`, else `~/.cache/distaccum`."""
    if cache_dir is not None:
        return Path(cache_dir).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG rules say that a relative path there is to be ignored.
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "distaccum"


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
    head = hashlib.sha256(_encoded(name)).digest()[:8]
    return int.from_bytes(head, "big") < heldout_fraction * 2**64


def open_corpus(root: Path, files: Sequence[SourceFile], heldout_fraction: float, cache: Path) -> Corpus:
    """Open the stored tokens of these files, and store them first where that has not been done.

    Called by every rank, without talking to the others: whoever comes first moves a complete folder in place in one
    step, and all others use that one. The folder's name is a hash of all that determines its content (root, relative
    paths, sizes, times of change, fraction, format), so that a changed file makes a new folder.

    The split is by file (`is_heldout`). If that leaves one side without a byte (a single file, a few files), the last
    `heldout_fraction` of all bytes, in the order of the files, is held out instead; `Corpus.split` says which it was.

    Raises:
        ConfigError: no text in the files, a file that cannot be read or changes meanwhile, a cache that cannot be used.
    """
    listing = [[file.name, file.size, file.mtime_ns] for file in files]
    # ensure_ascii keeps names that are not UTF-8 (lone surrogates) encodable.
    identity = json.dumps([_FORMAT, str(root), heldout_fraction, listing], ensure_ascii=True)
    key = hashlib.sha256(identity.encode()).hexdigest()[:24]
    folder = cache / key
    if not folder.is_dir():
        draft = cache / f".{key}.{os.getpid()}.{secrets.token_hex(4)}"
        try:
            draft.mkdir(parents=True)
            _store(root, files, heldout_fraction, draft)
            _move_in_place(draft, folder)
        except OSError as error:
            raise ConfigError(
                f"the tokens of {root} cannot be stored in {cache}: {error}. They take two bytes for each byte of "
                f"text; name a folder with room that you may write to: data.cache_dir=FOLDER"
            ) from error
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    return _opened(folder)


def _store(root: Path, files: Sequence[SourceFile], heldout_fraction: float, draft: Path) -> None:
    texts = [file for file in files if _is_text(file)]
    size = sum(file.size for file in texts)
    if size < 2:
        raise ConfigError(
            f"{root} has no text to train on: {len(files)} files, {len(files) - len(texts)} of them binary, {size} "
            f"bytes of text in the others. Give a file or folder with text: data=path data.path=FILE_OR_FOLDER"
        )
    train, heldout, split = _split(texts, heldout_fraction)
    contents = {file.name: hashlib.sha256() for file in texts}
    bounds = [0]
    with open(draft / TOKENS_FILE, "wb") as tokens:
        for piece in train + heldout:
            for chunk in _read(piece):
                contents[piece.file.name].update(chunk)
                _write_tokens(tokens, np.frombuffer(chunk, dtype=np.uint8))
            is_marked = piece.end == piece.file.size
            if is_marked:
                _write_tokens(tokens, np.array([END_OF_FILE]))
            bounds.append(bounds[-1] + piece.end - piece.begin + is_marked)
    np.array(bounds, dtype="<i8").tofile(draft / DOCUMENTS_FILE)
    digest = hashlib.sha256()
    for file in texts:
        digest.update(b"%s\0%d\0%s" % (_encoded(file.name), file.size, contents[file.name].digest()))
    corpus = Corpus(
        folder=str(draft),
        files=len(texts),
        skipped_files=len(files) - len(texts),
        bytes=size,
        digest=digest.hexdigest(),
        split=split,
        train_tokens=bounds[len(train)],
        heldout_tokens=bounds[-1] - bounds[len(train)],
        train_documents=len(train),
        heldout_documents=len(heldout),
    )
    sidecar = {name: value for name, value in asdict(corpus).items() if name != "folder"}
    (draft / SIDECAR_FILE).write_text(json.dumps(sidecar, indent=1) + "\n", encoding="utf-8")


def _split(files: list[SourceFile], heldout_fraction: float) -> tuple[list[_Piece], list[_Piece], str]:
    heldout = [_Piece(file, 0, file.size) for file in files if is_heldout(file.name, heldout_fraction)]
    train = [_Piece(file, 0, file.size) for file in files if not is_heldout(file.name, heldout_fraction)]
    if any(piece.end for piece in train) and any(piece.end for piece in heldout):
        return train, heldout, "by file"
    total = sum(file.size for file in files)
    cut = total - min(max(1, round(total * heldout_fraction)), total - 1)
    train, heldout, offset = [], [], 0
    for file in files:
        here = min(max(cut - offset, 0), file.size)  # the bytes of this file that lie before the cut
        if here or not file.size:
            train.append(_Piece(file, 0, here))
        if here < file.size:
            heldout.append(_Piece(file, here, file.size))
        offset += file.size
    return train, heldout, f"the last {heldout_fraction:.4g} of the bytes"


def _move_in_place(draft: Path, folder: Path) -> None:
    try:
        os.rename(draft, folder)
    except OSError:
        # A folder with content cannot be replaced by rename: another process was first, with the same content.
        if not (folder / SIDECAR_FILE).is_file():
            raise


def _opened(folder: Path) -> Corpus:
    try:
        fields: dict[str, Any] = json.loads((folder / SIDECAR_FILE).read_text(encoding="utf-8"))
        corpus = Corpus(folder=str(folder), **fields)
        expected = [
            2 * (corpus.train_tokens + corpus.heldout_tokens),
            8 * (corpus.train_documents + corpus.heldout_documents + 1),
        ]
        actual = [(folder / name).stat().st_size for name in (TOKENS_FILE, DOCUMENTS_FILE)]
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"the stored tokens in {folder} cannot be read ({error}): delete that folder") from error
    if actual != expected:
        raise ConfigError(
            f"the stored tokens in {folder} are damaged: {TOKENS_FILE} and {DOCUMENTS_FILE} have {actual} bytes and "
            f"should have {expected}: delete that folder, it is made anew from the source"
        )
    return corpus


def _read(piece: _Piece) -> Iterator[bytes]:
    left = piece.end - piece.begin
    try:
        with open(piece.file.path, "rb") as source:
            # What was found and what is read must be one thing: the name of the cache folder says so.
            same = os.fstat(source.fileno()).st_size == piece.file.size
            source.seek(piece.begin)
            while same and left and (chunk := source.read(min(left, _READ_BYTES))):
                left -= len(chunk)
                yield chunk
    except OSError as error:
        _cannot_read(error)
    if left or not same:
        raise ConfigError(f"{piece.file.path} changed while it was read, it had {piece.file.size} bytes: start again")


def _is_text(file: SourceFile) -> bool:
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


def _write_tokens(out: BinaryIO, tokens: np.ndarray[Any, Any]) -> None:
    # Little endian whatever the machine: a cache folder may lie on a shared disk.
    out.write(tokens.astype("<u2").tobytes())


def _encoded(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


def _cannot_read(error: OSError) -> NoReturn:
    raise ConfigError(
        f"the text at {error.filename} cannot be read: {error.strerror}. Leave it out, or allow reading it"
    ) from error
