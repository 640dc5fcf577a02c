"""Names the arms of benchmarks/links.py and their settings, without importing torch."""

from __future__ import annotations

from dataclasses import dataclass

COMPUTE, REFERENCE, OVERLAP = "compute alone", "DDP no_sync", "ours DDP, overlap "
# It has the buckets of the overlap arms, to separate their effect.
SMALL = "DDP no_sync, small buckets"
# These communicate several times per window.
SLOW = ("DDP naive", "FSDP2 each micro-batch", "FSDP2 last micro-batch", "ours FSDP2 boundary")
# On two ranks, these sum over ranks once per window. Naive DDP does so for each micro-batch, which
# is another order.
SAME_ORDER = (REFERENCE, SMALL, "Accelerate", "Fabric", "ours DDP")
_PLAIN = (
    COMPUTE, REFERENCE, SMALL, "DDP naive", "Accelerate", "Fabric", "ours DDP",
    "FSDP2 each micro-batch", "FSDP2 last micro-batch", "ours FSDP2 boundary",
    "ours FSDP2 gather_once",
)  # fmt: skip


def names(overlaps: list[str]) -> list[str]:
    """Return all arms in the order in which they run.

    Args:
        overlaps: values of `overlap_micro_batches`: numbers of micro-batches, or "auto".
    """
    return [*_PLAIN, *(f"{OVERLAP}{overlap}" for overlap in overlaps)]


def same_order(name: str) -> bool:
    """Return whether an arm adds numbers in the same order as the reference on two ranks."""
    return name in SAME_ORDER or name.startswith(OVERLAP)


@dataclass(frozen=True)
class Settings:
    """Holds the sizes of the model and of its window.

    The number of micro-batches, their size and the length are powers of two, so that divisions are
    exact.
    """

    num_micro_batches: int
    micro_batch_size: int  # sequences
    seq_len: int  # tokens
    num_layers: int
    width: int
    bucket_mb: int = 5  # DDP's buckets in the overlap arms, about a block; torch's default is 25
