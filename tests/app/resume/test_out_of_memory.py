"""Memory runs out on one rank in the middle of a run: with accum.on_oom=shrink nothing but the
micro-batches' size changes.

float64 and no dropout (whose masks follow the micro-batches): sums are the same in another order.
An update differs by a few roundoffs of 1.1e-16, and 8 steps of AdamW carry them on: 1e-12 is four
orders above what one step shows.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from faults import Fault
from runs import Run, Undisturbed, assert_each_sample_once

TOLERANCE = 1e-12
EXACT = ("precision=fp64", "model.dropout=0")
Make = Callable[..., Run]


def assert_undisturbed(found: Run, expected: Run) -> None:
    assert len(found.trajectory()) == len(expected.trajectory())
    for own, other in zip(found.trajectory(), expected.trajectory(), strict=True):
        assert own == pytest.approx(other, rel=TOLERANCE, abs=0), f"step {other[0]}"
    assert found.records("validation")[-1]["loss"] == pytest.approx(
        expected.records("validation")[-1]["loss"], rel=TOLERANCE, abs=0
    )
    for name, tensor in found.tensors().items():
        assert (
            tensor.sub(expected.tensors()[name]).abs().max()
            <= 1e-12 * expected.tensors()[name].abs().max()
        ), name
    assert_each_sample_once(found)


@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [
        (1, ("parallel=single",)),
        (2, ("parallel=ddp",)),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else str(value),
)
def test_the_trajectory_is_the_undisturbed_one(
    ranks: int, parallel: tuple[str, ...], run: Make, undisturbed: Undisturbed
) -> None:
    found = run(*EXACT, *parallel, "accum.on_oom=shrink")
    fault = Fault(ranks - 1, 3, "backward", "oom")
    attempt = found.start(ranks, faults=[fault])
    assert attempt.codes == [0] * ranks, str(attempt)
    assert found.acted(fault)
    said = f"step 3: Out of memory on rank {ranks - 1}"
    assert said in found.notes()
    assert "with micro-batches of 1 sample(s) and the same effective batch" in found.notes()
    assert_undisturbed(found, undisturbed.of(ranks, *EXACT, *parallel))


@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [
        pytest.param(2, ("parallel=fsdp", "accum.sync=boundary"), marks=pytest.mark.nightly),
        (2, ("parallel=fsdp", "accum.sync=gather_once")),
        (2, ("parallel=ddp", "accum.sync=every")),
        (4, ("parallel=hsdp", "accum.sync=reduce_scatter")),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else str(value),
)
def test_where_micro_batches_communicate_the_next_start_halves_them(
    ranks: int, parallel: tuple[str, ...], run: Make, undisturbed: Undisturbed
) -> None:
    """The run ends with the numbers; started again, it continues from its checkpoint, and the sums
    are the same."""
    found = run(*EXACT, *parallel, "accum.on_oom=shrink")
    fault = Fault(ranks - 1, 4, "backward", "oom")
    attempt = found.start(ranks, faults=[fault])
    assert attempt.codes[-1] == 1, str(attempt)
    text = " ".join(attempt.texts[-1].split())
    assert "error: Step 4 ran out of memory with micro-batches of 2 sample(s)" in text
    assert "continues from its last checkpoint with micro-batches of 1 sample(s)" in text
    found.finish(ranks)
    assert "micro-batches of 1 sample(s), as an earlier start ran out of memory" in found.notes()
    assert_undisturbed(found, undisturbed.of(ranks, *EXACT, *parallel))


def test_twice_and_read_ahead_by_processes(run: Make, undisturbed: Undisturbed) -> None:
    """The second time in the shorter window at the end of an epoch; from 4 samples to 1."""
    other = ("parallel=ddp", "accum.micro_batch_size=4", "loader.workers=1")
    found = run(*EXACT, *other, "accum.on_oom=shrink")
    faults = [Fault(1, 2, "forward", "oom"), Fault(0, 6, "backward", "oom")]
    attempt = found.start(2, faults=faults)
    assert attempt.codes == [0, 0], str(attempt)
    assert found.acted(*faults)
    assert "micro-batches of 2 sample(s)" in found.notes()
    assert "micro-batches of 1 sample(s)" in found.notes()
    assert_undisturbed(found, undisturbed.of(2, *EXACT, *other))


def test_one_sample_cannot_be_halved(run: Make) -> None:
    found = run("parallel=ddp", "accum.micro_batch_size=1", "accum.on_oom=shrink")
    attempt = found.start(2, faults=[Fault(1, 3, "forward", "oom")])
    assert attempt.codes == [1, 1], str(attempt)
    for text in attempt.texts:
        assert "error: Out of memory on rank 1" in text
        assert "one sample cannot be halved" in text.lower()


def test_without_shrinking_the_rank_says_what_would_fit(run: Make) -> None:
    found = run("parallel=ddp", "accum.micro_batch_size=4")
    attempt = found.start(2, faults=[Fault(1, 3, "forward", "oom")])
    assert attempt.codes == [1, 1], str(attempt)
    text = " ".join(attempt.texts[1].split())
    assert "error: Step 3 ran out of memory with micro-batches of 4 sample(s) at a peak of " in text
    assert (
        "Use accum.micro_batch_size=2 (2 micro-batches per rank, the same effective batch),"
        " accum.micro_batch_size=auto" in text
    )
    assert "Traceback" not in text


def test_a_limit_on_the_cpu_is_kept(run: Make, undisturbed: Undisturbed) -> None:
    """Tensors are counted: 8 samples at once need more than half a MiB beside what the model
    takes."""
    whole = ("parallel=single", "accum.micro_batch_size=8")
    found = run(*EXACT, *whole, "accum.on_oom=shrink", "limits.memory=800KiB")
    found.finish(1)
    assert "step 1: Out of memory on rank 0: " in found.notes()
    assert "of 819,200 bytes are in use (limits.memory)" in found.notes()
    assert_undisturbed(found, undisturbed.of(1, *EXACT, *whole))
    refused = run(*EXACT, *whole, "limits.memory=800KiB").start(1)
    assert refused.codes == [1]
    assert "Use accum.micro_batch_size=4" in " ".join(refused.texts[0].split())
    tight = run(*EXACT, *whole, "limits.memory=10KiB").start(1)
    assert "The model and its optimizer do not fit" in " ".join(tight.texts[0].split())
