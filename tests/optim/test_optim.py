"""Optimizers against formulas, decay groups against lists, schedules against arithmetic."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hydra import compose, initialize_config_dir
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from distaccum.errors import ConfigError
from distaccum.optim import (
    LRRule,
    LRSchedule,
    OptimConfig,
    OptimImplementation,
    OptimName,
    ScaleConfig,
    ScheduleConfig,
    ScheduleName,
    ScheduleUnit,
    decay_groups,
    lr_factor,
    lr_scale,
    make_optimizer,
    scaled_beta2,
    with_warmup,
)

CONF = Path(__file__).parents[2] / "conf"
CURVE = ScheduleConfig(
    name=ScheduleName.linear,
    unit=ScheduleUnit.steps,
    warmup=0,
    total=None,
    decay=4,
    final_ratio=0.0,
)
NO_SCALE = ScaleConfig(lr=LRRule.none, base_batch=None, beta2=False)
ADAMW = OptimConfig(
    name=OptimName.adamw,
    lr=0.01,
    beta1=0.9,
    beta2=0.95,
    eps=1e-8,
    momentum=0.0,
    weight_decay=0.1,
    implementation=OptimImplementation.loop,
    clip_norm=None,
    schedule=CURVE,
    scale=NO_SCALE,
)


def curve(name: str, **changes: Any) -> ScheduleConfig:
    return dataclasses.replace(CURVE, name=ScheduleName(name), **changes)


class Net(nn.Module):
    """Matrices, a kernel, norms, biases, a scalar, a tied matrix and a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.conv = nn.Conv1d(4, 4, 3)
        self.norm = nn.LayerNorm(4)
        self.scale = nn.Parameter(torch.ones(()))
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.head = nn.Linear(4, 5)
        self.head.weight = self.embedding.weight


def names(model: nn.Module, group: dict[str, Any]) -> list[str]:
    by_id = {id(parameter): name for name, parameter in model.named_parameters()}
    return [by_id[id(parameter)] for parameter in group["params"]]


# -- groups and optimizers


def test_matrices_decay_and_vectors_do_not_each_once() -> None:
    model = Net()
    decaying, others = decay_groups(model, 0.3)
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    assert names(model, decaying) == ["embedding.weight", "conv.weight"]
    assert sorted(names(model, others)) == sorted(
        ["scale", "conv.bias", "norm.weight", "norm.bias", "head.bias"]
    )


def test_an_empty_group_is_left_out() -> None:
    assert len(decay_groups(nn.Linear(2, 2, bias=False), 0.1)) == 1
    assert decay_groups(nn.Linear(2, 2).requires_grad_(False), 0.1) == []


def test_sharded_parameters_are_judged_by_their_whole() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 1))
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        decaying, others = decay_groups(model, 0.3)
        assert names(model, decaying) == ["0.weight", "2.weight"]
        assert names(model, others) == ["0.bias", "1.weight", "1.bias", "2.bias"]
        optimizer = make_optimizer(model, ADAMW)
        model(torch.ones(2, 4)).sum().backward()
        before = model[0].weight.full_tensor().clone()
        optimizer.step()
        assert not torch.equal(before, model[0].weight.full_tensor())
    finally:
        dist.destroy_process_group()


def trained(config: OptimConfig, num_steps: int = 20) -> list[torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    optimizer = make_optimizer(model, config)
    schedule = LRSchedule(optimizer, curve("cosine", warmup=3), num_steps)
    x = torch.randn(32, 6, dtype=torch.float64)
    for step in range(num_steps):
        schedule.set(step)
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.detach() for parameter in model.parameters()]


@pytest.mark.parametrize("name", list(OptimName))
def test_implementations_agree(name: OptimName) -> None:
    config = dataclasses.replace(ADAMW, name=name, momentum=0.9)
    by_loop = trained(config)
    for implementation in (
        OptimImplementation.foreach,
        OptimImplementation.fused,
        OptimImplementation.auto,
    ):
        other = trained(dataclasses.replace(config, implementation=implementation))
        for one, two in zip(by_loop, other, strict=True):
            torch.testing.assert_close(one, two, rtol=0, atol=1e-12)


@pytest.mark.parametrize("implementation", list(OptimImplementation))
def test_the_implementation_is_the_one_asked_for(implementation: OptimImplementation) -> None:
    optimizer = make_optimizer(
        nn.Linear(2, 2), dataclasses.replace(ADAMW, implementation=implementation)
    )
    # parameters on the CPU
    chosen = "foreach" if implementation is OptimImplementation.auto else implementation.value
    for group in optimizer.param_groups:
        assert (group["foreach"], group["fused"]) == (chosen == "foreach", chosen == "fused")


def test_adamw_by_hand() -> None:
    """Two steps on one matrix with gradients 2 and -1, and a bias with the same gradients but no
    decay."""
    model = nn.Linear(1, 1).double()
    nn.init.constant_(model.weight, 1.0)
    nn.init.constant_(model.bias, 1.0)
    optimizer = make_optimizer(model, ADAMW)
    expected = [1.0, 1.0]
    mean = square = 0.0
    for step, gradient in enumerate([2.0, -1.0], start=1):
        model.weight.grad = torch.full_like(model.weight, gradient)
        model.bias.grad = torch.full_like(model.bias, gradient)
        optimizer.step()
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.95 * square + 0.05 * gradient**2
        update = mean / (1 - 0.9**step) / (math.sqrt(square / (1 - 0.95**step)) + 1e-8)
        expected = [
            value * (1 - 0.01 * decay) - 0.01 * update
            for value, decay in zip(expected, (0.1, 0), strict=True)
        ]
    assert model.weight.item() == pytest.approx(expected[0], abs=1e-14)
    assert model.bias.item() == pytest.approx(expected[1], abs=1e-14)


def test_sgd_by_hand() -> None:
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(model.weight, 1.0)
    optimizer = make_optimizer(
        model, dataclasses.replace(ADAMW, name=OptimName.sgd, momentum=0.5, lr=0.1)
    )
    value, velocity = 1.0, 0.0
    for gradient in (2.0, -1.0):
        model.weight.grad = torch.full_like(model.weight, gradient)
        optimizer.step()
        velocity = 0.5 * velocity + gradient + 0.1 * value
        value -= 0.1 * velocity
    assert model.weight.item() == pytest.approx(value, abs=1e-14)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": -0.5}, r"optim.lr \(-0.5\)"),
        ({"lr": math.nan}, r"optim.lr \(nan\)"),
        ({"beta1": 1.0}, r"optim.beta1 \(1.0\) must be in \[0, 1\)"),
        ({"beta2": -0.1}, r"optim.beta2 \(-0.1\)"),
        ({"momentum": 1.5}, r"optim.momentum \(1.5\)"),
        ({"eps": 0.0}, r"optim.eps \(0.0\)"),
        ({"weight_decay": math.inf}, r"optim.weight_decay \(inf\)"),
        ({"clip_norm": 0.0}, r"optim.clip_norm \(0.0\).*null"),
    ],
)
def test_numbers_outside_their_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_optimizer(nn.Linear(2, 2), dataclasses.replace(ADAMW, **changes))


def test_nothing_to_train() -> None:
    with pytest.raises(ConfigError, match=r"0 trainable parameters \(2 are frozen\)"):
        make_optimizer(nn.Linear(2, 2).requires_grad_(False), ADAMW)


@pytest.mark.parametrize("name", list(OptimName))
def test_conf(name: OptimName) -> None:
    with initialize_config_dir(str(CONF / "optim"), version_base="1.3"):
        raw = compose(name.value)
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(OptimConfig), raw))
    assert isinstance(config, OptimConfig)
    assert config.name is name
    assert config.scale == NO_SCALE
    optimizer = make_optimizer(nn.Linear(2, 2), config)
    assert type(optimizer).__name__.lower() == name.value
    for curve_name in ScheduleName:
        schedule = with_warmup(dataclasses.replace(config.schedule, name=curve_name), 200, 20)
        assert schedule.warmup == 20
        assert lr_factor(200, schedule, 200) == (
            1.0 if curve_name is ScheduleName.constant else 0.1
        )


# -- schedules


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (curve("constant"), [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        (curve("constant", warmup=4), [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1]),
        (curve("linear"), [1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8, 0, 0]),
        (curve("linear", warmup=4), [0.25, 0.5, 0.75, 1, 1, 0.75, 0.5, 0.25, 0, 0]),
        (
            curve("linear", warmup=4, final_ratio=0.5),
            [0.25, 0.5, 0.75, 1, 1, 0.875, 0.75, 0.625, 0.5, 0.5],
        ),
        (curve("linear", total=4), [1, 0.75, 0.5, 0.25, 0, 0, 0, 0, 0, 0]),
        (
            curve("cosine", warmup=2, total=6),
            [0.5, 1, 1, 0.5 + 0.125**0.5, 0.5, 0.5 - 0.125**0.5, 0, 0, 0, 0],
        ),
        (
            curve("cosine", total=2, final_ratio=0.2),
            [1, 0.6, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2],
        ),
        (curve("wsd", warmup=2), [0.5, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0, 0]),
        (curve("wsd", warmup=4), [0.25, 0.5, 0.75, 1, 1, 0.75, 0.5, 0.25, 0, 0]),
        (curve("wsd", decay=2, final_ratio=0.5), [1, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.5]),
    ],
)
def test_factors_by_arithmetic(schedule: ScheduleConfig, expected: list[float]) -> None:
    """Positions 0 to 9 of a training of 8 steps: the last step is at 7, the end at 8."""
    assert [lr_factor(position, schedule, 8) for position in range(10)] == pytest.approx(
        expected, abs=1e-15
    )


lengths = st.integers(0, 10**6)
decaying = st.sampled_from(["linear", "cosine", "wsd"])


@st.composite
def schedules(draw: st.DrawFn) -> tuple[ScheduleConfig, int]:
    warmup, stable, decay = draw(lengths), draw(lengths), draw(st.integers(1, 10**6))
    final_ratio = draw(st.floats(0, 1))
    return (
        curve(draw(decaying), warmup=warmup, decay=decay, final_ratio=final_ratio),
        warmup + stable + decay,
    )


@settings(deadline=None)
@given(schedules(), st.floats(0, 1.2))
def test_factor_stays_in_its_bounds(case: tuple[ScheduleConfig, int], part: float) -> None:
    schedule, total = case
    factor = lr_factor(part * total, schedule, total)
    assert (
        0 < factor <= 1 if part * total < schedule.warmup else schedule.final_ratio <= factor <= 1
    )


@settings(deadline=None)
@given(schedules())
def test_the_ends_are_exact(case: tuple[ScheduleConfig, int]) -> None:
    schedule, total = case
    first = lr_factor(0, schedule, total)
    assert first == (1 / schedule.warmup if schedule.warmup else 1)
    assert lr_factor(schedule.warmup, schedule, total) == 1
    assert (
        lr_factor(total, schedule, total)
        == lr_factor(total + 1, schedule, total)
        == schedule.final_ratio
    )


@settings(deadline=None)
@given(schedules(), st.lists(st.floats(0, 1.1), min_size=2, max_size=20))
def test_up_then_down(case: tuple[ScheduleConfig, int], parts: list[float]) -> None:
    schedule, total = case
    positions = sorted(part * total for part in parts)
    factors = [lr_factor(position, schedule, total) for position in positions]
    up = [
        factor
        for position, factor in zip(positions, factors, strict=True)
        if position < schedule.warmup
    ]
    down = factors[len(up) :]
    assert up == sorted(up)
    # (1 + cos) / 2 is rounded in its last bit.
    assert all(later <= earlier + 1e-15 for earlier, later in pairwise(down))


@settings(deadline=None)
@given(schedules(), st.floats(0, 1.1), st.floats(0, 2))
def test_continuous(case: tuple[ScheduleConfig, int], part: float, distance: float) -> None:
    """No two positions differ by more than the steepest slope times their distance."""
    schedule, total = case
    length = schedule.decay if schedule.name is ScheduleName.wsd else total - schedule.warmup
    slope = max(1 / schedule.warmup if schedule.warmup else 0, math.pi / 2 / length)
    here = lr_factor(part * total, schedule, total)
    there = lr_factor(part * total + distance, schedule, total)
    assert abs(here - there) <= slope * distance + 1e-12


@pytest.mark.parametrize("name", ["linear", "cosine", "wsd"])
def test_trap_13_the_curve_ends_at_zero_whatever_ranks_and_micro_batches(name: str) -> None:
    """In samples: 12 windows of 48, made by any ranks x micro-batches, give the same curve as 12
    steps, and it ends at 0."""
    in_steps = curve(name, warmup=2)
    in_samples = curve(name, unit=ScheduleUnit.samples, warmup=2 * 48, decay=4 * 48)
    decayed = [lr_factor(step, in_steps, 12) for step in range(2, 13)]
    for ranks, micro_batches in ((1, 8), (2, 4), (4, 2), (8, 1)):
        window = ranks * micro_batches * 6
        assert [
            lr_factor(step * window, in_samples, 12 * 48) for step in range(2, 13)
        ] == pytest.approx(decayed)
    assert decayed[-1] == 0
    assert decayed[-2] > 0


def test_setting_is_by_position_and_of_each_group() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(
        [{"params": [model.weight], "lr": 2.0}, {"params": [model.bias], "lr": 8.0}]
    )
    schedule = LRSchedule(optimizer, curve("linear"), 4)
    assert [group["lr"] for group in optimizer.param_groups] == [2.0, 8.0]
    for position in (3, 0, 2, 2, 9, 1):  # in any order, any number of times
        schedule.set(position)
        left = max(0.0, 1 - position / 4)
        assert [group["lr"] for group in optimizer.param_groups] == [2 * left, 8 * left]


@pytest.mark.parametrize("load_first", [True, False])
def test_a_resumed_run_is_on_the_same_curve(load_first: bool) -> None:
    optimizer = make_optimizer(nn.Linear(2, 2), ADAMW)
    LRSchedule(optimizer, curve("linear"), 8).set(6)
    assert optimizer.param_groups[0]["lr"] == 0.0025
    resumed = make_optimizer(nn.Linear(2, 2), ADAMW)
    schedule = None if load_first else LRSchedule(resumed, curve("linear"), 8)
    resumed.load_state_dict(optimizer.state_dict())
    schedule = schedule or LRSchedule(resumed, curve("linear"), 8)
    schedule.set(7)
    assert [group["lr"] for group in resumed.param_groups] == [0.00125, 0.00125]


@pytest.mark.parametrize(
    ("schedule", "total", "message"),
    [
        (
            curve("linear"),
            None,
            r"name=linear needs an end\. Set optim.schedule.total \(in steps\)",
        ),
        (curve("cosine", warmup=-1), 8, r"warmup \(-1\)"),
        (curve("cosine", final_ratio=1.5), 8, r"final_ratio \(1.5\)"),
        (
            curve("cosine", warmup=8),
            8,
            r"a warmup of 8 .* cosine .* into 8 steps\. Use a warmup of at most 7",
        ),
        (
            curve("linear", warmup=9, total=5),
            80,
            r"a warmup of 9 .* linear .* into 5 steps\. Use a warmup of at most 4",
        ),
        (
            curve("wsd", decay=100),
            3,
            r"a warmup of 0 .* \(at least 100\) .* into 3 steps\. Use a decay of at most 3",
        ),
        (
            curve("wsd", warmup=5),
            8,
            r"a warmup of 5 .* wsd \(at least 4\) .* into 8 steps\. Use a warmup of at most 4",
        ),
        (curve("wsd", decay=0), 8, r"decay \(0\) must be at least 1"),
        (curve("wsd", decay=9), 8, r"wsd \(at least 9\) .* into 8 steps"),
    ],
)
def test_schedules_that_do_not_fit(
    schedule: ScheduleConfig, total: int | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        lr_factor(0, schedule, total)
    with pytest.raises(ConfigError, match=message):
        LRSchedule(make_optimizer(nn.Linear(2, 2), ADAMW), schedule, total)


@pytest.mark.parametrize(
    ("schedule", "total", "tenth", "expected"),
    [
        (curve("cosine", warmup="auto"), 3, 0, 0),
        (curve("cosine", warmup="auto"), 45, 4, 4),
        # a tenth of the curve, which ends before the training
        (curve("linear", warmup="auto", total=50), 200, 20, 5),
        (curve("linear", warmup="auto", unit=ScheduleUnit.samples), 10**6, 960, 960),
        (curve("wsd", warmup="auto", decay=98), 100, 10, 2),  # never into the decay
        (curve("wsd", warmup="auto", decay=200), 100, 10, 0),
        (curve("constant", warmup="auto"), 100, 10, 10),
        # a number is left alone, and refused where it does not fit
        (curve("cosine", warmup=7), 3, 0, 7),
    ],
)
def test_an_automatic_warmup_fits(
    schedule: ScheduleConfig, total: int, tenth: int, expected: int
) -> None:
    assert with_warmup(schedule, total, tenth).warmup == expected


def test_an_automatic_warmup_of_unknown_length_is_refused() -> None:
    schedule = curve("cosine", warmup="auto", unit=ScheduleUnit.tokens, total=1000)
    told = (
        r"warmup=auto cannot be converted to tokens.*Set optim.schedule.warmup in tokens \(0 for"
        r" none\)"
    )
    with pytest.raises(ConfigError, match=told):
        with_warmup(schedule, None, None)
    assert with_warmup(dataclasses.replace(schedule, warmup=5), None, None).warmup == 5


def test_constant_needs_no_end_and_positions_start_at_zero() -> None:
    assert lr_factor(10**9, curve("constant", warmup=10), None) == 1
    with pytest.raises(ValueError, match="got -1"):
        lr_factor(-1, curve("constant"), None)


# -- what follows the effective batch

BOTH = ScaleConfig(lr=LRRule.sqrt, base_batch=16, beta2=True)


def test_rules_by_hand() -> None:
    assert [lr_scale(4.0, rule) for rule in (LRRule.none, LRRule.linear, LRRule.sqrt)] == [1, 4, 2]
    assert [lr_scale(0.25, rule) for rule in (LRRule.none, LRRule.linear, LRRule.sqrt)] == [
        1,
        0.25,
        0.5,
    ]
    assert scaled_beta2(0.5, 2.0) == 0.25
    assert scaled_beta2(0.81, 0.5) == pytest.approx(0.9, abs=1e-15)
    # 0.95 at 512 samples is about 0.9999 at 1: 0.95 ** (1 / 512) = exp(-0.05129329 / 512).
    assert scaled_beta2(0.95, 1 / 512) == pytest.approx(1 - 0.05129329 / 512, abs=1e-8)


@given(beta2=st.floats(0.5, 0.9999), base=st.integers(1, 10**6), batch=st.integers(1, 10**6))
def test_the_half_life_in_samples_stays(beta2: float, base: int, batch: int) -> None:
    scaled = scaled_beta2(beta2, batch / base)
    assert 0 <= scaled <= 1
    assert scaled_beta2(beta2, base / base) == beta2
    # samples until half is left = batch x log(1/2) / log(beta2); log1p(scaled - 1) loses digits
    # only as 1 - scaled does
    forgotten_per_sample = -math.log(beta2) / base
    if 1e-6 < batch * forgotten_per_sample < 100:
        # scaled is rounded by 2^-53 relative to 1, so its log by about 2^-53 absolutely: at most
        # 2e-10 of 1e-6.
        assert -math.log(scaled) / batch == pytest.approx(forgotten_per_sample, rel=1e-9)


def test_lr_and_beta2_follow_the_effective_batch_of_each_window() -> None:
    optimizer = make_optimizer(nn.Linear(2, 2), dataclasses.replace(ADAMW, beta2=0.81))
    schedule = LRSchedule(optimizer, curve("linear"), 8, BOTH)
    for (
        position,
        batch,
        lr,
        beta2,
    ) in (  # in any order: 0.01 x (1 - position / 8) x sqrt(batch / 16)
        (4, 64, 0.01, 0.81**4),
        (0, 16, 0.01, 0.81),
        (6, 4, 0.00125, 0.81**0.25),
        (4, 64, 0.01, 0.81**4),
    ):
        schedule.set(position, batch)
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(lr, rel=1e-15)
            assert group["betas"] == (0.9, pytest.approx(beta2, rel=1e-15))
    schedule.set(0, 16)
    assert [(g["lr"], g["betas"]) for g in optimizer.param_groups] == [
        (0.01, (0.9, 0.81))
    ] * 2  # exact at the base


def test_linear_for_sgd() -> None:
    optimizer = make_optimizer(
        nn.Linear(2, 2), dataclasses.replace(ADAMW, name=OptimName.sgd, lr=0.5)
    )
    schedule = LRSchedule(
        optimizer, curve("constant"), None, ScaleConfig(LRRule.linear, 16, beta2=False)
    )
    schedule.set(0, 64)
    assert [group["lr"] for group in optimizer.param_groups] == [2.0, 2.0]


def test_adam_uses_the_beta2_that_was_set() -> None:
    """One parameter, gradients 2 and -1 at batches 16 and 64: the second step forgets 0.95 ** 4 of
    the square."""
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(model.weight, 1.0)
    optimizer = make_optimizer(model, dataclasses.replace(ADAMW, weight_decay=0.0))
    schedule = LRSchedule(optimizer, curve("constant"), None, BOTH)
    value, mean, square = 1.0, 0.0, 0.0
    for step, (gradient, batch) in enumerate([(2.0, 16), (-1.0, 64)], start=1):
        schedule.set(step - 1, batch)
        model.weight.grad = torch.full_like(model.weight, gradient)
        optimizer.step()
        beta2 = 0.95 ** (batch / 16)
        mean = 0.9 * mean + 0.1 * gradient
        square = beta2 * square + (1 - beta2) * gradient**2
        update = mean / (1 - 0.9**step) / (math.sqrt(square / (1 - beta2**step)) + 1e-8)
        value -= 0.01 * math.sqrt(batch / 16) * update
    assert model.weight.item() == pytest.approx(value, abs=1e-14)


@pytest.mark.parametrize("load_first", [True, False])
@pytest.mark.parametrize("scale", [BOTH, NO_SCALE], ids=["scaled", "scaled no more"])
def test_a_resumed_run_scales_what_was_configured_not_what_was_saved(
    load_first: bool, scale: ScaleConfig
) -> None:
    saved = make_optimizer(nn.Linear(2, 2), ADAMW)
    LRSchedule(saved, curve("linear"), 8, BOTH).set(3, 64)
    assert saved.param_groups[0]["betas"][1] == 0.95**4
    resumed = make_optimizer(nn.Linear(2, 2), ADAMW)
    schedule = None if load_first else LRSchedule(resumed, curve("linear"), 8, scale)
    resumed.load_state_dict(saved.state_dict())
    schedule = schedule or LRSchedule(resumed, curve("linear"), 8, scale)
    straight = make_optimizer(nn.Linear(2, 2), ADAMW)
    LRSchedule(straight, curve("linear"), 8, scale).set(4, 256)
    schedule.set(4, 256)
    for one, other in zip(resumed.param_groups, straight.param_groups, strict=True):
        assert (one["lr"], one["betas"]) == (other["lr"], other["betas"])  # to the last bit


@pytest.mark.parametrize("scale", [None, NO_SCALE])
def test_without_a_rule_the_batch_changes_nothing(scale: ScaleConfig | None) -> None:
    optimizer = make_optimizer(nn.Linear(2, 2), ADAMW)
    schedule = LRSchedule(optimizer, curve("cosine", warmup=2), 8, scale)
    for position in range(8):
        schedule.set(position, *([] if position % 2 else [64]))
        expected = 0.01 * lr_factor(position, curve("cosine", warmup=2), 8)
        assert [(g["lr"], g["betas"]) for g in optimizer.param_groups] == [
            (expected, (0.9, 0.95))
        ] * 2


@pytest.mark.parametrize(
    ("name", "scale", "message"),
    [
        (
            OptimName.sgd,
            BOTH,
            r"scale.beta2=true needs an optimizer with betas, but SGD has none\. Use optim=adamw",
        ),
        (
            OptimName.adamw,
            dataclasses.replace(BOTH, base_batch=0),
            r"scale.base_batch \(0\) .* at least 1",
        ),
        (OptimName.adamw, dataclasses.replace(BOTH, base_batch=None), r"scale.base_batch \(None\)"),
    ],
)
def test_scalings_without_a_meaning(name: OptimName, scale: ScaleConfig, message: str) -> None:
    optimizer = make_optimizer(nn.Linear(2, 2), dataclasses.replace(ADAMW, name=name))
    with pytest.raises(ConfigError, match=message):
        LRSchedule(optimizer, CURVE, 8, scale)


def test_a_scale_asks_for_the_batch() -> None:
    schedule = LRSchedule(make_optimizer(nn.Linear(2, 2), ADAMW), CURVE, 8, BOTH)
    with pytest.raises(ValueError, match=r"set\(position, window.effective_batch_size\)"):
        schedule.set(0)
