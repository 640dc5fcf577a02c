"""`distaccum profile` as a user runs it: what it writes is there and can be read, however fast the
machine is."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import QUICK_PROFILE, command_line

from distaccum.planner.hardware import KINDS, HardwareProfile

SMALL = [
    "model.num_layers=1",
    "model.num_heads=2",
    "model.width=16",
    "data.seq_len=16",
    "device=cpu",
]


def test_alone(tmp_path: Path) -> None:
    done = command_line(
        ["profile", *SMALL, "accum.micro_batch_size=auto", "nn.checkpoint=true", "precision=bf16"],
        tmp_path,
        QUICK_PROFILE,
    )
    assert done.returncode == 0, done.stderr
    machine = HardwareProfile.load(tmp_path / "machine.json")
    assert (machine.device, machine.ranks, machine.threads) == ("cpu", 1, 1)
    assert (machine.precision, machine.links, machine.overlaps) == ("bf16", {}, False)
    assert machine.model.startswith("gpt, ")
    assert "1 rank(s) on cpu" in done.stdout
    assert "all-reduce" not in done.stdout
    assert "written to machine.json" in done.stdout


def test_on_two_ranks_into_the_same_file_again(tmp_path: Path) -> None:
    """Whatever the strategy: a machine is measured on whole models."""
    path = tmp_path / "mine.json"
    HardwareProfile("gpu", 9, "-", "-", 0.0, 1.0, 1.0, 1, {}, True, {}, "-").save(path)
    words = [
        "accum.micro_batch_size=1",
        "parallel=fsdp",
        "launch.nproc_per_node=2",
        f"machine={path}",
    ]
    done = command_line(["profile", *SMALL, *words], tmp_path, QUICK_PROFILE)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    machine = HardwareProfile.load(path)
    assert (machine.device, machine.ranks, machine.precision) == ("cpu", 2, "fp32")
    assert set(machine.links) == set(KINDS)
    for link in machine.links.values():
        assert link.sizes == tuple(2**power for power in (12, 14, 16, 18))[: len(link.sizes)]
        # a message that takes long is the last one
        assert len(link.sizes) == 4 or link.seconds[-1] >= 0.1
    assert "reduce-scatter" in done.stdout
    assert not (tmp_path / "machine.json").exists()


@pytest.mark.parametrize(
    ("name", "letter"),
    [
        (".", "machine=. cannot be read: Is a directory. Name a file"),
        (
            "train.py",
            (
                "machine=train.py was not written by `distaccum profile`, or is damaged: it is not "
                "JSON"
            ),
        ),
        ("none/machine.json", "machine=none/machine.json: there is no folder none. Create it"),
    ],
)
def test_only_a_file_of_its_own_is_replaced(tmp_path: Path, name: str, letter: str) -> None:
    (tmp_path / "train.py").write_text("import torch\n")
    ranks = 2 if name == "train.py" else 1
    done = command_line(
        ["profile", *SMALL, f"machine={name}", f"launch.nproc_per_node={ranks}"], tmp_path
    )
    assert done.returncode == 2, done.stderr
    assert letter in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "train.py").read_text() == "import torch\n"
