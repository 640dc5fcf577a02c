"""docs/why.md says what benchmarks/why.py measures, names tests that exist, and shows code that
runs."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from commands import command_line

import distaccum as da

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "why.md").read_text(encoding="utf-8")


def test_the_page_has_the_table_that_the_script_prints(tmp_path: Path) -> None:
    done = command_line([], tmp_path, ROOT / "benchmarks" / "why.py")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout in PAGE
    rows = [line.strip("| \n").split(" | ") for line in done.stdout.splitlines()[2:]]
    assert [int(row[0]) for row in rows] == list(range(1, 11))
    # By arithmetic, whatever the page says. 1 / 28 of four digits is 0.03571.
    by_hand = {
        1: ("[1, 1.25]", "[1, 1, 1, 1]"), 2: ("[1, 0.25]", "[1, 1]"), 3: ("0.25", "0.03571"),
        4: ("0.05", "0.03571"), 5: ("4", "1"), 6: ("[1, 0.9375, 0.875, 0.8125, 0.75]",
        "[1, 0.75, 0.5, 0.25, 0]"), 7: ("[0.25, 0, 0, 0, 0]", "[1, 0.75, 0.5, 0.25, 0]"), 8: ("0.5",
        "1"), 9: ("0.25", "1"), 10: ("1.5", "3"),
    }  # fmt: skip
    for number, _, _, plain, right, ours in rows:
        assert (plain, right) == by_hand[int(number)]
        assert ours == right


def test_the_tests_that_the_page_names_exist() -> None:
    named = set(re.findall(r"`(test_\w+)`", PAGE))
    source = "".join(
        path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")
    )
    assert len(named) >= 10
    assert named <= set(re.findall(r"^def (test_\w+)\(", source, flags=re.MULTILINE))
    files = re.findall(r"`tests/(\w+/test_\w+\.py)`", PAGE)
    assert files
    assert all((ROOT / "tests" / file).is_file() for file in files)


def test_the_two_loops_of_the_page_run_and_agree_where_both_are_right(capsys) -> None:
    plain, ours = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    weights = []
    for code in (plain, ours):
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2, dtype=torch.float64)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        data = [
            (torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 1, 1, 0])) for _ in range(8)
        ]
        names = {
            "da": da, "torch": torch, "model": model, "optimizer": optimizer, "loader": data,
            "accumulation_steps": 4, "num_epochs": 1, "loss_fn": torch.nn.functional.cross_entropy,
            "objective": da.Classification(),
            "scheduler": torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=2),
        }  # fmt: skip
        exec(compile(code, "docs/why.md", "exec"), names)
        weights.append(model.weight.detach())
    # Two updates of a few operations on numbers near 1, in another order: some units of 2.2e-16.
    assert torch.allclose(weights[0], weights[1], rtol=1e-14, atol=1e-14)
    assert len(capsys.readouterr().out.splitlines()) == 4
