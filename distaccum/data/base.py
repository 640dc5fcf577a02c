"""Defines the protocol that the loader expects of a data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch


class Dataset(Protocol):
    """Describes a data set whose numbered samples are read one micro-batch at a time.

    The plan decides the order of the samples and their grouping into micro-batches.
    """

    def __len__(self) -> int:
        """Return the number of samples in one epoch, which is the same on every rank."""
        ...

    def batch(
        self, indices: Sequence[int], generator: torch.Generator
    ) -> Mapping[str, torch.Tensor]:
        """Read the samples of one micro-batch and stack them.

        Args:
            indices: sample numbers in [0, len), at least one, in the order of the micro-batch.
            generator: source of randomness for this micro-batch (augmentation). It depends only on
                the seed, the step and the global micro-batch number.

        Returns:
            CPU tensors whose first dimension is `len(indices)`. Equal arguments give equal tensors
            on every rank.
        """
        ...

    def num_targets(self, indices: Sequence[int]) -> Mapping[str, int] | int | None:
        """Return the denominator of a micro-batch, or None if it depends on the content.

        No sample is read. When the content is read, the objective computes the denominator again,
        and the two are compared.

        Args:
            indices: sample numbers of the micro-batch, as for `batch`.
        """
        ...

    def longest_samples(self, count: int) -> list[int]:
        """Return the numbers of the samples that need most memory, longest first.

        Args:
            count: how many samples, at most `len`.
        """
        ...


def numbered(indices: Sequence[int], size: int) -> npt.NDArray[np.int64]:
    """Return sample numbers as an array [B].

    Args:
        indices: the sample numbers of a micro-batch.
        size: the number of samples of the data set.

    Raises:
        IndexError: if there are no indices, or one of them is not in [0, size).
    """
    samples = np.asarray(indices, dtype=np.int64)
    if samples.ndim != 1 or not len(samples) or samples.min() < 0 or samples.max() >= size:
        raise IndexError(
            f"samples are numbered 0 to {size - 1}, and at least one is needed; got {indices}"
        )
    return samples
