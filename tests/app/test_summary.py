"""The start block's arithmetic, in words."""

from __future__ import annotations

import pytest

from distaccum.app.summary import _arithmetic
from distaccum.core.batch_size import solve
from distaccum.core.plan import Plan


@pytest.mark.parametrize(
    ("batch", "micro", "ranks", "told"),
    [
        (4, 8, 1, "micro 4 x 1 micros x 1 rank(s) = 4 samples"),
        (9, 8, 1, "9 samples in uneven micros: up to 5 x 2 micros x 1 rank(s)"),
        (10, 8, 2, "micro 5 x 1 micros x 2 rank(s) = 10 samples"),
        (16, 8, 4, "16 samples in uneven micros: up to 8 x 1 micros x 4 rank(s)"),
        (32, 8, 2, "micro 8 x 2 micros x 2 rank(s) = 32 samples"),
    ],
)
def test_micros_are_told_as_they_are(batch: int, micro: int, ranks: int, told: str) -> None:
    arithmetic = solve(ranks, batch, micro)
    assert _arithmetic(arithmetic, None) == f"{told} per optimizer step"
    sizes = [m.size for m in Plan(1000, batch, arithmetic.micro_size).window().micros]
    assert f" {max(sizes)} x " in told
