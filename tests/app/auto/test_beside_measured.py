"""After its first steps a training tells what was predicted beside what it measured."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from commands import QUICK_PROFILE, command_line

SMALL = [
    "train", "data=path", "data.seq_len=64", "data.validation_fraction=0.2", "model.num_layers=3",
    "model.width=96", "model.num_heads=2", "accum.effective_batch_size=8",
    "accum.micro_batch_size=2", "optim.schedule.warmup=1", "train.steps=6",
    "train.validation_samples=4", "loader.workers=1", "device=cpu", "checkpoint.keep=0",
]  # fmt: skip
UNITS = {"KiB": 2**10, "MiB": 2**20}


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(["parallel=single"], marks=pytest.mark.nightly),
        ["parallel=single", "nn.checkpoint=true", "precision=bf16"],
        ["parallel=single", "accum.on_oom=shrink"],
        pytest.param(["launch.nproc_per_node=2", "parallel=ddp"], marks=pytest.mark.nightly),
        ["launch.nproc_per_node=2", "parallel=ddp", "accum.on_oom=shrink"],
        ["launch.nproc_per_node=2", "parallel=fsdp", "accum.sync=gather_once", "precision=bf16"],
    ],
    ids=" ".join,
)
def test_memory(words: list[str], tmp_path: Path) -> None:
    """Within a tenth, as is promised."""
    text = "".join(chr(97 + i * i % 26) for i in range(8000))
    (tmp_path / "text.txt").write_text(text)
    done = command_line(
        [*SMALL, f"data.path={tmp_path / 'text.txt'}", "data.cache_dir=cache", *words], tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.findall(
        r"^plan: peak memory ([\d.]+) (\w+) predicted \((.+)\), ([\d.]+) (\w+) measured$",
        done.stdout,
        re.M,
    )
    assert len(found) == 1, done.stdout
    ((predicted, unit, moment, measured, other),) = found
    assert float(predicted) * UNITS[unit] == pytest.approx(float(measured) * UNITS[other], rel=0.1)
    assert moment.startswith(("the ", "a "))


def test_times_where_speeds_are_known(tmp_path: Path) -> None:
    """Whatever they are: no test compares times."""
    (tmp_path / "text.txt").write_text("".join(chr(97 + i * i % 26) for i in range(8000)))
    data = [f"data.path={tmp_path / 'text.txt'}", "data.cache_dir=cache", "parallel=single"]
    measured = command_line(["profile", *SMALL[1:], *data], tmp_path, QUICK_PROFILE)
    assert measured.returncode == 0, measured.stderr
    done = command_line([*SMALL, *data, "machine=machine.json"], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"; a step [\d.e-]+ s predicted, [\d.e-]+ s measured$", done.stdout, re.M), (
        done.stdout
    )
    refused = command_line([*SMALL, *data, "machine=none.json"], tmp_path)
    assert refused.returncode == 2
    assert "none.json" in refused.stderr
