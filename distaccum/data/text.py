"""Reads text as token sequences, packed or padded, from a memory map."""

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

from distaccum.data.base import numbered
from distaccum.data.corpus import (
    DOCUMENTS_FILE,
    LENGTHS_FILE,
    TRAIN,
    VALIDATION,
    Corpus,
    open_corpus,
)
from distaccum.data.files import Source, cache_root, check_validation_fraction, find
from distaccum.data.tokens import BYTES, make_encoder
from distaccum.errors import ConfigError

IGNORED_LABEL = -100
_COUNT_TOKENS = 1 << 22


class Layout(Enum):
    """Names how documents become samples, see `TextDataset`."""

    packed = "packed"
    ragged = "ragged"


@dataclass
class TextConfig:
    """Configures which text is read and how it is cut into samples.

    Defaults are in conf/data/text.yaml.

    Attributes:
        name: "text", the kind of data.
        source: `stdlib` (source code of this Python's standard library), `shakespeare` (downloaded
            by scripts/get_shakespeare.py) or `path`.
        path: with source=path, a file or a folder, of which all files are read that are not hidden
            and not binary (no zero byte in the first 8,000). They may have any encoding if tokens
            are bytes, and must be UTF-8 otherwise. With source=shakespeare, the folder that the
            script was given as `--to`. Otherwise null.
        seq_len: T, predicted tokens per sample; the largest number of them if ragged.
        layout: `packed` or `ragged`.
        validation_fraction: part of the text that is used for validation, more than 0 and less than
            1. It is approximate, because whole files are used.
        cache_dir: folder in which tokens are stored; null: the user's cache folder.
        tokenizer: bytes, gpt2, or the path of a tokenizer.json, see
            `distaccum.data.tokens.make_encoder`.
    """

    name: str
    source: Source
    path: str | None
    seq_len: int
    layout: Layout
    validation_fraction: float
    cache_dir: str | None
    tokenizer: str


class TextDataset:
    """Holds one split of a corpus, and implements `distaccum.data.base.Dataset`.

    `load_text` builds it. Tokens are those of the corpus's vocabulary (for bytes, 0 to 255). The
    vocabulary's end token (for bytes, 256) follows every file.

    * `packed`: the documents form one stream. Sample i consists of its tokens i*T to (i+1)*T, and
      predicts all of these but the first. The last tokens of the stream that do not fill a sample
      (fewer than T) are not used.
    * `ragged`: documents are not joined. All tokens of a document but the first are predicted, in
      pieces of T and a last one that is shorter. Each piece is a sample, and each predicted token
      is in exactly one sample.

    Attributes:
        vocab_size: tokens are in [0, vocab_size); 257 for bytes.
        seq_len: T.
        tokens_per_sample: T if packed, None if ragged.
        facts: metadata for the start of a run: source, files, skipped_files, bytes, digest,
            tokenizer, bytes_per_token (of the whole corpus), split, layout, and samples and tokens
            (predicted in one epoch) of this split.

    The tokens are a read-only memory map that all processes of a machine share. It is opened at the
    first use, and again in a process that unpickles the data set. Its pickle is below a kilobyte.
    """

    def __init__(self, corpus: Corpus, source: str, validation: bool, seq_len: int, layout: Layout):
        self.vocab_size = corpus.vocabulary.size
        self.seq_len = seq_len
        self.tokens_per_sample = seq_len if layout is Layout.packed else None
        self._corpus = corpus
        self._folder = Path(corpus.folder, VALIDATION if validation else TRAIN)
        # Each document has at least one token, and its first token is not predicted.
        predicted = len(self._tokens) - len(self._bounds) + 1
        self.facts: dict[str, str | int | float] = {
            "source": source,
            **corpus.facts,
            "digest": str(corpus.facts["digest"])[:12],
            "tokenizer": f"{corpus.vocabulary.name} {corpus.vocabulary.digest[:12]}".rstrip(),
            "layout": layout.value,
            "samples": len(self),
            "tokens": predicted if layout is Layout.ragged else len(self) * seq_len,
        }

    def __len__(self) -> int:
        """Return the number of samples in one epoch, which is the same on every rank."""
        return int(self._first_samples[-1])

    def batch(self, indices: Sequence[int], generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Read the samples of one micro-batch.

        Args:
            indices: B sample numbers in [0, len), at least one, in the order of the rows.
            generator: not used, because nothing is random here.

        Returns:
            `input_ids` and `labels`, int64 [B, T] on the CPU. `labels[b, t]` is the token after
            `input_ids[b, t]`. If ragged, T is the length of the longest of these samples, and
            shorter ones are padded with label -100 and input 0.

        Raises:
            IndexError: if there are no indices, or one of them is out of range.
        """
        starts, lengths = self._spans(indices)
        width = int(lengths.max())
        # Places after the end of a sample read its last token, which exists, and are masked below.
        places = np.minimum(np.arange(width + 1), lengths[:, None])
        block = self._tokens[starts[:, None] + places].astype(np.int64)
        padded = np.arange(width) >= lengths[:, None]
        inputs = np.where(padded, 0, block[:, :-1])
        labels = np.where(padded, IGNORED_LABEL, block[:, 1:])
        return {"input_ids": torch.from_numpy(inputs), "labels": torch.from_numpy(labels)}

    def num_targets(self, indices: Sequence[int]) -> int:
        """Return the exact number of labels in `batch(indices)` that are not -100.

        It is computed from the positions of the documents; no text is read.
        """
        return int(self._spans(indices)[1].sum())

    def longest_samples(self, count: int) -> list[int]:
        """Return the numbers of the samples with most predicted tokens, longest first.

        Args:
            count: how many samples, at most `len`.
        """
        lengths = self._spans(range(len(self)))[1]
        longest: list[int] = np.argsort(-lengths, kind="stable")[:count].tolist()
        return longest

    def bytes_of(self, indices: Sequence[int]) -> int:
        """Return how many bytes of text the predicted tokens of these samples represent.

        The end token of a file represents none. Bits per byte, whatever the tokenizer, are nats per
        token * num_targets(indices) / bytes_of(indices) / ln 2.
        """
        starts, lengths = self._spans(indices)
        spans = [slice(start + 1, start + 1 + n) for start, n in zip(starts, lengths, strict=True)]
        if self._lengths is None:
            return sum(int((self._tokens[span] != BYTES.end).sum()) for span in spans)
        return sum(int(self._lengths[span].sum()) for span in spans)

    def __getstate__(self) -> dict[str, Any]:
        maps = ("_tokens", "_lengths", "_bounds", "_first_samples")
        return {name: value for name, value in self.__dict__.items() if name not in maps}

    @cached_property
    def _tokens(self) -> npt.NDArray[np.unsignedinteger[Any]]:  # read-only map
        vocabulary = self._corpus.vocabulary
        return self._map(vocabulary.tokens_file, vocabulary.dtype)

    @cached_property
    def _lengths(self) -> npt.NDArray[np.unsignedinteger[Any]] | None:
        """Bytes of text per token; None: one."""
        return None if self._corpus.vocabulary == BYTES else self._map(LENGTHS_FILE, "<u4")

    def _map(self, name: str, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        # asarray drops the memmap class, whose slices and sums are slower, and copies nothing.
        return np.asarray(np.memmap(self._folder / name, dtype, mode="r"))

    @cached_property
    def _bounds(self) -> npt.NDArray[np.int64]:  # [documents + 1]; packed: the stream is one
        bounds: npt.NDArray[np.int64] = np.fromfile(self._folder / DOCUMENTS_FILE, "<i8")
        return bounds if self.tokens_per_sample is None else bounds[[0, -1]]

    @cached_property
    def _first_samples(self) -> npt.NDArray[np.int64]:  # [documents + 1]
        predicted = np.diff(self._bounds) - 1
        if self.tokens_per_sample is None:  # the last sample of a document may be shorter
            predicted += self.seq_len - 1
        return np.concatenate(([0], np.cumsum(predicted // self.seq_len)))

    def _spans(self, indices: Sequence[int]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return the first token and the number of predicted tokens of each sample, [B] each."""
        samples = numbered(indices, len(self))
        document = np.searchsorted(self._first_samples, samples, side="right") - 1
        starts = self._bounds[document] + (samples - self._first_samples[document]) * self.seq_len
        return starts, np.minimum(self.seq_len, self._bounds[document + 1] - 1 - starts)


def load_text(config: TextConfig) -> tuple[TextDataset, TextDataset]:
    """Load the training and the validation text.

    Every rank gets the same text, without communication. The first call stores the tokens.

    Raises:
        ConfigError: if a value is out of range, the text is missing or too short, the tokenizer is
            missing or cannot read the text, or the cache folder cannot be used.
    """
    if config.seq_len < 1:
        raise ConfigError(
            f"data.seq_len ({config.seq_len}) is the number of predicted tokens per sample; it "
            "must be 1 or more."
        )
    check_validation_fraction(config.validation_fraction, "text")
    label, root, files = find(config.source, config.path, config.cache_dir)
    encoder = make_encoder(config.tokenizer)
    cache = cache_root(config.cache_dir)
    corpus = open_corpus(root, files, config.validation_fraction, cache, encoder)
    train = TextDataset(corpus, label, False, config.seq_len, config.layout)
    validation = TextDataset(corpus, label, True, config.seq_len, config.layout)
    for dataset, which in ((train, "training"), (validation, "validation")):
        if not len(dataset):
            raise ConfigError(
                f"The {which} text of {root} has {len(dataset._tokens)} tokens, but one sample of "
                f"data.seq_len={config.seq_len} takes {config.seq_len + 1}. Give a shorter "
                "data.seq_len, more text, or a data.validation_fraction other than "
                f"{config.validation_fraction} (split: {corpus.facts['split']})."
            )
    return train, validation


def unigram_loss(
    train: TextDataset, validation: TextDataset, samples: Sequence[int] | None = None
) -> float:
    """Compute the validation loss of a prediction from token frequencies alone, in nats per token.

    A useful model has a lower loss. The probability of a token is (its count in `train` + 1) /
    (number of tokens in `train` + vocab_size). The texts are read once, without communication, and
    the result is the same on every rank.

    Args:
        train: text whose tokens are counted.
        validation: text whose labels are predicted.
        samples: sample numbers of `validation` to which the loss is restricted; None: all.
    """
    counts = _count(train._tokens, train.vocab_size)
    logp = np.log(counts + 1) - np.log(counts.sum() + train.vocab_size)
    samples = range(len(validation)) if samples is None else samples
    labels = validation.batch(samples, torch.Generator())["labels"].numpy()
    labels = _count(labels[labels != IGNORED_LABEL], train.vocab_size)
    return float(-(labels * logp).sum() / labels.sum())


def _count(tokens: npt.NDArray[np.integer[Any]], vocab_size: int) -> npt.NDArray[np.int64]:
    """Count how often each token id occurs, [vocab_size]."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for begin in range(0, len(tokens), _COUNT_TOKENS):  # bincount converts its input to int64
        counts += np.bincount(tokens[begin : begin + _COUNT_TOKENS], minlength=vocab_size)
    return counts
