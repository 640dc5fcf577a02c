"""Seeded kills at random places and moments: the run goes on and ends as if nothing had
happened."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from chaos import ByClock, Point, befall, draw
from faults import Fault
from runs import NUM_SAMPLES, STEPS, Run, Undisturbed, assert_each_sample_once, plan_of

SEED = 80
NUM_POINTS = 12


@pytest.mark.parametrize(
    "number",
    [
        *range(8),
        *(pytest.param(number, marks=pytest.mark.nightly) for number in range(8, NUM_POINTS)),
    ],
)
def test_a_run_that_was_killed_ends_as_the_undisturbed_one(
    number: int, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    point = draw(SEED, number)
    outcome = befall(point, tmp_path, undisturbed)
    assert not outcome.trouble, f"{point}: {outcome.trouble}"


def test_the_points_are_of_all_kinds() -> None:
    points = [draw(SEED, number) for number in range(NUM_POINTS)]
    kills = [kill for point in points for kill in point.kills]
    assert {point.ranks for point in points} == {1, 2, 3, 4}
    assert {point.parallel for point in points} == {"single", "ddp", "fsdp"}
    assert {point.every_steps for point in points} == {1, 2, 3}
    assert {point.asynchronous for point in points} == {False, True}
    assert {kill.at for kill in kills if isinstance(kill, Fault)} >= {"save", "publish", "pointer"}
    assert any(isinstance(kill, ByClock) for kill in kills)
    assert any(len(point.kills) > 1 for point in points)


def test_the_undisturbed_run_uses_each_sample_once(undisturbed: Undisturbed) -> None:
    plan = plan_of(*undisturbed.overrides)
    sizes = [window.size for window, _ in zip(plan.windows(), range(STEPS), strict=False)]
    assert sum(sizes[:3]) == NUM_SAMPLES
    assert sizes[2] < sizes[0], "the last window of an epoch is a short one"
    for ranks in (1, 3):
        assert_each_sample_once(
            undisturbed.of(ranks, f"parallel={'single' if ranks == 1 else 'ddp'}")
        )


def test_a_sample_that_is_missed_is_seen(undisturbed: Undisturbed, run: Callable[..., Run]) -> None:
    """The judge itself: a run over another order of samples is not taken for the planned one."""
    other = run("parallel=single", "train.seed=1").finish(1)
    other.overrides = (*undisturbed.overrides, "parallel=single")
    with pytest.raises(AssertionError, match="step 1"):
        assert_each_sample_once(other)


def test_the_same_number_draws_the_same_point() -> None:
    assert draw(SEED, 3) == draw(SEED, 3)
    assert isinstance(draw(SEED, 3), Point)
