"""`accum.micro_batch_size=auto` on the command line: what is printed, that nothing else changes,
and how such a run goes on."""

from __future__ import annotations

import json
import random
import shutil
import string
from pathlib import Path
from typing import Any

import pytest
from commands import command_line
from safetensors.torch import load_file

SMALL = [
    "data=path", "data.seq_len=16", "data.validation_fraction=0.2", "model.num_layers=1",
    "model.width=16", "model.num_heads=2", "model.dropout=0.1", "accum.effective_batch_size=12",
    "optim.schedule.warmup=1", "train.steps=4",
    "train.validation_samples=4", "loader.workers=0", "device=cpu", "checkpoint.every.steps=2",
    "checkpoint.best=false", "launch.nproc_per_node=2", "parallel=fsdp", "accum.sync=boundary",
]  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """30 samples or so."""
    folder, letters = tmp_path_factory.mktemp("text"), random.Random(0)
    (folder / "text.txt").write_text(
        "".join(letters.choice(string.ascii_letters) for _ in range(16 * 38))
    )
    return [f"data.path={folder}", f"data.cache_dir={tmp_path_factory.mktemp('cache')}"]


def run(folder: Path, *overrides: str) -> str:
    """A start in this run folder: what it printed, in one line."""
    folder.mkdir(parents=True, exist_ok=True)
    done = command_line([*overrides, f"run_dir={folder / 'run'}"], folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return " ".join(done.stdout.split())


def ended(folder: Path) -> dict[str, Any]:
    """All bits of the last checkpoint."""
    (newest,) = (folder / "run" / "checkpoints").glob("step-00000004")
    tensors = {
        f"{file.name} {name}": tensor.numpy().tobytes()
        for file in sorted(newest.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }
    assert tensors
    return tensors


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, text: list[str]) -> tuple[Path, str]:
    """A run that has found its micro-batch size: of 1 to 6 samples a rank, as the limit lets it."""
    folder = tmp_path_factory.mktemp("auto")
    return folder, run(
        folder, "train", *SMALL, *text, "accum.micro_batch_size=auto", "limits.memory=420KiB"
    )


def micro_batch_of(out: str) -> int:
    """The number in the line that tells it."""
    return int(out.split("accum.micro_batch_size=auto: ")[1].split(maxsplit=1)[0])


def test_it_is_told_and_the_rest_is_that_of_a_number(
    trained: tuple[Path, str], text: list[str], tmp_path: Path
) -> None:
    folder, out = trained
    micro_batch = micro_batch_of(out)
    assert micro_batch == 4, out
    # 12 samples have no micro-batches of 5
    assert "KiB of 399.0 KiB; 6 did not), found by 4 dry runs" in out
    assert (
        "12 samples in uneven micro-batches: at most 4 sample(s) x 2 accumulation step(s) x 2"
        " rank(s)" in out
    )
    run(tmp_path, "train", *SMALL, *text, f"accum.micro_batch_size={micro_batch}")
    assert ended(tmp_path) == ended(folder)


def test_it_goes_on_bit_for_bit_without_looking_again(
    trained: tuple[Path, str], text: list[str], tmp_path: Path
) -> None:
    """From the checkpoint in the middle; on other ranks it looks again."""
    folder, out = trained
    for again in ("same", "other"):
        shutil.copytree(folder / "run", tmp_path / again / "run")
        shutil.rmtree(tmp_path / again / "run" / "checkpoints" / "step-00000004")
    overrides = ["train", *SMALL, *text, "accum.micro_batch_size=auto", "limits.memory=420KiB"]
    same = run(tmp_path / "same", *overrides)
    assert "continues after step 2" in same
    kept = (
        f"accum.micro_batch_size=auto: {micro_batch_of(out)} samples, as found before; no dry run "
        "was needed"
    )
    assert kept in same
    assert ended(tmp_path / "same") == ended(folder)
    other = run(tmp_path / "other", *overrides, "launch.nproc_per_node=1", "limits.memory=600KiB")
    assert "continues after step 2" in other
    assert "found again, because the ranks or settings changed" in other
    assert "the effective batch is unchanged" in other


def test_it_is_proven(text: list[str], tmp_path: Path) -> None:
    out = run(
        tmp_path, "verify", *SMALL, *text, "accum.micro_batch_size=auto", "limits.memory=420KiB"
    )
    assert "did not), found by " in out
    assert json.loads((tmp_path / "run" / "verify.json").read_text())["holds"]


def test_too_little_memory_is_a_letter_of_the_user(text: list[str], tmp_path: Path) -> None:
    overrides = [
        "train",
        *SMALL,
        *text,
        "accum.micro_batch_size=auto",
        "limits.memory=100KiB",
        f"run_dir={tmp_path / 'run'}",
    ]
    done = command_line(overrides, tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "not even 1 sample fits" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
