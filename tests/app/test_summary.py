"""The start block's arithmetic, in words."""

from __future__ import annotations

import pytest

from distaccum.app.summary import _arithmetic
from distaccum.core.batch_size import solve
from distaccum.core.plan import Plan


@pytest.mark.parametrize(
    ("batch", "micro_batch_size", "ranks", "told"),
    [
        (4, 8, 1, "micro-batch size 4 x 1 accumulation step(s) x 1 rank(s) = 4 samples"),
        (
            9,
            8,
            1,
            (
                "9 samples in uneven micro-batches: at most 5 sample(s) x 2 accumulation step(s) x "
                "1 rank(s)"
            ),
        ),
        (10, 8, 2, "micro-batch size 5 x 1 accumulation step(s) x 2 rank(s) = 10 samples"),
        (
            16,
            8,
            4,
            (
                "16 samples in uneven micro-batches: at most 8 sample(s) x 1 accumulation step(s) "
                "x 4 rank(s)"
            ),
        ),
        (32, 8, 2, "micro-batch size 8 x 2 accumulation step(s) x 2 rank(s) = 32 samples"),
    ],
)
def test_micro_batches_are_told_as_they_are(
    batch: int, micro_batch_size: int, ranks: int, told: str
) -> None:
    arithmetic = solve(ranks, batch, micro_batch_size)
    assert _arithmetic(arithmetic, None) == f"{told} per optimizer step"
    sizes = [m.size for m in Plan(1000, batch, arithmetic.micro_batch_size).window().micro_batches]
    assert f" {max(sizes)} x " in told.replace(" sample(s) x", " x")
