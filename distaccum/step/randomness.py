"""Seeds the randomness inside micro-batches and restores the states of torch's generators."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def kept(device: torch.device) -> Iterator[None]:
    """Restore the states of torch's generators, of the CPU and of this device, on leaving."""
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
    # torch.manual_seed also looks for every other kind of device, which takes longer than a small
    # micro-batch.
    (torch.default_generator.manual_seed if device.type == "cpu" else torch.manual_seed)(seed)
