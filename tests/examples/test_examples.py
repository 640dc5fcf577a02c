"""The examples are run as their first lines say, each in processes of its own, with warnings as
errors."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYTHON = [sys.executable, "-W", "error"]
TORCHRUN = [
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--nproc-per-node",
    "2",
    "--no-python",
    *PYTHON,
]


def run(start: list[str], example: str) -> str:
    """What an example printed; its exit code is 0."""
    unset = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    # Python would put the folder of the script first on its path, and not the one that it is
    # started from.
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*start, str(ROOT / "examples" / example)],
        env=environment, capture_output=True, text=True, timeout=90, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def losses_by_step(printed: str) -> dict[int, float]:
    return {
        int(step): float(loss)
        for step, loss in re.findall(r"^step (\d+) loss ([\d.]+) ", printed, re.MULTILINE)
    }


@pytest.mark.parametrize("start", [PYTHON, TORCHRUN], ids=["python", "torchrun"])
def test_plain_loop(start: list[str]) -> None:
    printed = run(start, "plain_loop.py")
    losses = losses_by_step(printed)
    assert list(losses) == list(range(1, 21))
    assert losses[1] == pytest.approx(5.55, abs=0.15)  # ln 256: nothing is known of bytes
    # the entropy of this text's single bytes is 3.02 nats: it has learned what follows what
    assert losses[20] < 3.0
    tokens = [int(n) for n in re.findall(r"tokens (\d+)", printed)]
    assert len(set(tokens)) > 15  # windows of ragged lines weigh differently


def test_fsdp2() -> None:
    printed = run(TORCHRUN, "fsdp2.py")
    losses = losses_by_step(printed)
    assert list(losses) == list(range(1, 13))
    assert losses[12] < losses[1] - 1.5
    # Four groups, four micro-batches: each group is gathered once and reduced once.
    counted = next(line for line in printed.splitlines() if line.startswith("counted"))
    assert sorted(re.findall(r"\d+ \w+(?= \()", counted)) == [
        "1 all_reduce",
        "4 all_gather",
        "4 reduce_scatter",
    ]
    assert printed.splitlines()[-1] == "verdict: they agree"


def test_gan() -> None:
    printed = run(TORCHRUN, "gan.py")
    before, after = (float(d) for d in re.findall(r"distance from the ring ([\d.]+)", printed))
    assert before > 1.5
    assert after < before / 2
    assert printed.splitlines()[-1] == "updates: discriminator 150, generator 150"
