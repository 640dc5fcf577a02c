"""Randomness inside micro-batches: a function of what is computed, and no trace in the generators of the user."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def kept(device: torch.device) -> Iterator[None]:
    """Give torch's generators, of the CPU and of this device, the states back that they had."""
    generators = [torch.default_generator]
    if device.type == "cuda":
        generators.append(torch.cuda.default_generators[device.index or 0])
    states = [generator.get_state() for generator in generators]
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def seed_all(seed: int, device: torch.device) -> None:
    """Seed torch's generators of the CPU and of this device."""
    # torch.manual_seed also looks for every other kind of device, and that takes longer than a small micro-batch.
    (torch.default_generator.manual_seed if device.type == "cpu" else torch.manual_seed)(seed)
