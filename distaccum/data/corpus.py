"""Stores the tokens of a corpus once per machine."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate, groupby
from operator import itemgetter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from distaccum.data.files import FilePart, SourceFile, is_text, read, split
from distaccum.data.tokens import BYTES, ByteEncoder, Encoder, Vocabulary
from distaccum.errors import ConfigError

TRAIN, VALIDATION = "train", "validation"
DOCUMENTS_FILE, LENGTHS_FILE, SIDECAR_FILE = "documents.int64", "lengths.uint32", "corpus.json"

# Part of the cache key: increase it when the same files would give different tokens.
_FORMAT = 3
_READ_BYTES = 1 << 22


@dataclass(frozen=True)
class Corpus:
    """Describes a corpus whose tokens are stored in a folder.

    The sub-folders `train` and `validation` have one file of tokens each, and `documents.int64`
    with the position of the first token of every document and, as one more number, the end of the
    last document. If a token is not a byte, `lengths.uint32` holds for each token the number of
    bytes of text that it represents; the numbers of a document add up to its size.

    Attributes:
        folder: where the files are.
        vocabulary: the vocabulary of the tokens.
        facts: files, skipped_files, bytes, bytes_per_token, split and digest: the SHA-256 over the
            relative path, the size and the SHA-256 of the content of every file that was read. It
            does not depend on the tokenizer.
    """

    folder: str
    vocabulary: Vocabulary
    facts: dict[str, str | int | float]


def open_corpus(
    root: Path,
    files: Sequence[SourceFile],
    validation_fraction: float,
    cache: Path,
    encoder: Encoder = ByteEncoder(),  # noqa: B008  # it has no state
) -> Corpus:
    """Open the stored tokens of these files, after storing them if that has not been done.

    Every rank calls this function, and ranks do not communicate. One process of a machine stores
    the tokens while the others wait. Where files cannot be locked, each of them does, and the first
    to finish moves a complete folder into place in one step, which all others use. The folder's
    name is a hash of everything that determines its content (root, relative paths, sizes,
    modification times, fraction, tokenizer, format), so a changed file leads to a new folder.

    Whole files are assigned to the training or the validation split (see `in_validation`). If that
    leaves one side without a byte (a single file, a few files), the last `validation_fraction` of
    all bytes, in the order of the files, is used for validation instead. `Corpus.facts` says which
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
    tokenizer = encoder.vocabulary.digest
    # json keeps names that are not UTF-8 (lone surrogates) encodable.
    identity = json.dumps([_FORMAT, str(root), validation_fraction, listing, tokenizer])
    folder = cache / hashlib.sha256(identity.encode()).hexdigest()[:24]
    lock = cache / f".{folder.name}.lock"
    if not folder.is_dir():
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with open(lock, "wb") as held:
                with suppress(OSError):  # a file system without locks
                    # Released when the process ends, even if it is killed.
                    fcntl.flock(held, fcntl.LOCK_EX)
                if not folder.is_dir():
                    _store(root, files, validation_fraction, folder, encoder)
        except OSError as error:
            raise ConfigError(
                f"The tokens of {root} cannot be stored in {cache}: {error}. They need a few bytes "
                "for each byte of text. Choose a writable folder with enough space: "
                "data.cache_dir=FOLDER"
            ) from error
        finally:
            with suppress(OSError):
                lock.unlink()
    return _opened(folder, encoder.vocabulary)


def _store(
    root: Path,
    files: Sequence[SourceFile],
    validation_fraction: float,
    folder: Path,
    encoder: Encoder,
) -> None:
    texts = [file for file in files if is_text(file)]
    size = sum(file.size for file in texts)
    if size < 2:
        raise ConfigError(
            f"{root} has no text to train on: {len(files)} files, {len(files) - len(texts)} of "
            f"them binary, {size} bytes of text in the others. Give a file or a folder with text: "
            "data=path data.path=FILE_OR_FOLDER"
        )
    vocabulary = encoder.vocabulary
    train, validation, rule = split(texts, validation_fraction, vocabulary != BYTES)
    contents = {file.name: hashlib.sha256() for file in texts}
    with TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        draft = Path(temporary, "corpus")
        draft.mkdir()  # with the permissions that the user chose, unlike a temporary folder
        train_tokens = _write(train, encoder, draft / TRAIN, contents)
        if not train_tokens:
            raise ConfigError(
                f"The tokenizer {vocabulary.name} makes no token of the training text of {root}, "
                f"which has {size} bytes including the validation text. Give more text, or a "
                f"data.validation_fraction other than {validation_fraction}."
            )
        tokens = train_tokens + _write(validation, encoder, draft / VALIDATION, contents)
        digest = hashlib.sha256()
        for file in texts:
            content = contents[file.name].digest()
            digest.update(b"%s\0%d\0%s" % (os.fsencode(file.name), file.size, content))
        sidecar = {
            "facts": {
                "files": len(texts),
                "skipped_files": len(files) - len(texts),
                "bytes": size,
                "digest": digest.hexdigest(),
                "bytes_per_token": size / tokens,
                "split": rule,
            },
            "sizes": {str(p.relative_to(draft)): p.stat().st_size for p in draft.glob("*/*")},
        }
        (draft / SIDECAR_FILE).write_text(json.dumps(sidecar, indent=1) + "\n", encoding="utf-8")
        _move_in_place(draft, folder)


def _write(
    parts: Sequence[FilePart], encoder: Encoder, folder: Path, contents: dict[str, Any]
) -> int:
    """Write the tokens of the documents of one split, and return how many there are.

    The bytes that were read are added to the hashes in `contents`.
    """
    vocabulary, counts = encoder.vocabulary, [0] * len(parts)
    folder.mkdir()
    with (
        open(folder / vocabulary.tokens_file, "wb") as tokens_out,
        open(folder / LENGTHS_FILE, "wb") as lengths_out,
    ):
        for batch in _batches(parts, divisible=vocabulary == BYTES):
            texts = [read(part) for _, part in batch]
            found = encoder.encode(texts, [part.file.path for _, part in batch])
            for (document, part), text, (ids, ends) in zip(batch, texts, found, strict=True):
                contents[part.file.name].update(text)
                tokens = np.append(ids, vocabulary.end) if part.end == part.file.size else ids
                counts[document] += len(tokens)
                tokens.astype(vocabulary.dtype).tofile(tokens_out)
                if ends is not None:
                    # The last token, which may be the end token, represents all remaining bytes.
                    places = np.append(ends[: len(tokens) - 1], len(text))[: len(tokens)]
                    np.diff(places, prepend=0).astype("<u4").tofile(lengths_out)
    bounds = [0, *accumulate(count for count in counts if count)]
    np.array(bounds, dtype="<i8").tofile(folder / DOCUMENTS_FILE)
    return bounds[-1]


def _batches(parts: Sequence[FilePart], divisible: bool) -> Iterator[list[tuple[int, FilePart]]]:
    """Yield parts in batches of some megabytes, each with the number of its document.

    Documents are kept whole unless they are divisible.
    """
    step = _READ_BYTES if divisible else sys.maxsize
    pieces = [
        (document, FilePart(part.file, begin, min(begin + step, part.end)))
        for document, part in enumerate(parts)
        for begin in range(part.begin, max(part.end, part.begin + 1), step)
    ]
    ends = accumulate(piece.end - piece.begin for _, piece in pieces)
    numbered = zip((end // _READ_BYTES for end in ends), pieces, strict=True)
    for _, batch in groupby(numbered, key=itemgetter(0)):
        yield [piece for _, piece in batch]


def _move_in_place(draft: Path, folder: Path) -> None:
    try:
        draft.rename(folder)
    except OSError:
        # A folder with content is not replaced: another process was first, with the same content.
        if not (folder / SIDECAR_FILE).is_file():
            raise


def _opened(folder: Path, vocabulary: Vocabulary) -> Corpus:
    again = "To have them stored again from the source, delete that folder."
    try:
        fields: dict[str, Any] = json.loads((folder / SIDECAR_FILE).read_text(encoding="utf-8"))
        sizes: dict[str, int] = fields.pop("sizes")
        actual = {name: (folder / name).stat().st_size for name in sizes}
        corpus = Corpus(str(folder), vocabulary, **fields)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"The stored tokens in {folder} cannot be read ({error}). {again}"
        ) from error
    if actual != sizes:
        raise ConfigError(
            f"The stored tokens in {folder} are damaged: they have {actual} bytes and should have "
            f"{sizes}. {again}"
        )
    return corpus
