"""docs/precisions.md: its table is the stored one, its numbers keep derived bounds, its commands
and its loop work."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from worlds import World

import distaccum as da
from distaccum.app.config import Config, config_dir, typed
from distaccum.grads.accumulate import SumDtype

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import precisions  # noqa: E402
from precisions import CASES, Case  # noqa: E402

PAGE = (ROOT / "docs" / "precisions.md").read_text(encoding="utf-8")
STORED = json.loads(precisions.RESULTS.read_text(encoding="utf-8"))
FP32, BF16, FP16, PURE, SUMS, PURE_SUMS, REDUCED = CASES
MICRO_BATCHES = (1, 16)
# A gradient is made of sums of up to 32 tokens x 257 logits. Errors of 2^-24 that do not conspire
# grow by the root of the number of terms, 91, to 5e-6; conspiring ones would make 5e-4.
SINGLE = 1e-5
ROUNDOFF = 2.0**-8  # bfloat16


def on_rank(case: Case, cache_dir: str) -> dict[str, Any]:
    samples, _ = precisions.read_samples(2 * max(MICRO_BATCHES), cache_dir)
    return precisions.run(case, samples, MICRO_BATCHES)


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def samples(cache_dir: str) -> list[dict[str, torch.Tensor]]:
    return precisions.read_samples(2 * max(MICRO_BATCHES), cache_dir)[0]


@pytest.fixture(scope="module")
def rows(
    two_ranks: World, samples: list[dict[str, torch.Tensor]], cache_dir: str
) -> dict[Case, dict[str, Any]]:
    found = {}
    for case in CASES:
        ran = (
            precisions.run(case, samples, MICRO_BATCHES)
            if case.ranks == 1
            else two_ranks.run(on_rank, case, cache_dir)[0]
        )
        found[case] = precisions.row(case, ran, samples)
    return found


def spread(terms: list[np.ndarray[Any, Any]]) -> float:
    """How much larger the sum of the absolute terms is than the sum: what its rounding errors are
    measured by."""
    return float(np.linalg.norm(sum(np.abs(term) for term in terms)) / np.linalg.norm(sum(terms)))


def test_errors_keep_to_what_is_derived(
    rows: dict[Case, dict[str, Any]], samples: list[Any]
) -> None:
    gradients = [precisions.exact([sample]) for sample in samples]
    for num_micro_batches in MICRO_BATCHES:
        errors = {case: rows[case]["errors"][str(num_micro_batches)] for case in CASES}
        assert 0 < errors[FP32] < SINGLE
        # The same operations are rounded, to 11 bits and to 8: a ratio of 8, within a factor of 2
        # for chance.
        assert 4 * errors[FP16] < errors[BF16] < 16 * errors[FP16]
        # Rounded once more at the end, by up to 2^-8 of each number.
        assert errors[BF16] < errors[PURE] < 2 * errors[BF16] + ROUNDOFF
        # K numbers rounded on their way into the sum, K - 1 additions rounded (Higham, section
        # 4.2).
        rounded = ((1 + ROUNDOFF) ** num_micro_batches - 1) * spread(gradients[:num_micro_batches])
        assert 100 * errors[FP32] < errors[SUMS] < rounded + SINGLE
        assert errors[PURE_SUMS] < rounded + errors[PURE]
        # Two ranks' numbers are rounded, and their sum.
        own = [sum(gradients[rank : 2 * num_micro_batches : 2]) for rank in range(2)]
        twice = ((1 + ROUNDOFF) ** 2 - 1) * spread(own)
        assert 100 * errors[FP32] < errors[REDUCED] < twice + SINGLE
    # Over micro-batches the errors of bf16 products average out, and those of a bf16 sum add up.
    of = {
        case: [rows[case]["errors"][str(num_micro_batches)] for num_micro_batches in MICRO_BATCHES]
        for case in (BF16, SUMS)
    }
    assert of[BF16][0] > of[BF16][1]
    assert of[SUMS][0] < of[SUMS][1]


@pytest.mark.parametrize(
    ("case", "num_micro_batches", "update"),
    [(case, 1024, 1.0) for case in (FP32, BF16, FP16, PURE)]
    + [
        (case, num, update)
        for case in (SUMS, PURE_SUMS)
        for num, update in ((256, 1.0), (512, 0.5), (1024, 0.25))
    ],
)
def test_trap_14_a_constant_gradient(case: Case, num_micro_batches: int, update: float) -> None:
    # 256 times 1 / K is exact in 8 bits; the next 1 / K is half an ulp of that and is lost, for
    # good.
    assert precisions.constant_gradient(case, num_micro_batches) == update


def test_bytes_are_those_of_real_tensors_and_by_hand(rows: dict[Case, dict[str, Any]]) -> None:
    by_hand = {
        FP32: (4, 4, 0, 8, 0, 0),
        BF16: (4, 4, 0, 8, 0, 0),
        FP16: (4, 4, 0, 8, 0, 0),
        PURE: (2, 2, 4, 4, 0, 0),
        SUMS: (4, 4, 2, 8, 0, 0),
        PURE_SUMS: (2, 2, 0, 4, 0, 0),
        # DDP's buckets; rounded copies, and the messages made of them
        REDUCED: (4, 4, 4, 8, 4 + 2 * 2, 2),
    }
    # By hand: tokens, positions; per layer 12 w^2 weights and 13 w biases and norms; the last norm.
    count = 257 * 64 + 32 * 64 + 2 * (12 * 64**2 + 13 * 64) + 2 * 64
    assert precisions.num_parameters() == STORED["parameters"] == count
    steps = 4 * (2 + 2 * 12 + 2)  # AdamW counts updates in float32, for each tensor
    for case, row in rows.items():
        expected = [size * count for size in by_hand[case]]
        expected[3] += steps
        assert list(row["bytes"].values()) == expected
        # What the page tells of several ranks: 2 bytes travel where asked for, else 4, whatever the
        # parameters are in.
        sent = precisions.predicted(replace(case, ranks=2))["sent"]
        assert sent == (2 if case.reduce is torch.bfloat16 else 4) * count
        assert precisions.is_held(row)
        assert set(row["bytes"]) - set(row["bytes held"]) == {"reduction"}


def test_the_page_has_the_stored_table_and_it_is_of_these_cases(
    rows: dict[Case, dict[str, Any]],
) -> None:
    assert precisions.table(STORED) in PAGE
    assert f"{STORED['parameters']:,} parameters" in PAGE
    assert [(row["case"], row["ranks"]) for row in STORED["rows"]] == [
        (case.overrides, case.ranks) for case in CASES
    ]
    for case, row in zip(CASES, STORED["rows"], strict=True):
        assert [int(num) for num in row["errors"]] == list(precisions.NUMS_MICRO_BATCHES)
        assert row["bytes"] == rows[case]["bytes"]  # these depend on no machine
        assert precisions.is_held(row)
        stalls = case in (SUMS, PURE_SUMS)
        assert list(row["constant gradient"].values()) == [1.0, 1.0, 1.0, 0.25 if stalls else 1.0]
        assert rows[case]["constant gradient"] == {"1": 1.0, "16": 1.0}
    errors = {case: row["errors"]["1024"] for case, row in zip(CASES, STORED["rows"], strict=True)}
    assert errors[FP32] < SINGLE < errors[FP16] < errors[BF16] < errors[PURE] < ROUNDOFF
    assert errors[REDUCED] < ROUNDOFF < errors[SUMS] < 1.0
    assert "wrong by a third" in PAGE  # of the two rows that stall
    assert all(0.25 < errors[case] < 0.4 for case in (SUMS, PURE_SUMS))
    # the page's weight that does not move
    assert float(torch.tensor(1.0, dtype=torch.bfloat16) - 1e-3) == 1.0
    assert not re.search(r"/(home|tmp|work|root)/|[\w-]+@", json.dumps(STORED))


def configuration(overrides: str) -> Config:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        composed = OmegaConf.to_container(compose("config", overrides.split()), resolve=True)
    assert isinstance(composed, dict)
    return typed(composed)


def test_the_command_lines_mean_what_was_measured() -> None:
    for case in CASES:
        config = configuration(case.overrides)
        assert config.precision.name is case.precision
        asked = (config.accum.dtype, config.parallel.reduce_dtype)
        assert tuple(None if dtype is None else dtype.torch for dtype in asked) == (
            case.accumulate,
            case.reduce,
        )
    defaults = configuration("precision=fp16").precision
    scale = da.LossScale()
    assert (defaults.loss_scale, defaults.loss_scale_growth_windows) == (
        scale.value,
        scale.growth_windows,
    )
    commands = re.findall(r"^python -m distaccum train (.*)$", PAGE, flags=re.MULTILINE)
    assert len(commands) == 5
    for overrides in commands:
        configuration(overrides)
    assert configuration(commands[1]).precision.loss_scale == 1024
    assert configuration(commands[-1]).parallel.reduce_dtype is SumDtype.bf16


def test_the_loop_of_the_page_trains() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    before = model.weight.detach().clone()
    data = [(torch.randn(4, 3), torch.tensor([0, 1, 1, 0])) for _ in range(8)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    names: dict[str, Any] = {
        "da": da, "torch": torch, "model": model, "optimizer": optimizer, "loader": data,
        "objective": da.Classification(),
    }  # fmt: skip
    exec(compile(code, "docs/precisions.md", "exec"), names)
    assert names["record"].skipped is None
    assert names["record"].step == 2
    assert not torch.equal(model.weight, before)
