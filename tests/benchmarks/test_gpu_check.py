"""The GPU check on a machine without a GPU: what gloo can do is done, and what cannot run is never
called passed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
for folder in ("benchmarks", "tests/support"):
    sys.path.insert(0, str(ROOT / folder))

import gpu_check  # noqa: E402
import gpu_ranks  # noqa: E402


def start(
    folder: Path, missing: tuple[str, ...], *arguments: str
) -> subprocess.CompletedProcess[str]:
    """The script on a machine where some packages are missing."""
    for name in missing:
        (folder / f"{name}.py").write_text("raise ModuleNotFoundError('not on this machine')")
    return subprocess.run(
        [str(ROOT / "scripts" / "gpu_check.sh"), *arguments],
        env={**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(folder),
        "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip


def test_without_numpy_it_says_how_to_bring_it(tmp_path: Path) -> None:
    done = start(tmp_path, ("numpy",))
    assert done.returncode == 1
    assert "--download DIR" in done.stderr


def test_dry_run_with_torch_and_numpy_alone(tmp_path: Path) -> None:
    missing = (
        "hydra",
        "omegaconf",
        "antlr4",
        "yaml",
        "matplotlib",
        "wandb",
        "pytest",
        "hypothesis",
    )
    done = start(tmp_path, missing, "--device", "cpu", "--tiny", "--out", str(tmp_path / "out"))
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    (file,) = (tmp_path / "out").glob("gpu-cpu-*.json")
    report = json.loads(file.read_text())
    assert report["dry run"] is True
    assert report["machine"]["device"] == "CPU"
    checks = {(check["check"], check["ranks"]): check for check in report["checks"]}
    assert {name: check["status"] for name, check in checks.items()} == {
        ("numerics", 1): "passed", ("numerics", 2): "passed", ("bf16", 1): "passed", ("bf16",
        2): "passed", ("speed and memory", 1): "passed", ("host syncs", 1): "not run",
    }  # fmt: skip
    for ranks, strategies in ((1, {"single", "ddp", "fsdp"}), (2, {"ddp", "fsdp", "hsdp"})):
        figures = checks["numerics", ranks]["figures"]
        assert {name.split()[0] for name in figures} - {"worst", "windows,"} == strategies
        assert 0 < figures["worst"] <= 1e-12
        assert figures["windows, each as the ledger forecast"] >= 30
        assert (
            checks["bf16", ranks]["figures"]["update of 512 equal micro-batches, fsdp boundary"]
            == 1.0
        )
    assert checks["host syncs", 1]["reasons"] == ["torch.cuda.set_sync_debug_mode needs CUDA"]
    assert 0.3 < checks["speed and memory", 1]["figures"]["ratio of tokens/s, ours to by hand"] < 3
    assert "5 passed, 0 failed, 1 not run" in done.stdout


def raising(place: gpu_ranks.Place) -> gpu_ranks.Found:
    raise ValueError(f"fault on rank {place.rank}")


def test_a_rank_that_fails_is_named() -> None:
    job = gpu_ranks.Job(1, {"first": raising, "second": raising}, limit_s=60, group=False)
    found = gpu_ranks.run(job, "cpu", tiny=True)
    assert found["first"].failures == [
        "rank 0: ValueError: fault on rank 0 [gpu_ranks.py:" + _line("part(Place")
    ]
    assert "no answer" in found["second"].failures[0]


def _line(text: str) -> str:
    """Where the runner calls a part, and where the part raises."""
    runner = (ROOT / "benchmarks" / "gpu_ranks.py").read_text().splitlines()
    here = Path(__file__).read_text().splitlines()
    call = next(i for i, line in enumerate(runner, 1) if text in line)
    fault = next(i for i, line in enumerate(here, 1) if "raise ValueError" in line)
    return f"{call} _rank > test_gpu_check.py:{fault} raising]"


def _main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["gpu_check", *arguments])
    return gpu_check.main()


def test_failure_is_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def one_fails(job: gpu_ranks.Job, device_type: str, tiny: bool) -> dict[str, gpu_ranks.Found]:
        return {
            name: gpu_ranks.Found(failures=["too far off"] * (name == "bf16")) for name in job.parts
        }

    monkeypatch.setattr(gpu_ranks, "run", one_fails)
    assert _main(monkeypatch, "--device", "cpu", "--tiny", "--out", str(tmp_path)) == 1
    printed = capsys.readouterr().out
    assert "FAILED: bf16 on 1 rank(s)\nFAILED: bf16 on 2 rank(s)\n" in printed
    assert "3 passed, 2 failed, 1 not run" in printed


def test_without_a_gpu_nothing_passes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert _main(monkeypatch, "--out", str(tmp_path)) == 1
    printed = capsys.readouterr().out
    assert "0 passed, 0 failed, 7 not run" in printed
    assert "torch sees no GPU here" in printed
    assert not list(tmp_path.iterdir())  # no report of nothing
