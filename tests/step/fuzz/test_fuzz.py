"""Training loops composed at random are exact or refused on all ranks; scripts/nightly.sh tries
many more."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
from fuzz import Judge, compare
from fuzz_cases import MAY_REFUSE, MISTAKES, Case, draw, reasons_to_refuse
from fuzz_loop import Told
from fuzz_reference import Reference, reference

START = 0
SEEDS = 20


@pytest.fixture(scope="module")
def judge() -> Iterator[Judge]:
    with Judge() as made:
        yield made


@pytest.mark.parametrize("seed", range(START, START + SEEDS))
def test_a_composed_loop_is_exact_or_refused(judge: Judge, seed: int) -> None:
    case = draw(seed)
    verdict = judge.judge(case)
    assert verdict.right, f"{case}: {verdict}\n{verdict.detail}"


def told_of(right: Reference) -> Told:
    """What a rank tells of a loop that went right."""
    names = (
        "step",
        "skipped",
        "loss",
        "losses",
        "denominators",
        "grad_norm",
        "lr",
        "num_micro_batches",
    )
    told = Told(
        records=[{name: getattr(window, name) for name in names} for window in right.windows],
        parameters=[[p.flatten().tolist() for p in window.parameters] for window in right.windows],
    )
    told.at_the_end = told.parameters[-1]
    return told


def first_case(**fields: object) -> Case:
    """The first seed whose case has these fields."""
    return next(
        case
        for case in map(draw, range(10_000))
        if all(getattr(case, k) == v for k, v in fields.items())
    )


def test_the_judge_sees_what_is_off() -> None:
    case = first_case(ranks=2, wrapper="ddp", mistake=None, mask="all", extra="always", contexts=())
    right = reference(case)
    assert compare(case, right, [told_of(right)] * 2).kind == "exact"

    moved = told_of(right)
    moved.parameters[1][0][0] *= 1 + 1e-10
    assert "window 1: parameter 0" in compare(case, right, [told_of(right), moved]).why
    for name, value in (
        ("loss", 1.0),
        ("grad_norm", 1.0),
        ("denominators", {"loss": 1.0}),
        ("step", 7),
    ):
        other = told_of(right)
        other.records[-1][name] = value
        assert f"{name} is {value}" in compare(case, right, [other, other]).why
    short = told_of(right)
    del short.records[-1], short.parameters[-1]
    assert "windows were made" in compare(case, right, [short, short]).why
    assert compare(case, right, [told_of(right), None]).kind == "HANG"
    assert compare(case, right, [Told(error="ValueError"), told_of(right)]).kind == "OTHER ERROR"


def test_the_judge_knows_what_may_be_refused() -> None:
    def refused(right: Reference, windows: int) -> Told:
        told = told_of(right)
        told.refused = "no"
        told.at_the_end = [
            p.flatten().tolist()
            for p in [right.start, *(w.parameters for w in right.windows)][windows]
        ]
        del told.records[windows:], told.parameters[windows:]
        return told

    valid = first_case(ranks=2, wrapper="ddp", mistake=None, extra="always", contexts=())
    right = reference(valid)
    assert "nothing in it may be" in compare(valid, right, [refused(right, 0)] * 2).why
    mistaken = replace(valid, mistake="not_wrapped")
    assert compare(mistaken, right, [refused(right, 1)] * 2).kind == "refused"
    assert compare(mistaken, right, [refused(right, 1), told_of(right)]).kind == "WRONG"
    assert compare(mistaken, right, [refused(right, 1), refused(right, 2)]).kind == "WRONG"
    half_done = refused(right, 1)
    half_done.at_the_end = told_of(right).parameters[-1]
    assert "was refused, and moved" in compare(mistaken, right, [half_done, half_done]).why


def test_every_ingredient_is_drawn() -> None:
    cases = [draw(seed) for seed in range(2000)]
    assert {case.ranks for case in cases} == {1, 2, 3}
    assert {case.mistake for case in cases} == {None, *MISTAKES}
    assert {reason for case in cases for reason in reasons_to_refuse(case)} == set(
        MAY_REFUSE.values()
    )
    must_be_exact = sum(not reasons_to_refuse(case) for case in cases)
    assert must_be_exact > len(cases) / 3
