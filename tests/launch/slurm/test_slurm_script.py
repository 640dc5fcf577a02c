"""`launch=slurm` up to sbatch: the scripts, what is refused, and sbatch's own answer. No
cluster."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from distaccum.cli import main
from distaccum.errors import ConfigError
from distaccum.launch.overrides import override
from distaccum.launch.settings import seconds_of

HERE = Path(__file__).parent
ONE = [
    "launch=slurm",
    "launch.dry_run=true",
    "launch.python=/opt/python",
    "run_dir=runs/one",
    "train.steps=5",
]
SWEEP = ["--multirun", *ONE[:3], "hydra.sweep.dir=sweeps/two", "optim.lr=0.1,0.2"]

SCRIPTS = {
    "one": ONE,
    "gpus": [
        *ONE, "launch.nodes=2", "launch.gpus_per_node=4", "launch.cpus_per_task=8",
        "launch.time=1:30:00", "launch.partition=big", "launch.account=me", "launch.qos=high",
        "launch.memory=64G", "parallel=fsdp", "launch.constraint='[a100|h100]'",
    ],
    "torchrun": [
        *ONE, "launch.launcher=torchrun", "launch.nodes=2", "launch.tasks_per_node=2",
        "launch.requeue=false", "launch.signal_s=0",
    ],
    "setup": [
        *[word for word in ONE if "run_dir" not in word], "run_dir='runs/100% me'",
        "launch.setup=['module load cuda','export NCCL_DEBUG=WARN']",
        "launch.extra=['--exclusive']", "logger.run_name='$HOME'",
    ],
    "config_dir": [*ONE, "--config-dir=more", "--config-name=mine"],
    "array": [*SWEEP, "launch.array_parallel=1", "launch.time=2-0"],
}  # fmt: skip


def command(word: str, *arguments: str) -> int:
    """The exit code of the command line, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["distaccum", word, *arguments])
        with pytest.raises(SystemExit) as end:
            main()
    assert isinstance(end.value.code, int)
    return end.value.code


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_allocation: None) -> None:
    """A folder of the test's own, outside of any batch job."""
    monkeypatch.chdir(tmp_path)


def fake_sbatch(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    (folder / "bin").mkdir()
    (folder / "bin" / "sbatch").write_text(f"#!/bin/bash\n{text}\n")
    (folder / "bin" / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The script word by word. It is shown, written, and good bash."""
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "mine.yaml").write_text("defaults: [config, _self_]\n")
    assert command("train", *SCRIPTS[name]) == 0
    (script,) = tmp_path.glob("*/*/job.sbatch")
    text = script.read_text()
    assert text in capsys.readouterr().out
    golden = HERE / "golden" / f"{name}.sbatch"
    assert text.replace(str(tmp_path), "/FOLDER") == golden.read_text()
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_overrides_reach_the_program_as_they_were_written(tmp_path: Path) -> None:
    """Whatever a shell or Hydra would make of them; what the script itself says is left out."""
    written = ["data.path='a b'", "logger.run_name='$HOME;#'", "data.cache_dir='it\\'s'"]
    assert command("verify", *ONE, *written, "launch.nodes=2", "++launch.nodes=3") == 0
    text = (tmp_path / "runs" / "one" / "job.sbatch").read_text()
    assert "command=verify\n" in text
    (line,) = [line for line in text.splitlines() if line.startswith("overrides=")]
    assert shlex.split(line[len("overrides=(") : -1]) == ["train.steps=5", *written]


@pytest.mark.parametrize("folder", ["epoch=3", "a  b", "it's", 'a "b" $HOME `c` %j;'])
def test_a_run_folder_reaches_the_program_whatever_its_name(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through sbatch's script and its shell, as one override that Hydra reads as this very
    folder."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "srun").write_text('#!/bin/bash\nprintf "%s\\0" "$@" >arguments\n')
    (tmp_path / "bin" / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    assert command("train", *ONE[:3], override("run_dir", folder)) == 0
    script = tmp_path / folder / "job.sbatch"
    subprocess.run(["bash", str(script)], check=True)
    last = (tmp_path / "arguments").read_text().split("\0")[-2]
    assert OverridesParser.create().parse_override(last).value() == str(tmp_path / folder)
    (log,) = [
        line for line in script.read_text().splitlines() if line.startswith("#SBATCH --output=")
    ]
    assert shlex.split(log)[1] == f"--output={tmp_path}/{folder.replace('%', '%%')}/job.log"


@pytest.mark.parametrize("folder", ["a\\b", "a\nb"])
def test_a_run_folder_that_sbatch_cannot_name_is_refused(
    folder: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert command("train", *ONE[:3], override("run_dir", folder)) == 2
    assert "launch=slurm cannot pass the run folder" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "letter"),
    [
        (["launch.time=90"], r"launch\.time \(90\) is not a time limit"),
        (["launch.time='90'"], "A bare number is refused"),
        (["launch.time=soon"], r"Write hours:minutes:seconds"),
        (["launch.time=2:30"], r"launch\.signal_s \(120\) leaves nothing of launch\.time \(2:30\)"),
        (["launch.nodes=0"], r"launch\.nodes \(0\) must be 1 or more"),
        (["launch.signal_s=-1"], r"launch\.signal_s \(-1\)"),
        (["launch.gpus_per_node=2", "launch.tasks_per_node=3"], "each rank needs a GPU of its own"),
        (["launch.extra=[exclusive]"], r"launch\.extra contains 'exclusive'"),
        (["launch.launcher=mpi"], r"launch\.launcher"),
        (["+launch.node=2"], r"There is no key launch\.node\. Did you mean launch\.nodes"),
        (["accum.micro_batch_size=four"], r"accum\.micro_batch"),
        (["experiment=cluster", "--config-dir=more"], r"into a file of conf/launch/"),
        (["--multirun", "launch.nodes=1,2"], r"the jobs differ in launch\.nodes"),
        (["--multirun", "train.log_every_steps=1,0"],
        r"nothing was submitted, because 1 of 2 jobs"), (["--multirun", "launch=slurm,local",
        "launch.nodes=1"], r"launch"), (["--multirun", "hydra/launcher=submitit_slurm",
        "optim.lr=1,2"], r"Use launch=slurm, or leave it out"), (["--multirun",
        "hydra/sweeper=optuna", "optim.lr=interval(0.1,1)"],
        r"chooses each by the results of those"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore")  # of optuna, at its import
def test_refusals(
    arguments: list[str],
    letter: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake_sbatch(tmp_path, monkeypatch, "touch submitted; echo 7")
    (tmp_path / "more" / "experiment").mkdir(parents=True)
    (tmp_path / "more" / "experiment" / "cluster.yaml").write_text(
        "# @package _global_\nexperiment: cluster\nlaunch: {nodes: 2}\n"
    )
    assert command("train", "launch=slurm", *arguments) in (1, 2)
    told = "".join(capfd.readouterr())
    assert re.search(letter, told), told
    assert "Traceback" not in told
    assert not (tmp_path / "submitted").exists()


def test_where_nothing_can_be_submitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert command("train", "launch=slurm") == 2
    assert "launch=slurm needs sbatch, which is not on PATH" in capfd.readouterr().err
    fake_sbatch(
        tmp_path, monkeypatch, "echo 'sbatch: error: invalid partition specified: big' >&2; exit 1"
    )
    assert command("train", "launch=slurm") == 1
    assert capfd.readouterr().err == "sbatch: error: invalid partition specified: big\n"
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    assert command("train", "launch=slurm") == 2
    assert "launch=slurm inside SLURM job 12 would submit another job" in capfd.readouterr().err


def test_plan_submits_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    fake_sbatch(tmp_path, monkeypatch, "touch submitted; echo 7")
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    small = [
        "data=path",
        "data.path=text.txt",
        "data.seq_len=16",
        f"data.cache_dir={tmp_path}",
        "accum.effective_batch_size=8",
    ]
    assert (
        command(
            "plan", "launch=slurm", "launch.nodes=2", "launch.gpus_per_node=2", "device=cpu", *small
        )
        == 0
    )
    assert "ranks 4, " in " ".join(capfd.readouterr().out.split())
    assert not (tmp_path / "submitted").exists()


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30:00", 1800),
        ("1:30:00", 5400),
        ("2-0", 172800),
        ("1-2:30", 95400),
        ("1-2:30:10", 95410),
        ("UNLIMITED", None),
    ],
)
def test_times(text: str, seconds: int | None) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "1:", "1-", "1:2:3:4", "1:30:00h", 5400, 1.5, True])
def test_what_is_no_time(text: object) -> None:
    with pytest.raises(ConfigError, match=r"launch\.time"):
        seconds_of(text)
