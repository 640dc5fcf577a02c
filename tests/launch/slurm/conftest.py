"""One cluster for all tests, and the jobs of test_cluster.py, which are at work at the same
time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster, missing


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A SLURM cluster of two nodes on this machine. Without SLURM the test is skipped, but fails
    where CI=true."""
    reason = missing()
    if reason is not None:
        text = f"NOT TESTED, as there is no SLURM on this machine: {reason}"
        pytest.fail(text) if os.environ.get("CI") == "true" else pytest.skip(text)
    made = Cluster(tmp_path_factory.mktemp("cluster"))
    yield made
    made.close()


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder from which jobs are submitted; its name needs quotes in a shell."""
    return tmp_path_factory.mktemp("my work")


@pytest.fixture
def no_allocation(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the tests themselves did not run inside a batch job."""
    for name in os.environ:
        if name.startswith(("SLURM_", "SBATCH_")):
            monkeypatch.delenv(name)
