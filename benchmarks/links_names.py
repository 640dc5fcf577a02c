"""The arms of benchmarks/links.py by name, and their settings: all that the parent needs to know of them. No torch."""

from __future__ import annotations

from dataclasses import dataclass

COMPUTE, REFERENCE, OVERLAP = "compute alone", "DDP no_sync", "ours DDP, overlap "
SMALL = "DDP no_sync, small buckets"  # the buckets that the overlap arms have: that alone is no merit of theirs
SLOW = ("DDP naive", "FSDP2 each micro", "FSDP2 last micro", "ours FSDP2 boundary")  # several messages per window
# Two ranks and one sum of two numbers per window. Naive DDP sums over ranks with each micro, so in another order.
SAME_ORDER = (REFERENCE, SMALL, "Accelerate", "Fabric", "ours DDP")
_PLAIN = (
    COMPUTE, REFERENCE, SMALL, "DDP naive", "Accelerate", "Fabric", "ours DDP", "FSDP2 each micro", "FSDP2 last micro",
    "ours FSDP2 boundary", "ours FSDP2 keep",
)  # fmt: skip


def names(overlaps: list[str]) -> list[str]:
    """All arms, in the order in which they are run; `overlaps`: numbers of micros, or "auto"."""
    return [*_PLAIN, *(f"{OVERLAP}{overlap}" for overlap in overlaps)]


def same_order(name: str) -> bool:
    """Whether an arm adds the same numbers in the same order as the reference on two ranks."""
    return name in SAME_ORDER or name.startswith(OVERLAP)


@dataclass(frozen=True)
class Settings:
    """The model and its window. K, micro size and length are powers of two: then divisions are exact."""

    num_micros: int
    micro_size: int  # sequences
    seq_len: int  # tokens
    num_layers: int
    width: int
    bucket_mb: int = 5  # of DDP, in the overlap arms: about a block; torch's own are 25
