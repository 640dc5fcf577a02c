"""What runs are compared with: uninterrupted ones, computed once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from runs import Run, Undisturbed


@pytest.fixture(scope="package")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """Runs of the tiny configuration that nothing happened to."""
    return Undisturbed(tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture
def run(tmp_path: Path, undisturbed: Undisturbed) -> Callable[..., Run]:
    """Make a run of the same data in a new folder: `run("parallel=ddp", ...)`."""
    return lambda *more: Run(
        tmp_path / str(len(list(tmp_path.iterdir()))), *undisturbed.overrides, *more
    )
