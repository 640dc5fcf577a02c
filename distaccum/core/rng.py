"""What looks random and is a function of the seed: the order of samples, and what happens inside micros."""

from __future__ import annotations

import hashlib


def round_keys(seed: int, epoch: int) -> list[int]:
    """Of the permutation of one epoch."""
    digest = hashlib.blake2b(f"order {seed} {epoch}".encode(), digest_size=48).digest()
    return [int.from_bytes(digest[i : i + 8], "little") for i in range(0, 48, 8)]


def random_key(seed: int, step: int, number: int) -> int:
    """The seed, in [0, 2^63), of all randomness in one micro: dropout and augmentation, on any world size."""
    digest = hashlib.blake2b(f"micro {seed} {step} {number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def permuted(index: int, size: int, keys: list[int]) -> int:
    """Where a keyed permutation of range(size) sends an index: a Feistel network of six rounds with cycle walking.

    It needs no memory and no state, so that any position of any epoch is found at once. (Black and Rogaway, "Ciphers
    with arbitrary finite domains", 2002; the round function is the finaliser of splitmix64.)
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
