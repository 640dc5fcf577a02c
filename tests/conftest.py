"""What all tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from worlds import World


@pytest.fixture(scope="module", params=[1, 2, 3, 4], ids=lambda size: f"{size}ranks")
def any_world(request: pytest.FixtureRequest) -> Iterator[World]:
    """Worlds of one to four ranks, each started once per module."""
    made = World(request.param)
    yield made
    made.close()


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[World]:
    """Two ranks, started once per module."""
    made = World(2)
    yield made
    made.close()


@pytest.fixture(scope="module")
def four_ranks() -> Iterator[World]:
    """Four ranks, started once per module."""
    made = World(4)
    yield made
    made.close()


@pytest.fixture(scope="module")
def worlds() -> Iterator[Callable[[int], World]]:
    """A function that gives the world of a size, started when it is first used."""
    started: dict[int, World] = {}

    def of(size: int) -> World:
        if size not in started:
            started[size] = World(size)
        return started[size]

    yield of
    for world in started.values():
        world.close()
