"""What the loader needs from a data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch


class Dataset(Protocol):
    """Numbered samples that are read a micro-batch at a time. The order and the grouping belong to the plan."""

    def __len__(self) -> int:
        """The number of samples in one epoch, the same on every rank."""
        ...

    def batch(self, indices: Sequence[int], generator: torch.Generator) -> Mapping[str, torch.Tensor]:
        """Read the samples and stack them.

        Args:
            indices: sample numbers in [0, len), in the order of the micro-batch, at least one.
            generator: the randomness of this micro-batch (augmentation), a function of the seed, the step and the
                global micro number only.

        Returns:
            CPU tensors whose first dimension is `len(indices)`. Equal arguments give equal tensors on every rank.
        """
        ...

    def counted(self, indices: Sequence[int]) -> Mapping[str, int] | int | None:
        """The objective's weight of a micro-batch, told without reading it, or None where that takes the content.

        The objective stays the owner of the weight: what is said here is compared with it when the content is read.
        """
        ...

    def longest(self, count: int) -> list[int]:
        """The numbers of this many samples, at most `len`, of which a micro-batch takes most memory, longest first."""
        ...
