"""How `overlap_micro_batches="auto"` chooses: arithmetic with given times, and a training that ends
as the plain one does."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from chains import accumulator as make_accumulator
from chains import differences, make_gpt, state, trained, windows, wrap
from worlds import World

from distaccum.errors import ConfigError
from distaccum.step.overlap.schedule import TIMED_WINDOWS, WARM_WINDOWS, _Timing


def add(timing: _Timing, exposed: float, micro_batch: float = 1.5, rounds: int = 8) -> None:
    """One window of micro-batches that all take the same time, two thirds of it their backward."""
    runner: Any = SimpleNamespace(rounds=rounds, began=0.0)
    timing.add(runner, rounds * micro_batch + exposed, exposed)


def timed(exposed: float, limit: int | None = None, **times: Any) -> _Timing:
    """After the windows in the plain order."""
    timing = _Timing(limit)
    for number in range(WARM_WINDOWS + TIMED_WINDOWS):
        assert not timing.complete
        # the first ones do not count
        add(timing, exposed if number >= WARM_WINDOWS else 100.0, **times)
    assert timing.complete
    return timing


def chosen(timing: _Timing, *others: list[float]) -> tuple[int, bool]:
    """T and whether it is final; the other ranks' medians beside this one's."""
    micro_batches, why, final = timing.choice([timing.medians(), *others])
    assert why
    return micro_batches, final


@pytest.mark.parametrize(
    ("exposed", "limit", "expected"),
    [
        (0.0, None, (1, True)),
        (0.24, None, (1, True)),  # of 12.24 s: below 2 %
        (0.25, None, (2, False)),  # of 12.25 s: above
        (1.0, None, (2, False)),  # one backward hides it all
        (3.2, None, (5, False)),  # 1 + 3.2, rounded up
        (3.2, 4, (4, False)),
        (3.2, 1, (1, True)),
        (50.0, None, (8, False)),  # no more than there are
        (50.0, 100, (8, False)),
    ],
)
def test_the_smallest_tail_that_hides_what_was_waited_for(
    exposed: float, limit: int | None, expected: tuple[int, bool]
) -> None:
    assert chosen(timed(exposed, limit)) == expected


def test_the_trial_decides() -> None:
    for after, expected in ((0.1, (4, True)), (3.1, (1, True))):
        timing = timed(3.0)  # a window of 15 s
        assert chosen(timing) == (4, False)
        assert not timing.complete
        add(timing, 100.0)  # the first one with another T does not count
        for _ in range(TIMED_WINDOWS):
            assert not timing.complete
            add(timing, after)
        assert chosen(timing) == expected


def test_shorter_windows_are_passed_over_and_a_longer_one_begins_anew() -> None:
    timing = _Timing(None)
    for _ in range(9):
        add(timing, 9.0, rounds=1)  # nothing to compare with
    for _ in range(WARM_WINDOWS + 1):
        add(timing, 3.0, rounds=4)
        add(timing, 9.0, rounds=3)
    assert not timing.complete
    for number in range(WARM_WINDOWS + TIMED_WINDOWS):
        assert not timing.complete
        add(timing, 1.5 if number >= WARM_WINDOWS else 9.0)
    assert timing.medians() == pytest.approx([8 * 1.5 + 1.5, 1.5])
    assert chosen(timing) == (3, False)


def test_ranks_choose_by_the_least_waiting_and_the_longest_window() -> None:
    # A rank that waited 9 s waited for the rank that waited 1.2 s, and not for the network.
    assert chosen(timed(1.2), [13.2, 1.3], [13.2, 9.0]) == (3, False)
    # A slow rank's backwards take longer, so that fewer of them hide as much.
    assert chosen(timed(1.2), [40.0, 9.0], [40.0, 9.0]) == (2, False)
    # 1.2 s are more than 2 % of this rank's 13.2 s and less than those of the slowest one.
    assert chosen(timed(1.2), [61.0, 9.0]) == (1, True)


@pytest.mark.parametrize(
    "options",
    [{"overlap_micro_batches": value} for value in (0, -1, True, 2.0, "2", None)]
    + [{"overlap_micro_batches": "auto", "overlap_limit": value} for value in (0, True, "auto")],
    ids=str,
)
def test_numbers_that_are_none(options: dict[str, Any]) -> None:
    overlap_micro_batches = options.pop("overlap_micro_batches")
    with pytest.raises(ConfigError, match="Give a number of micro-batches, at least 1"):
        make_accumulator(make_gpt(), "ddp", overlap_micro_batches, **options)


def chosen_by_itself(kind: str) -> tuple[list[str | None], list[str]]:
    """What a training told of its choice, and its differences from the plain one."""
    data = windows((3,) * 12)
    model = wrap(make_gpt(), kind)
    made = make_accumulator(model, kind, "auto")
    records = [made.step(micro_batches) for micro_batches in data]
    found = [(record.losses, record.grad_norm) for record in records], state(model)
    return [record.chosen for record in records], differences(
        found, trained(wrap(make_gpt(), kind), kind, 1, data)
    )


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_training_that_chooses_is_the_plain_one(two_ranks: World, kind: str) -> None:
    (told, different), (told_there, different_there) = two_ranks.run(chosen_by_itself, kind)
    assert told == told_there
    assert different == different_there == []
    said = [index for index, text in enumerate(told) if text is not None]
    first = WARM_WINDOWS + TIMED_WINDOWS
    assert said in ([first], [first, first + 1 + TIMED_WINDOWS])
