"""Derives all randomness from the seed: the order of samples, and a seed per micro-batch."""

from __future__ import annotations

import hashlib


def round_keys(seed: int, epoch: int) -> list[int]:
    """Return the six 64-bit keys of the permutation that shuffles one epoch."""
    digest = hashlib.blake2b(f"order {seed} {epoch}".encode(), digest_size=48).digest()
    return [int.from_bytes(digest[i : i + 8], "little") for i in range(0, 48, 8)]


def random_key(seed: int, step: int, number: int) -> int:
    """Return the seed, in [0, 2^63), of all randomness in one micro-batch.

    It seeds dropout and augmentation and does not depend on the world size.

    Args:
        seed: the seed of the training.
        step: the window's number.
        number: the micro-batch's number in the window, over all ranks.
    """
    digest = hashlib.blake2b(f"micro-batch {seed} {step} {number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def permuted(index: int, size: int, keys: list[int]) -> int:
    """Return the number to which a keyed permutation of range(size) maps an index.

    It is a Feistel network of six rounds with cycle walking (Black and Rogaway, "Ciphers with
    arbitrary finite domains", 2002). The round function is the finalizer of splitmix64. It needs no
    memory and no state, so the sample at any position of any epoch is found directly.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for key in keys:
            mixed = (right + key) & 0xFFFFFFFFFFFFFFFF
            mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
            mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
            left, right = right, left ^ ((mixed ^ (mixed >> 31)) & mask)
        index = left << half | right
        if index < size:
            return index
