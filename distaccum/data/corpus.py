"""The tokens of a corpus, stored once per machine."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from distaccum.data.files import Piece, SourceFile, encoded, is_text, read, split
from distaccum.data.tokens import BYTES, ByteEncoder, Encoder, Vocabulary
from distaccum.errors import ConfigError

END_OF_FILE = BYTES.end
DOCUMENTS_FILE, LENGTHS_FILE, SIDECAR_FILE = "documents.int64", "lengths.uint32", "corpus.json"

# Part of the key of the cache: raise it when the same files would give other tokens.
_FORMAT = 1
_READ_BYTES = 1 << 22


@dataclass(frozen=True)
class Corpus:
    """A stored corpus. The tokens of all training documents come first in the file, then those held out.

    `documents.int64` holds the first token of every document and one number more, the end of the last;
    `lengths.uint32`, where a token is not a byte, holds how many bytes of text each token stands for: they add up to
    the document's size. `digest` is the SHA-256 over the relative path, the size and the SHA-256 of the content of
    every file that was read, whatever the tokenizer.
    """

    folder: str
    vocabulary: Vocabulary
    files: int
    skipped_files: int
    bytes: int
    digest: str
    split: str
    train_tokens: int
    heldout_tokens: int
    train_documents: int
    heldout_documents: int

    @property
    def tokens_file(self) -> Path:
        """The tokens, of `vocabulary.dtype`."""
        return Path(self.folder, f"tokens.{self.vocabulary.dtype.name}")

    @property
    def lengths_file(self) -> Path | None:
        """The lengths; None where a token is a byte."""
        return None if self.vocabulary == BYTES else Path(self.folder, LENGTHS_FILE)


def cache_root(cache_dir: str | None) -> Path:
    """Where tokens are kept: `cache_dir`, else `$XDG_CACHE_HOME/distaccum`, else `~/.cache/distaccum`."""
    if cache_dir is not None:
        return Path(cache_dir).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG rules say that a relative path there is to be ignored.
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "distaccum"


def open_corpus(
    root: Path,
    files: Sequence[SourceFile],
    heldout_fraction: float,
    cache: Path,
    encoder: Encoder = ByteEncoder(),  # noqa: B008  # it has no state
) -> Corpus:
    """Open the stored tokens of these files, and store them first where that has not been done.

    Called by every rank, without talking to the others: whoever comes first moves a complete folder in place in one
    step, and all others use that one. The folder's name is a hash of all that determines its content (root, relative
    paths, sizes, times of change, fraction, tokenizer, format), so that a changed file makes a new folder.

    The split is by file (`is_heldout`). If that leaves one side without a byte (a single file, a few files), the last
    `heldout_fraction` of all bytes, in the order of the files, is held out instead; `Corpus.split` says which it was.
    It is the same whatever the tokenizer, but that a tokenizer of text leaves a character that would be cut in two to
    the held-out side.

    Raises:
        ConfigError: no text in the files, a file that cannot be read or changes meanwhile, text that the tokenizer does
            not read, a cache that cannot be used.
    """
    listing = [[file.name, file.size, file.mtime_ns] for file in files]
    vocabulary = encoder.vocabulary
    tokenizer = [] if vocabulary == BYTES else [vocabulary.digest]
    # ensure_ascii keeps names that are not UTF-8 (lone surrogates) encodable.
    identity = json.dumps([_FORMAT, str(root), heldout_fraction, listing, *tokenizer], ensure_ascii=True)
    key = hashlib.sha256(identity.encode()).hexdigest()[:24]
    folder = cache / key
    if not folder.is_dir():
        draft = cache / f".{key}.{os.getpid()}.{secrets.token_hex(4)}"
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with _one_at_a_time(cache / f".{key}.lock", bool(tokenizer)):
                if not folder.is_dir():
                    draft.mkdir()
                    _store(root, files, heldout_fraction, draft, encoder)
                    _move_in_place(draft, folder)
        except OSError as error:
            raise ConfigError(
                f"the tokens of {root} cannot be stored in {cache}: {error}. They take a few bytes for each byte of "
                f"text; name a folder with room that you may write to: data.cache_dir=FOLDER"
            ) from error
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    return _opened(folder, vocabulary)


@contextmanager
def _one_at_a_time(lock: Path, wanted: bool) -> Iterator[None]:
    """Ranks of a machine wait for the one that tokenises. It spares work only: without it the result is the same."""
    if not wanted:  # bytes are copied as fast as they are read
        yield
        return
    with open(lock, "wb") as held:
        with suppress(OSError):  # a file system without locks: each rank tokenises for itself
            fcntl.flock(held, fcntl.LOCK_EX)  # ends with the process, however that ends
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def _store(root: Path, files: Sequence[SourceFile], heldout_fraction: float, draft: Path, encoder: Encoder) -> None:
    texts = [file for file in files if is_text(file)]
    size = sum(file.size for file in texts)
    if size < 2:
        raise ConfigError(
            f"{root} has no text to train on: {len(files)} files, {len(files) - len(texts)} of them binary, {size} "
            f"bytes of text in the others. Give a file or folder with text: data=path data.path=FILE_OR_FOLDER"
        )
    vocabulary = encoder.vocabulary
    train, heldout, rule = split(texts, heldout_fraction, whole_characters=vocabulary != BYTES)
    contents = {file.name: hashlib.sha256() for file in texts}
    counts = _write(train + heldout, encoder, draft, contents)
    train_counts, heldout_counts = ([n for n in part if n] for part in (counts[: len(train)], counts[len(train) :]))
    if not train_counts:
        raise ConfigError(
            f"{vocabulary.name} makes no token of the training text of {root}, which has {size} bytes with the "
            f"held-out text: give more text, or another data.heldout_fraction than {heldout_fraction}"
        )
    bounds = [0, *accumulate(train_counts + heldout_counts)]
    np.array(bounds, dtype="<i8").tofile(draft / DOCUMENTS_FILE)
    digest = hashlib.sha256()
    for file in texts:
        digest.update(b"%s\0%d\0%s" % (encoded(file.name), file.size, contents[file.name].digest()))
    corpus = Corpus(
        folder=str(draft),
        vocabulary=vocabulary,
        files=len(texts),
        skipped_files=len(files) - len(texts),
        bytes=size,
        digest=digest.hexdigest(),
        split=rule,
        train_tokens=sum(train_counts),
        heldout_tokens=sum(heldout_counts),
        train_documents=len(train_counts),
        heldout_documents=len(heldout_counts),
    )
    sidecar = {name: value for name, value in asdict(corpus).items() if name not in ("folder", "vocabulary")}
    (draft / SIDECAR_FILE).write_text(json.dumps(sidecar, indent=1) + "\n", encoding="utf-8")


def _write(pieces: list[Piece], encoder: Encoder, draft: Path, contents: dict[str, Any]) -> list[int]:
    """Write the tokens of these documents in this order, hash what was read, and return how many tokens each has."""
    vocabulary, counts, count = encoder.vocabulary, [], 0
    with ExitStack() as files:
        tokens = files.enter_context(open(draft / f"tokens.{vocabulary.dtype.name}", "wb"))
        lengths = None if vocabulary == BYTES else files.enter_context(open(draft / LENGTHS_FILE, "wb"))
        for parts in _batches(pieces, divisible=vocabulary == BYTES):
            texts = [read(part) for part in parts]
            found = encoder.encode(texts, [part.file.path for part in parts])
            for part, text, (numbers, ends) in zip(parts, texts, found, strict=True):
                contents[part.file.name].update(text)
                _write_tokens(tokens, numbers, vocabulary.dtype)
                is_marked = part.end == part.file.size
                if is_marked:
                    _write_tokens(tokens, np.array([vocabulary.end]), vocabulary.dtype)
                if lengths is not None and ends is not None:
                    _write_tokens(lengths, _lengths(ends, len(text), is_marked), np.dtype("<u4"))
                count += len(numbers) + is_marked
                if part.last:
                    counts.append(count)
                    count = 0
    return counts


def _lengths(ends: npt.NDArray[np.int64], size: int, is_marked: bool) -> npt.NDArray[np.int64]:
    """The bytes of each token of a document; its last token, the mark where it has one, has the rest."""
    bounds = np.concatenate(([0], ends if is_marked else ends[:-1], [size][: len(ends) + is_marked]))
    return np.diff(bounds)


def _batches(pieces: list[Piece], divisible: bool) -> Iterator[list[Piece]]:
    """Some megabytes at a time, of several documents or of a part of one; whole documents unless they are divisible."""
    batch, size = [], 0
    for piece in pieces:
        step = _READ_BYTES if divisible else max(piece.end - piece.begin, 1)
        for begin in range(piece.begin, max(piece.end, piece.begin + 1), step):
            end = min(begin + step, piece.end)
            batch.append(Piece(piece.file, begin, end, last=end == piece.end))
            size += end - begin
            if size >= _READ_BYTES:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _move_in_place(draft: Path, folder: Path) -> None:
    try:
        os.rename(draft, folder)
    except OSError:
        # A folder with content cannot be replaced by rename: another process was first, with the same content.
        if not (folder / SIDECAR_FILE).is_file():
            raise


def _opened(folder: Path, vocabulary: Vocabulary) -> Corpus:
    try:
        fields: dict[str, Any] = json.loads((folder / SIDECAR_FILE).read_text(encoding="utf-8"))
        corpus = Corpus(folder=str(folder), vocabulary=vocabulary, **fields)
        tokens = corpus.train_tokens + corpus.heldout_tokens
        sizes = {
            corpus.tokens_file: vocabulary.dtype.itemsize * tokens,
            folder / DOCUMENTS_FILE: 8 * (corpus.train_documents + corpus.heldout_documents + 1),
        }
        if corpus.lengths_file is not None:
            sizes[corpus.lengths_file] = 4 * tokens
        actual = [path.stat().st_size for path in sizes]
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"the stored tokens in {folder} cannot be read ({error}): delete that folder") from error
    if actual != list(sizes.values()):
        raise ConfigError(
            f"the stored tokens in {folder} are damaged: {', '.join(path.name for path in sizes)} have {actual} bytes "
            f"and should have {list(sizes.values())}: delete that folder, it is made anew from the source"
        )
    return corpus


def _write_tokens(out: BinaryIO, tokens: npt.NDArray[np.integer[Any]], dtype: np.dtype[Any]) -> None:
    out.write(tokens.astype(dtype).tobytes())
