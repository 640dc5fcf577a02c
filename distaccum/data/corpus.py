"""Stores the tokens of a corpus once per machine."""

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

from distaccum.data.files import FilePart, SourceFile, encoded, is_text, read, split
from distaccum.data.tokens import BYTES, ByteEncoder, Encoder, Vocabulary
from distaccum.errors import ConfigError

END_OF_FILE = BYTES.end
DOCUMENTS_FILE, LENGTHS_FILE, SIDECAR_FILE = "documents.int64", "lengths.uint32", "corpus.json"

# Part of the cache key: increase it when the same files would give different tokens.
_FORMAT = 2
_READ_BYTES = 1 << 22


@dataclass(frozen=True)
class Corpus:
    """Describes a corpus whose tokens are stored in a folder.

    The tokens of all training documents come first in the file, followed by those of the validation
    documents. `documents.int64` holds the position of the first token of every document and, as one
    more number, the end of the last document. If a token is not a byte, `lengths.uint32` holds for
    each token the number of bytes of text that it represents; the numbers of a document add up to
    its size. `digest` is the SHA-256 over the relative path, the size and the SHA-256 of the
    content of every file that was read. It does not depend on the tokenizer.
    """

    folder: str
    vocabulary: Vocabulary
    files: int
    skipped_files: int
    bytes: int
    digest: str
    split: str
    train_tokens: int
    validation_tokens: int
    train_documents: int
    validation_documents: int

    @property
    def tokens_file(self) -> Path:
        """Return the path of the file of tokens, which are of `vocabulary.dtype`."""
        return Path(self.folder, f"tokens.{self.vocabulary.dtype.name}")

    @property
    def lengths_file(self) -> Path | None:
        """Return the path of the file of token lengths, or None if each token is a byte."""
        return None if self.vocabulary == BYTES else Path(self.folder, LENGTHS_FILE)


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


def open_corpus(
    root: Path,
    files: Sequence[SourceFile],
    validation_fraction: float,
    cache: Path,
    encoder: Encoder = ByteEncoder(),  # noqa: B008  # it has no state
) -> Corpus:
    """Open the stored tokens of these files, after storing them if that has not been done.

    Every rank calls this function, and ranks do not communicate. The first process to finish moves
    a complete folder into place in one step, and all others use that folder. The folder's name is a
    hash of everything that determines its content (root, relative paths, sizes, modification times,
    fraction, tokenizer, format), so a changed file leads to a new folder.

    Whole files are assigned to the training or the validation split (see `in_validation`). If that
    leaves one side without a byte (a single file, a few files), the last `validation_fraction` of
    all bytes, in the order of the files, is used for validation instead. `Corpus.split` says which
    rule was used. The split does not depend on the tokenizer, with one exception: for a tokenizer
    of text, a character that would be cut in two belongs to the validation side.

    Args:
        root: the folder or file in which the files were found.
        files: the files of the corpus, sorted by name.
        validation_fraction: part of the text that is used for validation, in (0, 1).
        cache: folder in which tokens are stored.
        encoder: converts the bytes of a document to tokens.

    Raises:
        ConfigError: if the files have no text, if a file cannot be read or changes while it is
            read, if the tokenizer cannot read the text, or if the cache cannot be used.
    """
    listing = [[file.name, file.size, file.mtime_ns] for file in files]
    vocabulary = encoder.vocabulary
    tokenizer = [] if vocabulary == BYTES else [vocabulary.digest]
    # ensure_ascii keeps names that are not UTF-8 (lone surrogates) encodable.
    identity = json.dumps([_FORMAT, str(root), validation_fraction, listing, *tokenizer], ensure_ascii=True)
    key = hashlib.sha256(identity.encode()).hexdigest()[:24]
    folder = cache / key
    if not folder.is_dir():
        draft = cache / f".{key}.{os.getpid()}.{secrets.token_hex(4)}"
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with _one_at_a_time(cache / f".{key}.lock", bool(tokenizer)):
                if not folder.is_dir():
                    draft.mkdir()
                    _store(root, files, validation_fraction, draft, encoder)
                    _move_in_place(draft, folder)
        except OSError as error:
            raise ConfigError(
                f"The tokens of {root} cannot be stored in {cache}: {error}. They need a few bytes for each byte of "
                f"text. Choose a writable folder with enough space: data.cache_dir=FOLDER"
            ) from error
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    return _opened(folder, vocabulary)


@contextmanager
def _one_at_a_time(lock: Path, wanted: bool) -> Iterator[None]:
    """Let one process of a machine tokenize while the others wait.

    This only avoids duplicate work: the result is the same without it.
    """
    if not wanted:  # bytes are stored as fast as they are read, so waiting would save nothing
        yield
        return
    with open(lock, "wb") as held:
        with suppress(OSError):  # a file system without locks: each rank tokenizes for itself
            fcntl.flock(held, fcntl.LOCK_EX)  # released when the process ends, even if it is killed
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def _store(root: Path, files: Sequence[SourceFile], validation_fraction: float, draft: Path, encoder: Encoder) -> None:
    texts = [file for file in files if is_text(file)]
    size = sum(file.size for file in texts)
    if size < 2:
        raise ConfigError(
            f"{root} has no text to train on: {len(files)} files, {len(files) - len(texts)} of them binary, {size} "
            f"bytes of text in the others. Give a file or a folder with text: data=path data.path=FILE_OR_FOLDER"
        )
    vocabulary = encoder.vocabulary
    train, validation, rule = split(texts, validation_fraction, whole_characters=vocabulary != BYTES)
    contents = {file.name: hashlib.sha256() for file in texts}
    counts = _write(train + validation, encoder, draft, contents)
    train_counts, validation_counts = ([n for n in part if n] for part in (counts[: len(train)], counts[len(train) :]))
    if not train_counts:
        raise ConfigError(
            f"The tokenizer {vocabulary.name} makes no token of the training text of {root}, which has {size} bytes "
            f"including the validation text. Give more text, or a data.validation_fraction other than "
            f"{validation_fraction}."
        )
    bounds = [0, *accumulate(train_counts + validation_counts)]
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
        validation_tokens=sum(validation_counts),
        train_documents=len(train_counts),
        validation_documents=len(validation_counts),
    )
    sidecar = {name: value for name, value in asdict(corpus).items() if name not in ("folder", "vocabulary")}
    (draft / SIDECAR_FILE).write_text(json.dumps(sidecar, indent=1) + "\n", encoding="utf-8")


def _write(pieces: list[FilePart], encoder: Encoder, draft: Path, contents: dict[str, Any]) -> list[int]:
    """Write the tokens of these documents in this order, and return how many tokens each has.

    The bytes that were read are added to the hashes in `contents`.
    """
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
    """Return how many bytes of text each token of a document represents.

    The last token of the document (the end token, if there is one) gets all remaining bytes.
    """
    bounds = np.concatenate(([0], ends if is_marked else ends[:-1], [size][: len(ends) + is_marked]))
    return np.diff(bounds)


def _batches(pieces: list[FilePart], divisible: bool) -> Iterator[list[FilePart]]:
    """Yield pieces in batches of some megabytes: several documents, or a part of one.

    Documents are kept whole unless they are divisible.
    """
    batch, size = [], 0
    for piece in pieces:
        step = _READ_BYTES if divisible else max(piece.end - piece.begin, 1)
        for begin in range(piece.begin, max(piece.end, piece.begin + 1), step):
            end = min(begin + step, piece.end)
            batch.append(FilePart(piece.file, begin, end, last=end == piece.end))
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
        # Rename cannot replace a folder that has content: another process was first, with the same
        # content.
        if not (folder / SIDECAR_FILE).is_file():
            raise


def _opened(folder: Path, vocabulary: Vocabulary) -> Corpus:
    try:
        fields: dict[str, Any] = json.loads((folder / SIDECAR_FILE).read_text(encoding="utf-8"))
        corpus = Corpus(folder=str(folder), vocabulary=vocabulary, **fields)
        tokens = corpus.train_tokens + corpus.validation_tokens
        sizes = {
            corpus.tokens_file: vocabulary.dtype.itemsize * tokens,
            folder / DOCUMENTS_FILE: 8 * (corpus.train_documents + corpus.validation_documents + 1),
        }
        if corpus.lengths_file is not None:
            sizes[corpus.lengths_file] = 4 * tokens
        actual = [path.stat().st_size for path in sizes]
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"The stored tokens in {folder} cannot be read ({error}). To have them stored again from the source, "
            f"delete that folder."
        ) from error
    if actual != list(sizes.values()):
        raise ConfigError(
            f"The stored tokens in {folder} are damaged: {', '.join(path.name for path in sizes)} have {actual} bytes "
            f"and should have {list(sizes.values())}. To have them stored again from the source, delete that folder."
        )
    return corpus


def _write_tokens(out: BinaryIO, tokens: npt.NDArray[np.integer[Any]], dtype: np.dtype[Any]) -> None:
    out.write(tokens.astype(dtype).tobytes())
