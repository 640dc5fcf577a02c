"""The plan is arithmetic: every sample exactly once per epoch, whatever the world size and wherever
a run resumes."""

from __future__ import annotations

import hashlib
from itertools import islice, pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distaccum.core.batch_schedule import BatchSchedule, Ramp, ScheduleUnit, entries_of
from distaccum.core.batch_size import DEFAULT_MICRO_BATCH_SIZE, Ragged, samples_of_tokens, solve
from distaccum.core.plan import LastWindow, MicroBatch, Plan
from distaccum.core.rng import random_key
from distaccum.errors import ConfigError

sizes = st.integers(1, 60)
schedules = st.builds(
    lambda rising, batches, unit, ramp: BatchSchedule(
        tuple(zip(sorted({0, *rising}), batches, strict=False)), unit, ramp
    ),
    rising=st.lists(st.integers(1, 90), max_size=4),
    batches=st.lists(sizes, min_size=5, max_size=5),
    unit=st.sampled_from([ScheduleUnit.steps, ScheduleUnit.samples]),
    ramp=st.sampled_from(Ramp),
)


def planned(batch: int | BatchSchedule, **others: Any) -> Plan:
    """A plan of one effective batch, or of a schedule."""
    if isinstance(batch, int):
        return Plan(effective_batch_size=batch, **others)
    return Plan(effective_batch_size=batch.entries[0][1], schedule=batch, **others)


def plans_of(*last: LastWindow, at_least: int) -> st.SearchStrategy[Plan]:
    return st.builds(
        planned,
        batch=st.one_of(sizes, schedules),
        num_samples=st.integers(at_least, 200),
        micro_batch_size=st.integers(1, 12),
        seed=st.integers(0, 5),
        last_window=st.sampled_from(last),
    )


plans = plans_of(LastWindow.keep, LastWindow.fill, at_least=1)
dropping = plans_of(LastWindow.drop, at_least=60)


def samples_of(
    plan: Plan, windows: int, world_size: int, step: int = 0, start: int = 0
) -> list[int]:
    """All samples of some windows, gathered rank by rank."""
    found = []
    for window in islice(plan.windows(step, start), windows):
        by_number = {
            m.number: m for rank in range(world_size) for m in window.of_rank(rank, world_size)
        }
        assert sorted(by_number) == list(range(len(by_number)))
        for number in sorted(by_number):
            found += plan.samples(by_number[number])
    return found


@settings(deadline=None)
@given(plan=plans, world_size=st.integers(1, 9))
def test_every_sample_exactly_once_per_epoch(plan: Plan, world_size: int) -> None:
    # one more holds the end of the third epoch
    windows = plan.num_steps(3) + (plan.last_window is LastWindow.fill)
    found = samples_of(plan, windows, world_size)
    if plan.last_window is LastWindow.keep:
        assert len(found) == 3 * plan.num_samples
    for epoch in range(3):
        part = found[epoch * plan.num_samples : (epoch + 1) * plan.num_samples]
        assert sorted(part) == list(range(plan.num_samples))


@settings(deadline=None)
@given(
    plan=st.one_of(plans, dropping),
    stop=st.integers(0, 20),
    before=st.integers(1, 9),
    after=st.integers(1, 9),
)
def test_a_resumed_run_continues_where_it_stopped_on_any_world_size(
    plan: Plan, stop: int, before: int, after: int
) -> None:
    whole = samples_of(plan, stop + 10, before)
    window = next(islice(plan.windows(), stop, None))
    assert plan.window(stop, plan.start_of(stop)) == window
    resumed_windows = list(islice(plan.windows(window.step, window.start), 10))
    assert resumed_windows == list(islice(plan.windows(), stop, stop + 10))
    resumed = samples_of(plan, 10, after, step=window.step, start=window.start)
    assert whole[len(whole) - len(resumed) :] == resumed


@settings(deadline=None)
@given(plan=plans, world_size=st.integers(1, 9))
def test_micro_batches_do_not_depend_on_the_world_size(plan: Plan, world_size: int) -> None:
    for window in islice(plan.windows(), 5):
        dealt = [window.of_rank(rank, world_size) for rank in range(world_size)]
        assert sorted(
            (m for micro_batches in dealt for m in micro_batches), key=lambda m: m.number
        ) == list(window.micro_batches)
        counts = [len(micro_batches) for micro_batches in dealt]
        assert max(counts) - min(counts) <= 1
        micro_batch_sizes = [m.size for m in window.micro_batches]
        assert sum(micro_batch_sizes) == window.size
        assert max(micro_batch_sizes) <= plan.micro_batch_size
        assert max(micro_batch_sizes) - min(micro_batch_sizes) <= 1


@settings(deadline=None)
@given(num_samples=st.integers(1, 200), effective_batch_size=sizes, seed=st.integers(0, 3))
def test_drop_uses_each_sample_at_most_once_and_only_full_windows(
    num_samples: int, effective_batch_size: int, seed: int
) -> None:
    if num_samples < effective_batch_size:
        with pytest.raises(ConfigError, match="leaves nothing"):
            Plan(num_samples, effective_batch_size, 4, seed, LastWindow.drop)
        return
    plan = Plan(num_samples, effective_batch_size, 4, seed, LastWindow.drop)
    for epoch in range(2):
        windows = [w for w in islice(plan.windows(), plan.num_steps(2)) if w.epoch == epoch]
        assert [w.size for w in windows] == [effective_batch_size] * plan.windows_per_epoch
        found = [s for w in windows for m in w.micro_batches for s in plan.samples(m)]
        assert (
            len(found)
            == len(set(found))
            == num_samples // effective_batch_size * effective_batch_size
        )


def test_epochs_differ_and_seeds_differ() -> None:
    plan = Plan(100, 10, 5, seed=1)
    first, second = samples_of(plan, 10, 1), samples_of(plan, 10, 1, 10, 100)
    other = samples_of(Plan(100, 10, 5, seed=2), 10, 1)
    assert first != second
    assert first != other
    assert samples_of(Plan(100, 10, 5, shuffle=False), 10, 1) == list(range(100))


GOLDEN = "3775d29cde2e21d0982c3df05f057fb5"  # of the plans below before there were schedules


@pytest.mark.parametrize("in_one_entry", [False, True])
def test_one_effective_batch_all_along_makes_the_windows_it_always_made(in_one_entry: bool) -> None:
    """Without a schedule, and with one that never changes: windows, micro-batches, samples and
    counts."""
    seen = hashlib.blake2b(digest_size=16)
    for n in (1, 7, 25, 150):
        for batch in (1, 7, 16, 100):
            for micro_batch in (1, 8):
                for last in LastWindow:
                    if last is LastWindow.drop and n < batch:
                        continue
                    plan = planned(
                        BatchSchedule(((0, batch),)) if in_one_entry else batch,
                        num_samples=n,
                        micro_batch_size=micro_batch,
                        seed=n + batch,
                        last_window=last,
                    )
                    seen.update(
                        repr(
                            (plan.windows_per_epoch, plan.last_window_size, plan.num_steps(3))
                        ).encode()
                    )
                    for step, start in ((0, 0), (5, 3 * n - 2), (9, n // 2)):
                        for w in islice(plan.windows(step, start), 6):
                            assert w.effective_batch_size == batch
                            seen.update(
                                repr(
                                    (
                                        w.step,
                                        w.epoch,
                                        w.start,
                                        w.size,
                                        w.micro_batch_size,
                                        w.next_start,
                                    )
                                ).encode()
                            )
                            micro_batches = [
                                (m.step, m.number, m.start, m.size, plan.samples(m))
                                for m in w.micro_batches
                            ]
                            seen.update(repr(micro_batches).encode())
    assert seen.hexdigest() == GOLDEN


# -- schedules of the effective batch


def batches_of(plan: Plan, steps: int) -> list[int]:
    return [window.effective_batch_size for window in islice(plan.windows(), steps)]


def test_a_jump_and_a_ramp_by_hand() -> None:
    entries = ((0, 16), (4, 64), (6, 8))
    jump = planned(BatchSchedule(entries), num_samples=10_000, micro_batch_size=8)
    assert batches_of(jump, 8) == [16, 16, 16, 16, 64, 64, 8, 8]
    assert [w.start for w in islice(jump.windows(), 8)] == [0, 16, 32, 48, 64, 128, 192, 200]
    ramp = planned(BatchSchedule(entries, ramp=Ramp.linear), num_samples=10_000, micro_batch_size=8)
    # 16, 28, 40, 52, then 64, 36, then 8: 28 and 36 are half-way between multiples of 8, 52 as
    # well.
    assert batches_of(ramp, 8) == [16, 32, 40, 56, 64, 40, 8, 8]
    by_position = planned(
        BatchSchedule(((0, 16), (40, 64)), ScheduleUnit.samples),
        num_samples=10_000,
        micro_batch_size=8,
    )
    assert [(w.start, w.size) for w in islice(by_position.windows(), 4)] == [
        (0, 16),
        (16, 16),
        (32, 16),
        (48, 64),
    ]


def test_a_ramp_keeps_its_ends_where_the_micro_batch_size_does_not_divide_them() -> None:
    plan = planned(
        BatchSchedule(((0, 3), (4, 21)), ramp=Ramp.linear), num_samples=10_000, micro_batch_size=8
    )
    assert batches_of(plan, 6) == [3, 8, 16, 16, 21, 21]  # 3, 7.5, 12, 16.5, 21


@settings(deadline=None)
@given(
    schedule=schedules,
    micro_batch_size=st.integers(1, 12),
    step=st.integers(0, 200),
    start=st.integers(0, 200),
)
def test_a_ramp_is_exact_at_its_entries_and_monotone_between(
    schedule: BatchSchedule, micro_batch_size: int, step: int, start: int
) -> None:
    def at(position: int) -> int:
        in_steps = schedule.unit is ScheduleUnit.steps
        return schedule.at(
            position if in_steps else step, start if in_steps else position, micro_batch_size
        )

    assert [at(begin) for begin, _ in schedule.entries] == [size for _, size in schedule.entries]
    for (begin, size), (end, goal) in pairwise(schedule.entries):
        between = [at(position) for position in range(begin, end)]
        if schedule.ramp is Ramp.jump:
            assert between == [size] * len(between)
            continue
        assert [*between, goal] == sorted([*between, goal], reverse=goal < size)
        for position, batch in enumerate(between[1:], begin + 1):
            exact = size + (goal - size) * (position - begin) / (end - begin)
            # nearest; a bound is nearer than what it bounds
            assert abs(batch - exact) <= micro_batch_size / 2 + 1e-9
            assert batch % micro_batch_size == 0 or batch in (size, goal)
    assert at(10**9) == schedule.entries[-1][1] <= schedule.largest


@settings(deadline=None)
@given(
    schedule=schedules,
    micro_batch_size=st.integers(1, 12),
    step=st.integers(0, 100),
    start=st.integers(0, 100),
)
def test_windows_said_to_be_alike_are(
    schedule: BatchSchedule, micro_batch_size: int, step: int, start: int
) -> None:
    alike = schedule.alike(step, start, micro_batch_size)
    batch = schedule.at(step, start, micro_batch_size)
    assert alike >= 1
    for index in range(min(alike, 50)):
        assert schedule.at(step + index, start + index * batch, micro_batch_size) == batch


@settings(deadline=None)
@given(plan=st.one_of(plans, dropping), epochs=st.integers(0, 2), step=st.integers(0, 60))
def test_counts_and_starts_are_those_of_the_windows_one_by_one(
    plan: Plan, epochs: int, step: int
) -> None:
    end = epochs * plan.num_samples
    # no window has less than one sample
    windows = list(islice(plan.windows(), 2 * plan.num_samples + 61))
    assert plan.num_steps(epochs) == sum(w.start + w.size <= end for w in windows)
    first = [w for w in windows if w.epoch == 0]
    assert (plan.windows_per_epoch, plan.last_window_size) == (len(first), first[-1].size)
    assert plan.start_of(step) == windows[step].start
    assert plan.consumed(step) == sum(window.size for window in windows[:step])
    assert plan.window(step, plan.start_of(step)) == windows[step]


def test_a_rank_makes_its_own_micro_batches_only(monkeypatch: pytest.MonkeyPatch) -> None:
    made = 0

    class Counted(MicroBatch):
        def __init__(self, *args: int) -> None:
            nonlocal made
            made += 1
            super().__init__(*args)

    monkeypatch.setattr("distaccum.core.plan.MicroBatch", Counted)
    window = Plan(
        num_samples=10**7, effective_batch_size=16384 * 8 * 3 - 1, micro_batch_size=3
    ).window()
    last = window.of_rank(16383, 16384)
    assert made == len(last) == 8
    assert (last[-1].number, last[-1].start + last[-1].size, last[-1].size) == (
        131071,
        window.size,
        2,
    )


@settings(deadline=None)
@given(plan=dropping)
def test_drop_with_a_schedule_leaves_out_only_what_is_too_short(plan: Plan) -> None:
    for window, following in pairwise(islice(plan.windows(), 60)):
        assert window.size == window.effective_batch_size
        assert following.start == window.next_start
        end = window.start + window.size
        assert (
            following.epoch == window.epoch or following.start == following.epoch * plan.num_samples
        )
        # the gap is smaller than what a window there would have been asked for
        if following.start > end:
            asked = planned(
                plan.schedule or plan.effective_batch_size,
                num_samples=10**6,
                micro_batch_size=plan.micro_batch_size,
            )
            assert following.start - end < asked.window(following.step, end).effective_batch_size


def test_drop_with_a_schedule_by_hand() -> None:
    """Epochs of 20 samples: 6, 6, 6 and a gap of 2, then 8, 8 and a gap of 4; also from within the
    first gap."""
    growing = BatchSchedule(((0, 6), (20, 8)), ScheduleUnit.samples)
    plan = planned(growing, num_samples=20, micro_batch_size=2, last_window=LastWindow.drop)
    assert [(w.start, w.size) for w in islice(plan.windows(), 6)] == [
        (0, 6),
        (6, 6),
        (12, 6),
        (20, 8),
        (28, 8),
        (40, 8),
    ]
    assert (plan.num_steps(1), plan.num_steps(2)) == (3, 5)
    assert plan.window(3, 18) == plan.window(3, 19) == plan.window(3, 20)


def test_millions_of_windows_are_counted_without_making_them() -> None:
    growing = BatchSchedule(((0, 64), (10**6, 4096)), ramp=Ramp.linear)
    plan = planned(growing, num_samples=10**12, micro_batch_size=1024)
    # By hand: on [0, 10^6) the exact batch is 64 + 0.004032 s. Nearest multiples of 1024, at least
    # 64: 64 at 64 + ... < 512, then 1024, 2048, 3072, and 4096 from 3584 on.
    bounds = [-(-(middle - 64) * 1000_000 // 4032) for middle in (512, 1536, 2560, 3584)]
    expected = sum(
        batch * (end - begin)
        for batch, begin, end in zip(
            (64, 1024, 2048, 3072, 4096), (0, *bounds), (*bounds, 3 * 10**6), strict=True
        )
    )
    assert plan.start_of(3 * 10**6) == expected


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ((), r"accum.schedule has no entries\. Write at least \{from: 0"),
        (((5, 16),), r"accum.schedule\[0\].from is 5.*\{from: 0, effective_batch_size: 16\}"),
        (((-1, 16),), r"accum.schedule\[0\].from is -1"),
        (
            ((0, 16), (9, 32), (9, 64)),
            r"accum.schedule\[2\].from \(9\) does not come after .* \(9\)",
        ),
        (
            ((0, 16), (9, 32), (4, 64)),
            r"accum.schedule\[2\].from \(4\) .* rising order, each position \(steps\)",
        ),
        (((0, 16), (9, 0)), r"accum.schedule\[1\].effective_batch_size is 0; .* at least 1"),
    ],
)
def test_schedules_that_make_no_sense(entries: tuple[tuple[int, int], ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BatchSchedule(entries)


def test_a_plan_and_its_schedule_agree() -> None:
    schedule = BatchSchedule(((0, 4), (9, 30)))
    with pytest.raises(
        ConfigError, match="effective_batch_size is 5, but the schedule begins with 4"
    ):
        Plan(100, 5, 2, schedule=schedule)
    with pytest.raises(ConfigError, match="an epoch has 20 samples and a window needs 30"):
        Plan(20, 4, 2, last_window=LastWindow.drop, schedule=schedule)
    assert Plan(30, 4, 2, last_window=LastWindow.drop, schedule=schedule).largest_batch == 30


def test_a_schedule_in_tokens() -> None:
    in_tokens = BatchSchedule(((0, 4), (1000, 8)), ScheduleUnit.tokens, Ramp.linear)
    # 7 x 128 < 1000 <= 8 x 128
    in_samples = BatchSchedule(((0, 4), (8, 8)), ScheduleUnit.samples, Ramp.linear)
    assert in_tokens.in_samples(128) == in_samples
    assert in_samples.in_samples(None) is in_samples
    with pytest.raises(ConfigError, match="schedule_unit=tokens needs samples of one length"):
        in_tokens.in_samples(None)
    with pytest.raises(ValueError, match="A plan does not count tokens"):
        Plan(100, 4, 2, schedule=in_tokens)


def test_entries_as_users_write_them() -> None:
    written = [{"from": 0, "effective_batch_size": 16}, {"from": 100, "effective_batch_size": 64}]
    assert entries_of(written) == ((0, 16), (100, 64))
    with pytest.raises(
        ConfigError,
        match=r"accum.schedule\[1\] has the keys at, effective_batch_size. Write an entry",
    ):
        entries_of([written[0], {"at": 100, "effective_batch_size": 64}])


def test_windows_per_epoch_and_the_last_window() -> None:
    for kind, per_epoch, last, steps in (
        (LastWindow.keep, 4, 4, 8),
        (LastWindow.drop, 3, 7, 6),
        # 50 samples in two epochs: seven full windows, one sample not begun
        (LastWindow.fill, 4, 7, 7),
    ):
        plan = Plan(25, 7, 3, last_window=kind)
        assert (plan.windows_per_epoch, plan.last_window_size, plan.num_steps(2)) == (
            per_epoch,
            last,
            steps,
        )


def test_random_keys_depend_on_all_three_numbers() -> None:
    keys = {
        random_key(seed, step, number)
        for seed in range(5)
        for step in range(5)
        for number in range(5)
    }
    assert len(keys) == 125
    assert all(0 <= key < 2**63 for key in keys)


@given(
    world_size=st.integers(1, 9),
    effective_batch_size=st.integers(1, 300),
    micro_batch=st.integers(1, 20),
    micro_batches=st.integers(1, 9),
)
def test_any_two_give_the_third(
    world_size: int, effective_batch_size: int, micro_batch: int, micro_batches: int
) -> None:
    one = solve(world_size, effective_batch_size=effective_batch_size, micro_batch_size=micro_batch)
    assert one.effective_batch_size == effective_batch_size
    assert (
        (one.gradient_accumulation_steps - 1) * micro_batch * world_size
        < effective_batch_size
        <= one.gradient_accumulation_steps * micro_batch * world_size
    )
    window = Plan(effective_batch_size, effective_batch_size, one.micro_batch_size).window()
    assert len(window.of_rank(0, world_size)) == one.gradient_accumulation_steps
    two = solve(world_size, micro_batch_size=micro_batch, gradient_accumulation_steps=micro_batches)
    assert two.effective_batch_size == micro_batch * micro_batches * world_size
    assert two.even
    try:
        three = solve(
            world_size,
            effective_batch_size=effective_batch_size,
            gradient_accumulation_steps=micro_batches,
        )
    except ConfigError:
        sizes = {
            solve(world_size, effective_batch_size, size).gradient_accumulation_steps
            for size in range(1, effective_batch_size + 1)
        }
        assert micro_batches not in sizes  # no micro-batch size gives so many
    else:
        assert (three.effective_batch_size, three.gradient_accumulation_steps) == (
            effective_batch_size,
            micro_batches,
        )
        assert (
            Plan(effective_batch_size, effective_batch_size, three.micro_batch_size)
            .window()
            .of_rank(0, world_size)
        )


def test_with_fewer_than_two_the_rest_has_defaults() -> None:
    assert solve(2).effective_batch_size == 2 * DEFAULT_MICRO_BATCH_SIZE
    assert (
        solve(2, gradient_accumulation_steps=3).effective_batch_size == 6 * DEFAULT_MICRO_BATCH_SIZE
    )
    assert solve(2, micro_batch_size=5).effective_batch_size == 10
    assert solve(2, effective_batch_size=64).gradient_accumulation_steps == 4
    assert solve(1, effective_batch_size=3).micro_batch_size == 3


def test_all_three_must_agree() -> None:
    assert solve(2, effective_batch_size=48, micro_batch_size=8, gradient_accumulation_steps=3).even
    with pytest.raises(
        ConfigError,
        match=(
            r"gradient_accumulation_steps=4 contradicts"
            r" accum.effective_batch_size=48.*effective_batch_size=64"
        ),
    ):
        solve(2, effective_batch_size=48, micro_batch_size=8, gradient_accumulation_steps=4)


def test_a_refusal_names_the_nearest_plans() -> None:
    with pytest.raises(
        ConfigError,
        match=(
            r"needs 12\.5 micro-batches of 8 .* accum.effective_batch_size=96 or 104, or"
            r" accum.micro_batch_size=5"
        ),
    ):
        solve(1, effective_batch_size=100, micro_batch_size=8, ragged=Ragged.refuse)
    with pytest.raises(ConfigError, match=r"use 16|effective_batch_size=16"):
        solve(2, effective_batch_size=3, micro_batch_size=8, ragged=Ragged.refuse)
    assert (
        solve(
            4, effective_batch_size=64, micro_batch_size=4, ragged=Ragged.refuse
        ).gradient_accumulation_steps
        == 4
    )


def test_effective_batch_in_tokens() -> None:
    assert samples_of_tokens(1024, 128) == 8
    with pytest.raises(ConfigError, match=r"7\.812 samples of 128 tokens. Use 896 or 1024"):
        samples_of_tokens(1000, 128)
    with pytest.raises(ConfigError, match="samples of one length"):
        samples_of_tokens(1000, None)


@pytest.mark.parametrize(
    "name", ["effective_batch_size", "micro_batch_size", "gradient_accumulation_steps"]
)
def test_counts_are_positive(name: str) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        solve(2, **{name: 0})
