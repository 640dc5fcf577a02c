"""The house itself: the wheel works elsewhere, importing is light, the heart is small."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(command: list[str], folder: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=90,
        check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of commands of an environment with the wheel and its dependencies, and without the
    repository."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    run(
        [
            *pip,
            "wheel",
            "--no-deps",
            "--no-build-isolation",
            "--no-index",
            "-w",
            str(folder),
            str(ROOT),
        ],
        folder,
    )
    (wheel,) = folder.glob("distaccum-*.whl")
    environment = folder / "environment"
    venv.create(environment, symlinks=True)
    # Dependencies are taken from where the tests run; an editable install there is not seen through
    # such a file.
    site = next((environment / "lib").glob("python*")) / "site-packages"
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = environment / "bin" / "python"
    run(
        [
            sys.executable,
            "-m",
            "pip",
            "--python",
            str(python),
            "install",
            "--quiet",
            "--no-deps",
            "--no-index",
            str(wheel),
        ],
        folder,
    )
    return environment / "bin"


SMALL = [
    "train.steps=2", "train.validation_samples=4", "optim.schedule.warmup=0", "data.seq_len=16",
    "model.num_layers=1", "model.width=16", "loader.workers=0", "accum.micro_batch_size=2",
]  # fmt: skip


def test_the_wheel_runs_from_another_folder(installed: Path, tmp_path: Path) -> None:
    assert "all 2 steps done" in run([str(installed / "distaccum"), "train", *SMALL], tmp_path)


def test_the_wheel_is_a_module_and_brings_its_configuration(
    installed: Path, tmp_path: Path
) -> None:
    module = [str(installed / "python"), "-m", "distaccum", "train", *SMALL, "--info", "searchpath"]
    (row,) = [line for line in run(module, tmp_path).splitlines() if line.startswith("| main")]
    conf = next(installed.parent.glob("lib/python*/site-packages/distaccum/conf"))
    assert f"file://{conf} " in row


# All that `import distaccum` may load beyond `import torch` and its own files.
LIGHT = {"_decimal", "_statistics", "decimal", "fractions", "numbers", "shlex", "statistics"}


def test_importing_is_light() -> None:
    code = (
        "import sys, json, torch; torchs = set(sys.modules); import distaccum; "
        "print(json.dumps(sorted(set(sys.modules) - torchs)))"
    )
    added = json.loads(run([sys.executable, "-c", code], ROOT))
    assert [
        name for name in added if name.partition(".")[0] != "distaccum" and name not in LIGHT
    ] == []


def statements(file: Path) -> int:
    """How many statements a file has, docstrings not counted."""
    nodes = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.stmt)]
    return sum(
        not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)) for node in nodes
    )


def test_the_package_and_its_heart_are_small() -> None:
    """The heart is what a newcomer reads to see how a window becomes one update. Beside it stand
    the guards, which refuse what would be wrong, the ledger, and what wraps a model."""
    package = ROOT / "distaccum"
    beside = ("apply.py", "ledger.py", "precision.py", "sharded_checks.py")
    parallel = [file for file in (package / "parallel").glob("*.py") if file.name not in beside]
    core = [package / "core" / name for name in ("plan.py", "loss.py")]
    heart = [*core, *(package / "step").glob("*.py"), *parallel]
    assert sum(map(statements, heart)) <= 1075
    files = list(package.rglob("*.py"))
    assert sum(map(statements, files)) <= 10_650
    for file in files:
        assert len(file.read_text().splitlines()) <= 300, file


def test_the_top_holds_six_files_and_the_rooms_nine_layers() -> None:
    """Import-linter knows every room (`exhaustive`) and finds cycles; here the numbers that it must
    not grow to."""
    assert len(list((ROOT / "distaccum").glob("*.py"))) <= 6
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"][
        "contracts"
    ]
    (layers,) = [contract for contract in contracts if contract["type"] == "layers"]
    assert len(layers["layers"]) <= 9
    assert layers["exhaustive"]
    assert any(contract["type"] == "acyclic_siblings" for contract in contracts)


def test_private_names_of_torch_are_in_one_place() -> None:
    for file in (ROOT / "distaccum").rglob("*.py"):
        if file.parent.name == "_torch":
            continue
        for line in file.read_text().splitlines():
            code = line.partition("#")[0]
            for name in (
                "_fsdp",
                "_get_ddp",
                "_unsharded",
                "_sync_",
                "_in_backward",
                "_comm_hooks",
                "_auto_reshard",
            ):
                assert name not in code, (file, line)


# Translated or private phrases, and words for which the field has others (docs/decisions and the
# log keep theirs).
FORBIDDEN = [
    r"\btold\b",
    r"\bso many\b",
    r"\bas (it|they) (was|were)\b",
    r"\bstands?\b",
    r"\b(go|goes|going|went) on\b",
    r"\banew\b",
    r"(?<!-)\bby hand\b",
    r"\bfor want of\b",
    r"\bwithout a word\b",
    r"\bcome what may\b",
    r"\bletters?\b(?= (that|says|for))",
    r"\bas torch has it\b",
    r"(?<![.=])\bmicros?\b(?![-_.])",
    r"\bheld-out (loss|accuracy)\b",
    r"\brehears\w+",
    r"\bshortage\b",
    r'"""(The same|Of the|Of a|What|Whether|Nothing|In which|How|Where|Likewise)\b',
    r"\bLikewise\.",
]
PROSE = [
    "distaccum/**/*.py",
    "conf/**/*.yaml",
    "examples/*.py",
    "scripts/*.sh",
    "slurm/*",
    "docs/*.md",
    "*.md",
]
HISTORY = {"CHANGELOG.md", "log.md"}


def test_the_prose_has_no_forbidden_phrase() -> None:
    found = [
        f"{file.relative_to(ROOT)}:{number}: {match.group()}"
        for pattern in PROSE
        for file in sorted(ROOT.glob(pattern))
        if file.name not in HISTORY
        for number, line in enumerate(file.read_text().splitlines(), start=1)
        for phrase in FORBIDDEN
        if (match := re.search(phrase, line))
    ]
    assert found == []


def test_each_test_that_runs_at_night_has_its_reason() -> None:
    """A mark in a file that docs/testing.md does not name is one without a reason."""
    page = (ROOT / "docs" / "testing.md").read_text()
    mark = "mark." + "nightly"
    marked = [file for file in (ROOT / "tests").rglob("test_*.py") if mark in file.read_text()]
    assert len(marked) >= 5
    for file in marked:
        assert file.name in page, file
