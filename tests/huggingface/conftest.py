"""Two ranks for this folder together: each takes seconds to import transformers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from worlds import World


@pytest.fixture(scope="package")
def two_ranks() -> Iterator[World]:
    """Two ranks, started once."""
    made = World(2)
    yield made
    made.close()
