"""Describes what one micro-batch and one optimizer update take, as `trace` has recorded it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

LOSS = -2  # the group of all computation after the model


@dataclass(frozen=True)
class Segment:
    """Describes one part of a micro-batch: in a block, outside the blocks or after the model.

    Bytes are those of tensors that operators made. Parameters, buffers, the micro-batch itself and
    parameter gradients that have arrived in `.grad` are not included.
    """

    group: int  # index of the block, ROOT or LOSS
    backward: bool
    begins: int  # bytes alive at the beginning
    # Peak bytes until the first gradient arrives, then until each further one, then until the end.
    peaks: tuple[int, ...]
    # Positions in `model.parameters()` of the gradients that arrive; one fewer than `peaks`.
    arrivals: tuple[int, ...]


@dataclass(frozen=True)
class MicroBatchTrace:
    """Holds the memory over time and the FLOPs of one micro-batch."""

    samples: int
    segments: tuple[Segment, ...]  # in the order in which they run
    saved: int  # bytes kept after the forward for the backward
    handed_on: int  # bytes that the last block returned
    micro_batch_bytes: int  # bytes of the samples themselves
    # Of matrix products in forward and backward, including recomputation by checkpointing.
    flops: int

    @property
    def to_head(self) -> int:
        """Return the bytes of a micro-batch that waits for the backward of its blocks.

        Without blocks these are all bytes kept for the backward.
        """
        behind = (
            segment.begins for segment in self.segments if segment.backward and segment.group >= 0
        )
        return next(behind, self.saved) + self.handed_on

    @property
    def ends(self) -> tuple[int, ...]:
        """Return the bytes that are alive at the end of each segment."""
        return (*(segment.begins for segment in self.segments[1:]), 0)

    @staticmethod
    def between(a: MicroBatchTrace, b: MicroBatchTrace, samples: int) -> MicroBatchTrace:
        """Return the trace of a micro-batch of another size, on the line through two traces.

        Args:
            a: the trace of one size.
            b: the trace of another size.
            samples: the size of the micro-batch in question, which need not lie between the two.

        Raises:
            ValueError: if the two traces do not consist of the same segments.
        """
        forms, others = (
            [(s.group, s.backward, s.arrivals) for s in one.segments] for one in (a, b)
        )
        if forms != others:
            raise ValueError(
                f"micro-batches of {a.samples} and of {b.samples} samples run different segments"
            )
        share = (samples - a.samples) / (b.samples - a.samples) if a.samples != b.samples else 0.0

        def at(one: int, other: int) -> int:
            return max(0, math.ceil(one + (other - one) * share))

        return MicroBatchTrace(
            samples,
            tuple(
                replace(s, begins=at(s.begins, t.begins), peaks=tuple(map(at, s.peaks, t.peaks)))
                for s, t in zip(a.segments, b.segments, strict=True)
            ),
            at(a.saved, b.saved),
            at(a.handed_on, b.handed_on),
            at(a.micro_batch_bytes, b.micro_batch_bytes),
            at(a.flops, b.flops),
        )


@dataclass(frozen=True)
class Update:
    """Holds the bytes of an optimizer on one rank."""

    kept: int  # optimizer state after the first update
    transient: int  # further bytes at the peak of an update
