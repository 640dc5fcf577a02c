"""The learning rate as `train` sets it and `plan` draws it."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import command_line

from distaccum.metrics.run_log import read_metrics

SMALL = [
    "data=path", "data.seq_len=16", "model.num_layers=1", "model.num_heads=2", "model.width=16",
    "loader.workers=0", "train.validation_samples=2", "data.validation_fraction=0.2",
    "checkpoint.keep=0", "device=cpu", "parallel=single", "optim.lr=1.0", "optim.clip_norm=0.001",
]  # fmt: skip


@pytest.fixture
def text(tmp_path: Path) -> list[str]:
    """A text of 15 training samples of 16 tokens, and the overrides that read it."""
    file = tmp_path / "text.txt"
    file.write_text("the quick brown fox jumps over the lazy dog " * 7)
    return [f"data.path={file}", f"data.cache_dir={tmp_path / 'cache'}"]


def trained(folder: Path, *overrides: str) -> tuple[list[float], str]:
    """The learning rates of a run, and what it printed."""
    folder.mkdir()
    done = command_line(["train", *SMALL, *overrides, f"run_dir={folder / 'run'}"], folder)
    assert done.returncode == 0, done.stderr
    records = read_metrics(folder / "run" / "metrics.jsonl")
    return [float(str(record["lr"])) for record in records if record["kind"] == "step"], done.stdout


def drawn(folder: Path, *overrides: str) -> str:
    """The curve of the learning rate that `plan` draws."""
    done = command_line(["plan", *SMALL, *overrides], folder)
    assert done.returncode == 0, done.stderr
    return done.stdout.partition("\nlearning rate\n")[2]


def test_tokens_with_dropped_windows_reach_the_end_of_the_curve(
    tmp_path: Path, text: list[str]
) -> None:
    """15 samples and windows of 8: each epoch drops 7, which nobody counts as tokens consumed."""
    curve = [
        "optim.schedule.name=linear",
        "optim.schedule.final_ratio=0",
        "optim.schedule.warmup=0",
        *text,
    ]
    curve += [
        "accum.effective_batch_size=8",
        "accum.micro_batch_size=8",
        "accum.last_window=drop",
        "train.steps=4",
    ]
    rates, out = trained(tmp_path / "tokens", *curve, "optim.schedule.unit=tokens")
    assert "4 steps, 4.00 epochs" in out
    assert rates == [1.0, 0.75, 0.5, 0.25]
    assert drawn(tmp_path, *curve, "optim.schedule.unit=tokens") == drawn(tmp_path, *curve)


@pytest.mark.parametrize("unit", ["steps", "samples", "tokens"])
def test_a_training_of_three_steps_needs_no_other_warmup(
    tmp_path: Path, text: list[str], unit: str
) -> None:
    words = [*text, "train.steps=3", "accum.effective_batch_size=4", f"optim.schedule.unit={unit}"]
    rates, out = trained(tmp_path / "run", *words)
    assert len(rates) == 3
    assert rates[0] == 1.0 == max(rates)
    assert "warm-up none (auto: a tenth of the training, at most 20 steps)" in " ".join(out.split())


@pytest.mark.parametrize("unit", ["steps", "samples", "tokens"])
def test_the_automatic_warmup_is_so_many_whole_steps(
    tmp_path: Path, text: list[str], unit: str
) -> None:
    words = [*text, "train.steps=20", "accum.effective_batch_size=4", f"optim.schedule.unit={unit}"]
    rates, out = trained(tmp_path / "run", *words)
    assert rates[0] < 1 == rates[2] == max(rates)
    told = {"steps": "2 steps", "samples": "8 samples", "tokens": "128 tokens"}[unit]
    assert f"warm-up {told} (auto: a tenth of the training, at most 20 steps)" in " ".join(
        out.split()
    )
    assert f"warm-up {told} (auto" in " ".join(
        command_line(["plan", *SMALL, *words], tmp_path).stdout.split()
    )


def test_a_resumed_run_says_that_the_automatic_warmup_is_another_one(
    tmp_path: Path, text: list[str]
) -> None:
    words = ["train", *SMALL, *text, "checkpoint.keep=1", f"run_dir={tmp_path / 'run'}"]
    for steps, told in (
        ("10", ""),
        ("12", "train.steps 10 -> 12"),
        ("20", "optim.schedule.warmup 1 -> 2"),
    ):
        done = command_line([*words, f"train.steps={steps}"], tmp_path)
        assert done.returncode == 0, done.stderr
        assert told in done.stdout
        assert ("optim.schedule.warmup" in done.stdout) is (steps == "20")
