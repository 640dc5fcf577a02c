"""Real text as tokens: packed sequences, or padded ragged ones, read from a memory map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from distaccum.data.corpus import DOCUMENTS_FILE, Corpus, cache_root, open_corpus
from distaccum.data.sources import Source, find
from distaccum.data.tokens import BYTES, make_encoder
from distaccum.errors import ConfigError

IGNORED_LABEL = -100
_COUNT_TOKENS = 1 << 22


class Layout(Enum):
    """How documents become samples, see `TextDataset`."""

    packed = "packed"
    ragged = "ragged"


@dataclass
class TextConfig:
    """What text and how it is cut; defaults are in conf/data/text.yaml.

    Attributes:
        name: "text": which kind of data this is.
        source: the standard library's source of this Python, the plays of scripts/get_shakespeare.py, or `path`.
        path: with source=path a file or folder: all of its files that are not hidden and not binary (no zero byte in
            the first 8,000); any encoding where tokens are bytes, else UTF-8. With source=shakespeare the folder that
            the script filled, if it was given `--to`. Otherwise null.
        seq_len: T, predicted tokens per sample; the most of them when ragged.
        layout: packed or ragged.
        heldout_fraction: the part that is held out, more than 0 and less than 1, approximately: whole files are.
        cache_dir: where tokens are stored, or null for the user's cache folder.
        tokenizer: bytes, gpt2, or the path of a tokenizer.json, see `distaccum.data.tokens.make_encoder`.
    """

    name: str
    source: Source
    path: str | None
    seq_len: int
    layout: Layout
    heldout_fraction: float
    cache_dir: str | None
    tokenizer: str


class TextDataset:
    """One split of a corpus. Implements `distaccum.data.base.Dataset`; made by `load_text`.

    Tokens are those of the corpus's vocabulary (bytes are 0..255) and, after every file, its end (after bytes 256).

    * `packed`: the documents follow one another in one stream; sample i is its tokens i*T to (i+1)*T, and predicts all
      of these but the first. The last tokens of the stream that do not fill a sample (fewer than T) are not used.
    * `ragged`: each document stands alone. Its tokens but the first are predicted, in pieces of T and a last one that
      is shorter; each piece is a sample, and each predicted token is in exactly one.

    Attributes:
        vocab_size: tokens are in [0, vocab_size); of bytes 257.
        seq_len: T.
        tokens_per_sample: T when packed, None when ragged.
        facts: for a start block: source, files, skipped_files, bytes, digest, tokenizer, bytes_per_token (of the whole
            corpus), split, layout, and samples and tokens (predicted in one epoch) of this split.

    The tokens are a read-only memory map, shared by all processes of a machine. It is opened at the first use, and
    again in a process that unpickles the data set: what is pickled is less than a kilobyte.
    """

    def __init__(self, corpus: Corpus, source: str, heldout: bool, seq_len: int, layout: Layout):
        self.vocab_size = corpus.vocabulary.size
        self.seq_len = seq_len
        self.tokens_per_sample = seq_len if layout is Layout.packed else None
        self._corpus = corpus
        self._heldout = heldout
        # Each document has a token at least, and its first is not predicted.
        predicted = len(self) * seq_len if layout is Layout.packed else len(self._tokens) - (len(self._bounds) - 1)
        self.facts: dict[str, str | int | float] = {
            "source": source,
            "files": corpus.files,
            "skipped_files": corpus.skipped_files,
            "bytes": corpus.bytes,
            "digest": corpus.digest[:12],
            "tokenizer": f"{corpus.vocabulary.name} {corpus.vocabulary.digest[:12]}".rstrip(),
            "bytes_per_token": corpus.bytes / (corpus.train_tokens + corpus.heldout_tokens),
            "split": corpus.split,
            "layout": layout.value,
            "samples": len(self),
            "tokens": predicted,
        }

    def __len__(self) -> int:
        """The number of samples in one epoch, the same on every rank."""
        if self.tokens_per_sample is None:
            return int(self._first_samples[-1])
        return (len(self._tokens) - 1) // self.seq_len

    def batch(self, indices: Sequence[int], generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Read the samples.

        Args:
            indices: B sample numbers in [0, len), at least one, in the order of the rows.
            generator: not used, nothing here is random.

        Returns:
            `input_ids` and `labels`, int64 [B, T] on the CPU; `labels[b, t]` is the token after `input_ids[b, t]`.
            Ragged: T is the longest sample among these; where a shorter one has ended the label is -100, the input 0.
        """
        starts, lengths = self._spans(indices)
        width = int(lengths.max())
        # Places after the end of a sample read its last token: they exist, and are masked below.
        places = np.minimum(np.arange(width + 1), lengths[:, None])
        block = self._tokens[starts[:, None] + places].astype(np.int64)
        padded = np.arange(width) >= lengths[:, None]
        inputs = np.where(padded, 0, block[:, :-1])
        labels = np.where(padded, IGNORED_LABEL, block[:, 1:])
        return {"input_ids": torch.from_numpy(inputs), "labels": torch.from_numpy(labels)}

    def counted(self, indices: Sequence[int]) -> int:
        """The number of labels other than -100 in `batch(indices)`, exact, from the index alone. No text is read."""
        return int(self._spans(indices)[1].sum())

    def longest(self, count: int) -> list[int]:
        """The numbers of this many samples with most predicted tokens, at most `len`, longest first."""
        if self.tokens_per_sample is not None:
            return list(range(count))
        lengths = self._spans(range(len(self)))[1]
        return [int(sample) for sample in np.argsort(-lengths, kind="stable")[:count]]

    def bytes_of(self, indices: Sequence[int]) -> int:
        """The bytes of text that the `counted(indices)` predicted tokens stand for; the end of a file stands for none.

        bits per byte = nats per token * counted(indices) / bytes_of(indices) / ln 2, whatever the tokenizer.
        """
        starts, lengths = self._spans(indices)
        stored = self._lengths
        spans = [slice(start + 1, start + length + 1) for start, length in zip(starts, lengths, strict=True)]
        if stored is None:
            return sum(int((self._tokens[span] != BYTES.end).sum()) for span in spans)
        return sum(int(stored[span].sum()) for span in spans)

    def __getstate__(self) -> dict[str, Any]:
        return {
            key: value
            for key, value in self.__dict__.items()
            if key not in ("_tokens", "_lengths", "_bounds", "_first_samples")
        }

    @cached_property
    def _tokens(self) -> npt.NDArray[np.unsignedinteger[Any]]:  # [tokens of this split], read-only map
        return self._map(self._corpus.tokens_file, self._corpus.vocabulary.dtype)

    @cached_property
    def _lengths(self) -> npt.NDArray[np.unsignedinteger[Any]] | None:  # the same, in bytes of text; None: one each
        file = self._corpus.lengths_file
        return None if file is None else self._map(file, np.dtype("<u4"))

    def _map(self, file: Path, dtype: np.dtype[Any]) -> npt.NDArray[np.unsignedinteger[Any]]:
        corpus = self._corpus
        begin, length = (corpus.train_tokens, corpus.heldout_tokens) if self._heldout else (0, corpus.train_tokens)
        # asarray drops the memmap class, whose slices and sums are slower; the pages stay those of the file.
        return np.asarray(np.memmap(file, dtype=dtype, mode="r", offset=dtype.itemsize * begin, shape=(length,)))

    @cached_property
    def _bounds(self) -> npt.NDArray[np.int64]:  # [documents + 1], in tokens of this split
        corpus = self._corpus
        begin, length = (
            (corpus.train_documents, corpus.heldout_documents) if self._heldout else (0, corpus.train_documents)
        )
        bounds: npt.NDArray[np.int64] = np.fromfile(
            Path(corpus.folder, DOCUMENTS_FILE), dtype="<i8", count=length + 1, offset=8 * begin
        )
        bounds -= bounds[0]
        return bounds

    @cached_property
    def _first_samples(self) -> npt.NDArray[np.int64]:  # [documents + 1]: the number of each document's first piece
        first_samples = np.zeros(len(self._bounds), dtype=np.int64)
        first_samples[1:] = np.cumsum(
            -((1 - np.diff(self._bounds)) // self.seq_len)
        )  # predicted tokens / T, rounded up
        return first_samples

    def _spans(self, indices: Sequence[int]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The first token and the number of predicted tokens of each sample, [B] each."""
        samples = np.asarray(indices, dtype=np.int64)
        if samples.ndim != 1 or not len(samples) or samples.min() < 0 or samples.max() >= len(self):
            raise IndexError(f"samples are numbered 0 to {len(self) - 1}, and at least one is read; got {indices}")
        if self.tokens_per_sample is not None:
            return samples * self.seq_len, np.full_like(samples, self.seq_len)
        document = np.searchsorted(self._first_samples, samples, side="right") - 1
        starts = self._bounds[document] + (samples - self._first_samples[document]) * self.seq_len
        return starts, np.minimum(self.seq_len, self._bounds[document + 1] - 1 - starts)


def load_text(config: TextConfig) -> tuple[TextDataset, TextDataset]:
    """The training and the held-out text, the same on every rank, without communication. The first call stores tokens.

    Raises:
        ConfigError: a value out of range, text that is missing or too short, a tokenizer that is missing or does not
            read it, a cache folder that cannot be used.
    """
    if config.seq_len < 1:
        raise ConfigError(f"data.seq_len ({config.seq_len}) is the number of predicted tokens per sample: 1 or more")
    if not 0 < config.heldout_fraction < 1:
        raise ConfigError(
            f"data.heldout_fraction ({config.heldout_fraction}) must be more than 0 and less than 1, as there is a "
            f"training and a held-out text: write 0.05 to hold out a twentieth"
        )
    label, root, files = find(config.source, config.path, config.cache_dir)
    encoder = make_encoder(config.tokenizer)
    corpus = open_corpus(root, files, config.heldout_fraction, cache_root(config.cache_dir), encoder)
    train, heldout = (TextDataset(corpus, label, held, config.seq_len, config.layout) for held in (False, True))
    for dataset, which, tokens in (
        (train, "training", corpus.train_tokens),
        (heldout, "held-out", corpus.heldout_tokens),
    ):
        if not len(dataset):
            raise ConfigError(
                f"the {which} text of {root} has {tokens} tokens, and one sample of data.seq_len={config.seq_len} "
                f"takes {config.seq_len + 1}: give a shorter data.seq_len, more text, or another "
                f"data.heldout_fraction than {config.heldout_fraction} (split: {corpus.split})"
            )
    return train, heldout


def unigram_loss(train: TextDataset, heldout: TextDataset, samples: Sequence[int] | None = None) -> float:
    """What a model must beat: nats per token on the labels of `heldout`, told by the frequency of each token alone.

    The probability of a token is (its count among the tokens of `train` + 1) / (all of them + vocab_size). Reads both
    texts once, without communication; the same number on every rank. With `samples`, over the labels of these only.
    """

    def count(tokens: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.int64]:
        return _count(tokens, train.vocab_size)

    counts = count(train._tokens)
    logp = np.log(counts + 1) - np.log(counts.sum() + train.vocab_size)
    if samples is not None:
        chosen = heldout.batch(samples, torch.Generator())["labels"].numpy()
        labels = count(chosen[chosen != IGNORED_LABEL])
    elif heldout.tokens_per_sample is None:
        # All but the first token of each document.
        labels = count(heldout._tokens) - count(heldout._tokens[heldout._bounds[:-1]])
    else:
        labels = count(heldout._tokens[1 : len(heldout) * heldout.seq_len + 1])
    return float(-(labels * logp).sum() / labels.sum())


def _count(tokens: npt.NDArray[np.integer[Any]], vocab_size: int) -> npt.NDArray[np.int64]:
    counts = np.zeros(vocab_size, dtype=np.int64)
    for begin in range(0, len(tokens), _COUNT_TOKENS):  # bincount makes int64 of what it is given
        counts += np.bincount(tokens[begin : begin + _COUNT_TOKENS], minlength=vocab_size)
    return counts
