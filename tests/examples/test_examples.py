"""The examples are run as their first lines say, each in processes of its own, with warnings as
errors."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from commands import command_line

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TORCHRUN = ("--standalone", "--nproc-per-node", "2")


def run(folder: Path, torchrun: tuple[str, ...], example: str) -> str:
    """What an example printed; its exit code is 0."""
    done = command_line([], folder, EXAMPLES / example, torchrun=torchrun, strict=True)
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def losses_by_step(printed: str) -> dict[int, float]:
    return {
        int(step): float(loss)
        for step, loss in re.findall(r"^step (\d+) loss ([\d.]+) ", printed, re.MULTILINE)
    }


@pytest.mark.parametrize("torchrun", [(), TORCHRUN], ids=["python", "torchrun"])
def test_plain_loop(tmp_path: Path, torchrun: tuple[str, ...]) -> None:
    printed = run(tmp_path, torchrun, "plain_loop.py")
    losses = losses_by_step(printed)
    assert list(losses) == list(range(1, 21))
    assert losses[1] == pytest.approx(5.55, abs=0.15)  # ln 256: nothing is known of bytes
    # the entropy of this text's single bytes is 3.02 nats: it has learned what follows what
    assert losses[20] < 3.0
    tokens = [int(n) for n in re.findall(r"tokens (\d+)", printed)]
    assert len(set(tokens)) > 15  # windows of ragged lines weigh differently


def test_fsdp2(tmp_path: Path) -> None:
    printed = run(tmp_path, TORCHRUN, "fsdp2.py")
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


def test_gan(tmp_path: Path) -> None:
    printed = run(tmp_path, TORCHRUN, "gan.py")
    before, after = (float(d) for d in re.findall(r"distance from the ring ([\d.]+)", printed))
    assert before > 1.5
    assert after < before / 2
    assert printed.splitlines()[-1] == "updates: discriminator 150, generator 150"
