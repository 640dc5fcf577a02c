"""The plan is arithmetic: every sample exactly once per epoch, whatever the world size and wherever a run resumes."""

from __future__ import annotations

from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distaccum.errors import ConfigError
from distaccum.plan import DEFAULT_MICRO, LastWindow, Plan, Ragged, random_key, samples_of_tokens, solve

sizes = st.integers(1, 60)
plans = st.builds(
    Plan,
    num_samples=st.integers(1, 200),
    effective_batch=sizes,
    micro_size=st.integers(1, 12),
    seed=st.integers(0, 5),
    last_window=st.sampled_from([LastWindow.keep, LastWindow.fill]),
)


def samples_of(plan: Plan, windows: int, world_size: int, step: int = 0, start: int = 0) -> list[int]:
    """All samples of some windows, gathered rank by rank."""
    found = []
    for window in islice(plan.windows(step, start), windows):
        by_number = {m.number: m for rank in range(world_size) for m in window.deal(rank, world_size)}
        assert sorted(by_number) == list(range(len(by_number)))
        for number in sorted(by_number):
            found += plan.samples(by_number[number])
    return found


@settings(deadline=None)
@given(plan=plans, world_size=st.integers(1, 9))
def test_every_sample_exactly_once_per_epoch(plan: Plan, world_size: int) -> None:
    windows = (
        plan.num_steps(3) if plan.last_window is LastWindow.keep else -(-3 * plan.num_samples // plan.effective_batch)
    )
    found = samples_of(plan, windows, world_size)
    for epoch in range(3):
        part = found[epoch * plan.num_samples : (epoch + 1) * plan.num_samples]
        assert sorted(part) == list(range(plan.num_samples))


@settings(deadline=None)
@given(plan=plans, stop=st.integers(0, 20), before=st.integers(1, 9), after=st.integers(1, 9))
def test_a_resumed_run_continues_where_it_stopped_on_any_world_size(
    plan: Plan, stop: int, before: int, after: int
) -> None:
    whole = samples_of(plan, stop + 10, before)
    window = next(islice(plan.windows(), stop, None))
    resumed = samples_of(plan, 10, after, step=window.step, start=window.start)
    assert whole[len(whole) - len(resumed) :] == resumed


@settings(deadline=None)
@given(plan=plans, world_size=st.integers(1, 9))
def test_micros_do_not_depend_on_the_world_size(plan: Plan, world_size: int) -> None:
    for window in islice(plan.windows(), 5):
        dealt = [window.deal(rank, world_size) for rank in range(world_size)]
        assert sorted((m for micros in dealt for m in micros), key=lambda m: m.number) == list(window.micros)
        counts = [len(micros) for micros in dealt]
        assert max(counts) - min(counts) <= 1
        micro_sizes = [m.size for m in window.micros]
        assert sum(micro_sizes) == window.size
        assert max(micro_sizes) <= plan.micro_size
        assert max(micro_sizes) - min(micro_sizes) <= 1


@settings(deadline=None)
@given(num_samples=st.integers(1, 200), effective_batch=sizes, seed=st.integers(0, 3))
def test_drop_uses_each_sample_at_most_once_and_only_full_windows(
    num_samples: int, effective_batch: int, seed: int
) -> None:
    if num_samples < effective_batch:
        with pytest.raises(ConfigError, match="leaves nothing"):
            Plan(num_samples, effective_batch, 4, seed, LastWindow.drop)
        return
    plan = Plan(num_samples, effective_batch, 4, seed, LastWindow.drop)
    for epoch in range(2):
        windows = [w for w in islice(plan.windows(), plan.num_steps(2)) if w.epoch == epoch]
        assert [w.size for w in windows] == [effective_batch] * plan.windows_per_epoch
        found = [s for w in windows for m in w.micros for s in plan.samples(m)]
        assert len(found) == len(set(found)) == num_samples // effective_batch * effective_batch


def test_epochs_differ_and_seeds_differ() -> None:
    plan = Plan(100, 10, 5, seed=1)
    first, second = samples_of(plan, 10, 1), samples_of(plan, 10, 1, 10, 100)
    other = samples_of(Plan(100, 10, 5, seed=2), 10, 1)
    assert first != second
    assert first != other
    assert samples_of(Plan(100, 10, 5, shuffle=False), 10, 1) == list(range(100))


def test_windows_per_epoch_and_the_last_window() -> None:
    for kind, per_epoch, last, steps in (
        (LastWindow.keep, 4, 4, 8),
        (LastWindow.drop, 3, 7, 6),
        (LastWindow.fill, 4, 7, 7),  # 50 samples in two epochs: seven full windows, one sample not begun
    ):
        plan = Plan(25, 7, 3, last_window=kind)
        assert (plan.windows_per_epoch, plan.last_window_size, plan.num_steps(2)) == (per_epoch, last, steps)


def test_random_keys_depend_on_all_three_numbers() -> None:
    keys = {random_key(seed, step, number) for seed in range(5) for step in range(5) for number in range(5)}
    assert len(keys) == 125
    assert all(0 <= key < 2**63 for key in keys)


@given(
    world_size=st.integers(1, 9),
    effective_batch=st.integers(1, 300),
    micro=st.integers(1, 20),
    micros=st.integers(1, 9),
)
def test_any_two_give_the_third(world_size: int, effective_batch: int, micro: int, micros: int) -> None:
    one = solve(world_size, effective_batch=effective_batch, micro_size=micro)
    assert one.effective_batch == effective_batch
    assert (one.num_micros - 1) * micro * world_size < effective_batch <= one.num_micros * micro * world_size
    window = Plan(effective_batch, effective_batch, one.micro_size).window()
    assert len(window.deal(0, world_size)) == one.num_micros
    two = solve(world_size, micro_size=micro, num_micros=micros)
    assert two.effective_batch == micro * micros * world_size
    assert two.even
    try:
        three = solve(world_size, effective_batch=effective_batch, num_micros=micros)
    except ConfigError:
        sizes = {solve(world_size, effective_batch, size).num_micros for size in range(1, effective_batch + 1)}
        assert micros not in sizes  # no micro size gives so many
    else:
        assert (three.effective_batch, three.num_micros) == (effective_batch, micros)
        assert Plan(effective_batch, effective_batch, three.micro_size).window().deal(0, world_size)


def test_with_fewer_than_two_the_rest_has_defaults() -> None:
    assert solve(2).effective_batch == 2 * DEFAULT_MICRO
    assert solve(2, num_micros=3).effective_batch == 6 * DEFAULT_MICRO
    assert solve(2, micro_size=5).effective_batch == 10
    assert solve(2, effective_batch=64).num_micros == 4
    assert solve(1, effective_batch=3).micro_size == 3


def test_all_three_must_agree() -> None:
    assert solve(2, effective_batch=48, micro_size=8, num_micros=3).even
    with pytest.raises(ConfigError, match=r"num_micros=4 contradicts accum.effective_batch=48.*effective_batch=64"):
        solve(2, effective_batch=48, micro_size=8, num_micros=4)


def test_a_refusal_names_the_nearest_plans() -> None:
    with pytest.raises(
        ConfigError, match=r"needs 12\.5 micro-batches of 8 .* accum.effective_batch=96 or 104, or accum.micro=5"
    ):
        solve(1, effective_batch=100, micro_size=8, ragged=Ragged.refuse)
    with pytest.raises(ConfigError, match=r"use 16|effective_batch=16"):
        solve(2, effective_batch=3, micro_size=8, ragged=Ragged.refuse)
    assert solve(4, effective_batch=64, micro_size=4, ragged=Ragged.refuse).num_micros == 4


def test_effective_batch_in_tokens() -> None:
    assert samples_of_tokens(1024, 128) == 8
    with pytest.raises(ConfigError, match=r"7\.812 samples of 128 tokens. Use 896 or 1024"):
        samples_of_tokens(1000, 128)
    with pytest.raises(ConfigError, match="samples of one length"):
        samples_of_tokens(1000, None)


@pytest.mark.parametrize("name", ["effective_batch", "micro_size", "num_micros"])
def test_counts_are_positive(name: str) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        solve(2, **{name: 0})
