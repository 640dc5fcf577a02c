"""Worlds of several sizes for one module, each started when it is first used."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from worlds import World


@pytest.fixture(scope="module")
def worlds() -> Iterator[Callable[[int], World]]:
    """The world of so many ranks."""
    started: dict[int, World] = {}

    def of(size: int) -> World:
        if size not in started:
            started[size] = World(size)
        return started[size]

    yield of
    for world in started.values():
        world.close()
