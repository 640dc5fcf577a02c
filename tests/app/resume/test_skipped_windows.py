"""A step is one optimizer update: windows that were skipped have numbers of their own, and go on in
a resumed run."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from faults import Fault
from runs import STEPS, Run, Undisturbed

Make = Callable[..., Run]

SKIPPING = ("parallel=single", "accum.nonfinite=skip", "accum.audit=always")
BAD = Fault(0, 3, "forward", "nan")  # in the third window
STOP = Fault(0, 6, "forward", "SIGTERM")  # in the sixth window, which makes the fifth step


@pytest.fixture
def skipped(run: Make) -> Run:
    """A run whose third window is skipped."""
    found = run(*SKIPPING)
    attempt = found.start(1, faults=[BAD])
    assert attempt.codes == [0], str(attempt)
    assert found.acted(BAD)
    return found


def test_a_skipped_window_is_no_step(skipped: Run) -> None:
    records, text = skipped.records("step"), skipped.attempts[0].texts[0]
    assert [record["window"] for record in records] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [record["step"] for record in records] == [1, 2, 2, 3, 4, 5, 6, 7]
    assert [record["window"] for record in records if record["skipped"]] == [3]
    assert "window 3 skipped, after step 2: loss not finite" in skipped.notes()
    assert "step 4/7 " in text
    assert "step 7/7 " in text
    assert "end: all 8 windows (7 steps, 1 skipped) done" in text
    assert [record["step"] for record in skipped.records("validation")] == [4, 7]
    assert {path.name for path in skipped.run_dir.glob("checkpoints/step-*")} >= {
        "step-00000006",
        "step-00000007",
    }
    facts = skipped.checkpoint().facts
    assert (
        facts["progress"]["windows"],
        facts["progress"]["step"],
        facts["accumulator"]["steps"],
    ) == (STEPS, 7, 7)


@pytest.mark.parametrize("saved_by", ["this version", "one whose step counted windows"])
def test_a_resumed_run_keeps_both_numbers(saved_by: str, skipped: Run, run: Make) -> None:
    found = run(*SKIPPING)
    attempt = found.start(1, faults=[BAD, STOP])
    assert attempt.codes == [0], str(attempt)
    assert found.acted(STOP)
    assert (found.step, json.loads((found.run_dir / "PREEMPTED").read_text())["step"]) == (5, 5)
    if saved_by != "this version":
        manifest = found.run_dir / "checkpoints" / "step-00000005" / "manifest.json"
        told = json.loads(manifest.read_text())
        told["facts"]["progress"]["step"] = told["facts"]["progress"].pop("windows")
        manifest.write_text(json.dumps(told))
    found.finish(1)
    assert "continues after step 5 " in found.notes()
    for kind in ("step", "validation"):
        assert [r["step"] for r in found.records(kind)] == [
            r["step"] for r in skipped.records(kind)
        ]
    assert str(found.trajectory()) == str(skipped.trajectory())  # nan is not equal to itself
    assert found.sha256() == skipped.sha256()


def test_a_shorter_training_is_refused_by_its_windows(skipped: Run) -> None:
    attempt = skipped.start(1, "train.steps=7")
    assert attempt.codes == [2], str(attempt)
    assert (
        "already has 8 windows (7 steps, 1 skipped), but the training has only 7"
        in attempt.texts[0]
    )


def test_a_skipped_window_that_is_done_again_stands_once(
    run: Make, undisturbed: Undisturbed
) -> None:
    found = run(*SKIPPING)
    found.start(1, faults=[BAD, Fault(0, 4, "forward", "kill")])
    assert found.step == 2
    assert "window 3 skipped" in found.notes()
    found.finish(1)
    assert [record["window"] for record in found.records("step")] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert found.trajectory() == undisturbed.of(1, "parallel=single").trajectory()
