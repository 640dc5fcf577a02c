"""The command line on real text: what it prints, what it writes, and that it trains the same
whatever the ranks."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import command_line
from safetensors.torch import load_file

SMALL = [
    "experiment=demo", "train.steps=6", "train.log_every_steps=2", "train.validate_every_steps=4",
    "train.validation_samples=8", "optim.schedule.warmup=2", "data.seq_len=32",
    "model.num_layers=2", "model.width=32", "accum.effective_batch_size=10",
    "accum.micro_batch_size=2", "model.dropout=0.1",
]  # fmt: skip


def run(
    command: list[str], folder: Path, timeout_s: float = 90
) -> subprocess.CompletedProcess[str]:
    """A real process in another folder than the repository's."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_SILENT": "true"}
    return subprocess.run(
        command,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def records(folder: Path, kind: str) -> list[dict[str, object]]:
    """The records of the only run in a folder."""
    (metrics,) = folder.glob("runs/*/*/metrics.jsonl")
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


@pytest.fixture(scope="module")
def torchrun_fsdp(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Two ranks of torchrun, FSDP2 that keeps parameters, with W&B offline. 5 micro-batches of 2 on
    2 ranks: uneven."""
    folder = tmp_path_factory.mktemp("fsdp")
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "-m",
        "distaccum",
        "train",
    ]
    return folder, run(
        [*torchrun, *SMALL, "parallel=fsdp", "accum.sync=gather_once", "logger=wandb"], folder
    )


@pytest.fixture(scope="module")
def own_ranks_ddp(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Two ranks that the command line starts itself, DDP."""
    folder = tmp_path_factory.mktemp("ddp")
    return folder, command_line(["train", *SMALL, "launch.nproc_per_node=2"], folder)


def test_torchrun_tells_what_it_does(
    torchrun_fsdp: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, done = torchrun_fsdp
    assert done.returncode == 0, done.stderr
    out = done.stdout
    assert "\r" not in out  # no bar in a log
    out = " ".join(out.split())  # lines are wrapped
    assert (
        "10 samples in uneven micro-batches: at most 2 sample(s) x 3 accumulation step(s) x 2"
        " rank(s) (320 tokens) per optimizer step" in out
    )
    assert "fsdp, 2 rank(s) on cpu, gloo" in out
    assert " per epoch" in out
    assert "each gradient crossed the network once" in out
    assert "step 2/6" in out
    assert out.count("validation loss") >= 2
    assert "by frequency alone" in out
    assert "all 6 steps done" in out
    (run_folder,) = folder.glob("runs/*/*")
    assert f"run folder: {run_folder}" in out
    assert (run_folder / "curve.png").stat().st_size > 5000
    assert (run_folder / ".hydra" / "overrides.yaml").is_file()
    assert list(run_folder.glob("wandb/offline-run-*/run-*.wandb"))


def test_forecast_and_count_are_recorded(
    torchrun_fsdp: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, _ = torchrun_fsdp
    (start,) = records(folder, "start")
    assert start["plan"]["effective_batch_size"] == 10
    # Two blocks and the root: three groups, gathered once and reduced once; one row of control
    # numbers.
    assert start["forecast"]["counts"] == {"all_gather": 3, "reduce_scatter": 3, "all_reduce": 1}
    steps = records(folder, "step")
    assert [step["samples"] for step in steps] == [10, 20, 30, 40, 50, 60]
    assert all(step["denominator"] == 320 for step in steps)


def test_ddp_started_by_ourselves_trains_the_same(
    torchrun_fsdp: tuple[Path, subprocess.CompletedProcess[str]],
    own_ranks_ddp: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    """Float32: sums of some thousand terms in another order differ by some 1e-6 relatively."""
    folder, done = own_ranks_ddp
    assert done.returncode == 0, done.stderr
    assert "ddp, 2 rank(s) on cpu, gloo" in done.stdout
    for kind in ("step", "validation"):
        ours, theirs = records(folder, kind), records(torchrun_fsdp[0], kind)
        assert [r["step"] for r in ours] == [r["step"] for r in theirs]
        for one, other in zip(ours, theirs, strict=True):
            assert math.isclose(one["loss"], other["loss"], rel_tol=1e-5)
            if kind == "step":
                assert math.isclose(one["grad_norm"], other["grad_norm"], rel_tol=1e-4)


def test_one_process_trains_the_same(
    own_ranks_ddp: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    done = command_line(["train", *SMALL, "loader.workers=0"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "nothing, as there is only one process" in done.stdout
    for one, other in zip(
        records(tmp_path, "step"), records(own_ranks_ddp[0], "step"), strict=True
    ):
        assert math.isclose(one["loss"], other["loss"], rel_tol=1e-5)


def test_divergence_is_told_once_and_nothing_hangs(tmp_path: Path) -> None:
    command = ["train", *SMALL, "launch.nproc_per_node=2", "optim.lr=1e30", "optim.clip_norm=null"]
    done = command_line([*command, "optim.schedule.warmup=0"], tmp_path)
    assert done.returncode == 1
    (letter,) = [line for line in done.stderr.splitlines() if not line.startswith("[rank")]
    assert letter.startswith("error: Step ")
    assert letter.endswith("Nothing was updated.")
    assert records(tmp_path, "end")[0]["exit_code"] == 1


@pytest.mark.parametrize(
    ("overrides", "letter"),
    [
        (["accum.micro_batches=4"], "accum.micro_batches"),
        (
            ["+accum.micro_size=4"],
            "There is no key accum.micro_size. Did you mean accum.micro_batch_size?",
        ),
        (
            ["parallel=fsdp", "accum.sync=reduce_scatter"],
            "sync='reduce_scatter' is not supported by fsdp",
        ),
    ],
)
def test_a_users_mistake_is_one_letter_and_exit_code_2(
    tmp_path: Path, overrides: list[str], letter: str
) -> None:
    done = command_line(["train", *SMALL, *overrides], tmp_path)
    assert done.returncode == 2
    assert letter in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert len(done.stderr.strip().splitlines()) <= 6


def test_words_that_are_no_command(tmp_path: Path) -> None:
    done = command_line(["trian"], tmp_path)
    assert (done.returncode, "usage: distaccum train" in done.stderr) == (2, True)
    done = command_line(["--help"], tmp_path)
    assert (done.returncode, "usage: distaccum train" in done.stdout) == (0, True)


def test_export_and_back(
    own_ranks_ddp: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    """Weights that begin a training whose steps are too small for float32 to see end it with the
    same bits."""
    (run_dir,) = own_ranks_ddp[0].glob("runs/*/*")
    for target in ("first.safetensors", "first.safetensors"):
        done = command_line(["export", str(run_dir), target], tmp_path)
    assert (done.returncode, "already exists" in done.stderr) == (1, True)
    done = command_line(
        ["train", *SMALL, "init_weights=first.safetensors", "optim.lr=1e-30", "run_dir=second"],
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    done = command_line(["export", "second", "again.safetensors"], tmp_path)
    assert (done.returncode, "(saved after step 6) to again.safetensors" in done.stdout) == (
        0,
        True,
    ), done.stderr
    first, again = (load_file(tmp_path / f"{name}.safetensors") for name in ("first", "again"))
    assert len(first) > 10
    assert first.keys() == again.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name]), name
    done = command_line(["export", "second", "folder"], tmp_path)
    assert (done.returncode, "Give a file: folder.safetensors" in done.stderr) == (2, True)
