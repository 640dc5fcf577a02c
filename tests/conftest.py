"""What all tests share: worlds of ranks, and one folder for temporary files that is gone at the
end."""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from multiprocessing.util import Finalize
from pathlib import Path

import pytest
from worlds import World

Worlds = Callable[[int], World]
# Folders of many short tests. They come last, so that no worker ends with a long test, alone.
SHORT = ("core", "data", "metrics", "models", "optim")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    tests = Path(__file__).parent
    items.sort(key=lambda item: item.path.relative_to(tests).parts[0] in SHORT)


@pytest.fixture(scope="session", autouse=True)
def _temporary_folder() -> None:
    """Give tests and their processes one folder for what they leave, which is gone at the end."""
    folder = tempfile.mkdtemp(prefix="tests")
    os.environ["TMPDIR"] = folder
    tempfile.tempdir = None  # read again from the environment
    # After multiprocessing has removed its own folder in there, which has priority -100.
    Finalize(None, shutil.rmtree, args=(folder, True), exitpriority=-200)


@pytest.fixture(scope="session", autouse=True)
def _imports_are_not_collected() -> None:
    """Leave what the imports have made out of each collection, as in forked processes."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def started_worlds(_temporary_folder: None) -> Iterator[Worlds]:
    """A function that gives the session's world of a size, started when it is first used."""
    started: dict[int, World] = {}

    def of(size: int) -> World:
        if size not in started:
            started[size] = World(size)
        return started[size]

    yield of
    for world in started.values():
        world.close()


@pytest.fixture(scope="module")
def worlds(started_worlds: Worlds) -> Iterator[Worlds]:
    """A function that gives the world of a size. What a module leaves on the ranks is tidied up
    after it."""
    used: dict[int, World] = {}

    def of(size: int) -> World:
        return used.setdefault(size, started_worlds(size))

    yield of
    for world in used.values():
        world.tidy()


@pytest.fixture(scope="module", params=[1, 2, 3, 4], ids=lambda size: f"{size}ranks")
def any_world(request: pytest.FixtureRequest, worlds: Worlds) -> World:
    """Worlds of one to four ranks."""
    return worlds(request.param)


@pytest.fixture(scope="module")
def one_rank(worlds: Worlds) -> World:
    """One rank in a process of its own."""
    return worlds(1)


@pytest.fixture(scope="module")
def two_ranks(worlds: Worlds) -> World:
    """Two ranks."""
    return worlds(2)


@pytest.fixture(scope="module")
def four_ranks(worlds: Worlds) -> World:
    """Four ranks."""
    return worlds(4)
