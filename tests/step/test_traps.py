"""The cases of well-known frameworks that go wrong, one test a row, by arithmetic.

Unless said otherwise: y = w * x in float64, w0 = 0, SGD with lr 1 and a loss that is the sum of
outputs, so that the update is minus the mean of x over everything counted.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from setting import make_micro_batch, make_model, masked_objective, relative, whole, wrap
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from worlds import World

import distaccum as da
from distaccum.data.loader import Loader


def linear(dtype: torch.dtype = torch.float64) -> nn.Linear:
    model = nn.Linear(1, 1, bias=False, dtype=dtype)
    nn.init.zeros_(model.weight)
    return model


def mean_of_outputs() -> da.Objective:
    """Each sample counts once."""
    return da.Objective(lambda model, x: model(x).sum(), lambda x: len(x))


def token_objective() -> da.Objective:
    """Micro-batches are pairs of x [B, 1] and a mask [B] of tokens that count."""
    return da.Objective(
        lambda model, xm: (model(xm[0])[:, 0] * xm[1]).sum(), lambda xm: int(xm[1].sum())
    )


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None]


def updates(
    loader: Iterable[Any], gradient_accumulation_steps: int, epochs: int = 1, objective: Any = None
) -> list[float]:
    """The updates of w, as positive numbers, over windows of a loader."""
    model = linear()
    if dist.is_initialized() and dist.get_world_size() > 1:
        model = DistributedDataParallel(model)
    weight = next(model.parameters())
    accumulator = da.Accumulator(
        model, torch.optim.SGD(model.parameters(), lr=1.0), objective or mean_of_outputs()
    )
    found = []
    for _ in range(epochs):
        for window in da.windows(loader, gradient_accumulation_steps=gradient_accumulation_steps):
            before = float(weight.detach())
            accumulator.step(window)
            found.append(before - float(weight.detach()))
    return found


# Rank functions stand beside the test that uses them.


def one_micro_batch_in_the_last_window() -> list[float]:
    return updates([column(1.0)] * 5, gradient_accumulation_steps=4)


def test_trap_01_the_last_short_window_is_a_mean_of_its_own(two_ranks: World) -> None:
    assert two_ranks.run(one_micro_batch_in_the_last_window) == [[1.0, 1.0]] * 2


class Endless:
    """A loader without a length."""

    def __iter__(self) -> Iterator[Tensor]:
        yield from [column(1.0)] * 5


def two_epochs_without_length() -> list[float]:
    return updates(Endless(), gradient_accumulation_steps=4, epochs=2)


def test_trap_02_nothing_leaks_into_the_next_epoch(two_ranks: World) -> None:
    assert two_ranks.run(two_epochs_without_length) == [[1.0, 1.0, 1.0, 1.0]] * 2


def token_counts_1_9_9_9() -> list[float]:
    """One token with x = 1, and 27 with x = 0, over 2 ranks x 2 micro-batches."""
    counts = [[1, 9], [9, 9]][dist.get_rank()]
    first = dist.get_rank() == 0
    micro_batches = [
        (column(*[1.0 if first and i == 0 else 0.0] * 9), (torch.arange(9) < count).double())
        for i, count in enumerate(counts)
    ]
    return updates(micro_batches, gradient_accumulation_steps=2, objective=token_objective())


def test_trap_03_every_token_counts_once(two_ranks: World) -> None:
    for found in two_ranks.run(token_counts_1_9_9_9):
        assert found == [pytest.approx(1 / 28, rel=1e-15)]


def planned_shares(num_samples: int, micro_batch_size: int) -> list[float]:
    """What each sample contributed to one update over all of them: x is one-hot in the sample's
    number."""
    rank, size = dist.get_rank(), dist.get_world_size()
    plan = da.Plan(
        num_samples, effective_batch_size=num_samples, micro_batch_size=micro_batch_size, seed=3
    )
    model = nn.Linear(num_samples, 1, bias=False, dtype=torch.float64)
    nn.init.zeros_(model.weight)
    wrapped = DistributedDataParallel(model) if size > 1 else model
    accumulator = da.Accumulator(
        wrapped, torch.optim.SGD(model.parameters(), lr=1.0), mean_of_outputs()
    )
    rows = torch.eye(num_samples, dtype=torch.float64)
    accumulator.step(
        [rows[plan.samples(micro_batch)] for micro_batch in plan.window().of_rank(rank, size)]
    )
    return (-model.weight.detach()[0]).tolist()


@pytest.mark.parametrize(("num_samples", "micro_batch_size"), [(5, 1), (5, 2), (9, 4)])
def test_trap_04_no_sample_counts_twice(
    two_ranks: World, num_samples: int, micro_batch_size: int
) -> None:
    for shares in two_ranks.run(planned_shares, num_samples, micro_batch_size):
        assert shares == pytest.approx([1 / num_samples] * num_samples, rel=1e-15)


def all_labels_ignored() -> tuple[list[Any], list[float], list[float]]:
    torch.manual_seed(0)
    model = nn.Linear(3, 4, dtype=torch.float64)
    wrapped = DistributedDataParallel(model)
    accumulator = da.Accumulator(
        wrapped, torch.optim.AdamW(model.parameters()), da.Classification()
    )
    inputs = torch.randn(2, 3, dtype=torch.float64)
    accumulator.step([(inputs, torch.tensor([1, 2]))])
    before = model.weight.detach().flatten().tolist()
    record = accumulator.step([(inputs, torch.tensor([-100, -100]))] * 2)
    return (
        [record.skipped, record.step, record.num_micro_batches],
        before,
        model.weight.detach().flatten().tolist(),
    )


def test_trap_05_a_window_without_labels_is_skipped_by_agreement(two_ranks: World) -> None:
    for record, before, after in two_ranks.run(all_labels_ignored):
        assert record == ["denominator 0", 1, 4]
        assert after == before


def uneven_ranks() -> list[float]:
    """Rank 0 has five micro-batches of x = 1, 2, 3, 4, 5; rank 1 has one whose only token does not
    count."""
    if dist.get_rank() == 0:
        micro_batches = [
            (column(x), torch.ones(1, dtype=torch.float64)) for x in (1.0, 2.0, 3.0, 4.0, 5.0)
        ]
    else:
        micro_batches = [(column(100.0), torch.zeros(1, dtype=torch.float64))]
    return updates(micro_batches, gradient_accumulation_steps=2, objective=token_objective())


def no_micro_batch_from_the_beginning() -> list[float]:
    return updates(
        [column(1.0), column(3.0)] if dist.get_rank() == 1 else [], gradient_accumulation_steps=1
    )


def test_trap_06_ranks_with_nothing_left_wait_for_the_others(two_ranks: World) -> None:
    assert two_ranks.run(uneven_ranks) == [[1.5, 3.5, 5.0]] * 2
    assert two_ranks.run(no_micro_batch_from_the_beginning) == [[1.0, 3.0]] * 2


def generator_and_discriminator() -> tuple[int, int, list[float]]:
    """Eight iterations in windows of two; each loss runs through both models."""
    torch.manual_seed(0)
    generator = nn.Linear(2, 2, dtype=torch.float64)
    discriminator = nn.Linear(2, 1, dtype=torch.float64)
    wrapped = [DistributedDataParallel(generator), DistributedDataParallel(discriminator)]
    for_generator = da.Accumulator(
        wrapped[0],
        torch.optim.SGD(generator.parameters(), lr=0.1),
        da.Objective(lambda model, z: discriminator(model(z)).sum(), len),
    )
    for_discriminator = da.Accumulator(
        wrapped[1],
        torch.optim.SGD(discriminator.parameters(), lr=0.1),
        da.Objective(lambda model, z: (model(z) - model(generator(z).detach())).sum(), len),
    )
    noise = torch.Generator().manual_seed(dist.get_rank())
    micro_batches = [torch.randn(3, 2, generator=noise, dtype=torch.float64) for _ in range(8)]
    for window in da.windows(micro_batches, gradient_accumulation_steps=2):
        for_discriminator.step(window)
        for_generator.step(window)
    parameters = [p.detach().flatten() for m in (generator, discriminator) for p in m.parameters()]
    return for_generator.steps, for_discriminator.steps, torch.cat(parameters).tolist()


def gan_on_one_process() -> list[float]:
    """The same by hand, on all data at once."""
    torch.manual_seed(0)
    generator = nn.Linear(2, 2, dtype=torch.float64)
    discriminator = nn.Linear(2, 1, dtype=torch.float64)
    noises = [torch.Generator().manual_seed(rank) for rank in range(2)]
    for _ in range(4):
        z = torch.cat(
            [torch.randn(3, 2, generator=n, dtype=torch.float64) for n in noises for _ in range(2)]
        )
        for model, loss in (
            (
                discriminator,
                lambda z=z: (discriminator(z) - discriminator(generator(z).detach())).mean(),
            ),
            (generator, lambda z=z: discriminator(generator(z)).mean()),
        ):
            gradients = torch.autograd.grad(loss(), list(model.parameters()))
            with torch.no_grad():
                for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                    parameter -= 0.1 * gradient
    parameters = [p.detach().flatten() for m in (generator, discriminator) for p in m.parameters()]
    return torch.cat(parameters).tolist()


def test_trap_07_two_accumulators_do_not_know_of_each_other(two_ranks: World) -> None:
    expected = gan_on_one_process()
    for generator_steps, discriminator_steps, parameters in two_ranks.run(
        generator_and_discriminator
    ):
        assert (generator_steps, discriminator_steps) == (4, 4)
        assert parameters == pytest.approx(expected, rel=1e-12)


def break_and_evaluate() -> list[float]:
    """Break after the first window of an epoch; between windows, evaluate and break out of that
    loader too."""
    model = DistributedDataParallel(linear())
    weight = model.module.weight
    accumulator = da.Accumulator(
        model, torch.optim.SGD(model.parameters(), lr=1.0), mean_of_outputs()
    )
    found = []
    for _ in range(3):
        for window in da.windows(
            [column(float(x)) for x in (1, 2, 3, 4, 5)], gradient_accumulation_steps=2
        ):
            before = float(weight.detach())
            accumulator.step(window)
            found.append(before - float(weight.detach()))
            with accumulator.strategy.evaluating() as evaluated:
                for x in (column(9.0), column(9.0)):
                    evaluated(x)
                    break
            if len(found) % 2 == 0:
                break
    return found


def test_trap_08_break_and_evaluation_misalign_nothing(two_ranks: World) -> None:
    assert two_ranks.run(break_and_evaluate) == [[1.5, 3.5] * 3] * 2


def window_size_changes() -> list[float]:
    model = DistributedDataParallel(linear())
    weight = model.module.weight
    accumulator = da.Accumulator(
        model, torch.optim.SGD(model.parameters(), lr=1.0), mean_of_outputs()
    )
    windows = da.windows([column(float(x)) for x in range(1, 11)], gradient_accumulation_steps=2)
    found = []
    for window in windows:
        before = float(weight.detach())
        accumulator.step(window)
        found.append(before - float(weight.detach()))
        windows.gradient_accumulation_steps = (
            3 if len(found) == 1 else 1 if len(found) == 2 else windows.gradient_accumulation_steps
        )
    return found


def test_trap_09_the_next_window_has_the_new_size(two_ranks: World) -> None:
    assert two_ranks.run(window_size_changes) == [[1.5, 4.0, 6.0, 7.0, 8.0, 9.0, 10.0]] * 2


class Rows:
    """Twenty samples of five numbers."""

    def __len__(self) -> int:
        return 20

    def batch(self, indices: list[int], generator: torch.Generator) -> Tensor:
        return torch.sin(
            torch.arange(5, dtype=torch.float64)[None] + torch.tensor(indices)[:, None]
        )

    def num_targets(self, indices: list[int]) -> int:
        return len(indices)


def stopped_and_continued(stop: int | None) -> list[float]:
    """Six steps with dropout and AdamW in windows of 4 micro-batches per rank; fresh objects after
    `stop` steps.

    A window is computed by one call, so that a boundary is the only place at which anybody can
    save; what is carried over are the state dicts and the plan's position.
    """
    # the second window of an epoch holds 4
    plan = da.Plan(num_samples=20, effective_batch_size=16, micro_batch_size=2, seed=1)
    saved: dict[str, Any] = {"step": 0, "start": 0, "model": None, "optimizer": None}
    for last in [stop, 6] if stop is not None else [6]:
        model = DistributedDataParallel(nn.Sequential(make_model(), nn.Dropout(0.3)))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        if saved["model"] is not None:
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
        objective = da.Objective(lambda m, x: m(x).square().sum(), len)
        accumulator = da.Accumulator(model, optimizer, objective, seed=5)
        loader = Loader(Rows(), plan, dist.get_rank(), dist.get_world_size())
        for window, micro_batches in loader.windows(saved["step"], saved["start"], last):
            accumulator.step(micro_batches)
            saved = {"step": window.step + 1, "start": window.next_start}
        saved["model"], saved["optimizer"] = copy.deepcopy(
            (model.state_dict(), optimizer.state_dict())
        )
    return torch.cat([p.detach().flatten() for p in model.parameters()]).tolist()


def test_trap_10_a_run_continues_bit_for_bit_from_a_boundary(two_ranks: World) -> None:
    whole_run = two_ranks.run(stopped_and_continued, None)
    assert two_ranks.run(stopped_and_continued, 3) == whole_run
    assert two_ranks.run(stopped_and_continued, 2) == whole_run
    assert whole_run[0] == whole_run[1]


def count_all_reduces() -> tuple[int, int]:
    """Gradient bytes seen by a communication hook of torch, independent of the ledger, and
    parameter bytes."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    model = DistributedDataParallel(make_model(torch.float32))
    seen: list[int] = []

    def hook(state, bucket):  # type: ignore[no-untyped-def]  # torch reads annotations and wants them as objects
        seen.append(bucket.buffer().numel() * 4)
        return allreduce_hook(None, bucket)

    model.register_comm_hook(None, hook)
    objective = da.Objective(lambda m, x: m(x).sum(), len)
    accumulator = da.Accumulator(
        model, torch.optim.SGD(model.parameters(), lr=0.1), objective, audit="always"
    )
    record = accumulator.step([torch.ones(2, 5)] * 4)
    assert record.verdict is not None
    assert record.verdict.agrees
    return sum(seen), sum(p.numel() * 4 for p in model.parameters())


def test_trap_11_gradients_travel_once_and_the_ledger_shows_it(two_ranks: World) -> None:
    for sent, held in two_ranks.run(count_all_reduces):
        assert sent == held


def forward_without_no_sync() -> str:
    """A user who runs a synchronised forward and backward of his own inside a window is found
    out."""
    model = DistributedDataParallel(linear())

    def loss_sum(module: nn.Module, x: Tensor) -> Tensor:
        module.require_backward_grad_sync = True  # what a flag that is set too late amounts to
        return module(x).sum()

    accumulator = da.Accumulator(
        model,
        torch.optim.SGD(model.parameters(), lr=1.0),
        da.Objective(loss_sum, len),
        audit="always",
    )
    try:
        accumulator.step([column(1.0)] * 3)
    except da.LedgerError as error:
        return str(error)
    return "not noticed"


def test_trap_11_a_sync_that_is_not_planned_is_an_error(two_ranks: World) -> None:
    for message in two_ranks.run(forward_without_no_sync):
        assert "sent 4 all_reduce" in message  # one a micro-batch, and the control numbers
        assert "forecast is 2 all_reduce" in message


def clipped_update() -> list[float]:
    """Rank 0 has gradients 3 and -3, rank 1 has 4 and 4: partial sums are large, the window's mean
    is 2."""
    model = DistributedDataParallel(linear())
    accumulator = da.Accumulator(
        model, torch.optim.SGD(model.parameters(), lr=1.0), mean_of_outputs(), clip_norm=1.0
    )
    micro_batches = (
        [column(3.0), column(-3.0)] if dist.get_rank() == 0 else [column(4.0), column(4.0)]
    )
    record = accumulator.step(micro_batches)
    return [record.grad_norm, -float(model.module.weight.detach())]


def test_trap_12_clip_once_after_the_reduction(two_ranks: World) -> None:
    for norm, update in two_ranks.run(clipped_update):
        assert norm == pytest.approx(2.0, rel=1e-15)
        assert update == pytest.approx(1.0, rel=1e-6)  # torch's own formula divides by norm + 1e-6


def final_learning_rate(num_micro_batches: int) -> list[float]:
    model = DistributedDataParallel(linear())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=4)
    accumulator = da.Accumulator(model, optimizer, mean_of_outputs(), scheduler=scheduler)
    rates = [
        accumulator.step(window).lr
        for window in da.windows([column(1.0)] * 4 * num_micro_batches, num_micro_batches)
    ]
    return [*rates, scheduler.get_last_lr()[0]]


@pytest.mark.parametrize("num_micro_batches", [1, 3])
def test_trap_13_the_schedule_counts_steps(two_ranks: World, num_micro_batches: int) -> None:
    assert (
        two_ranks.run(final_learning_rate, num_micro_batches) == [[1.0, 0.75, 0.5, 0.25, 0.0]] * 2
    )


def narrow_update(strategy: str, policy: str, num_micro_batches: int) -> float:
    model: nn.Module = nn.Sequential(nn.Linear(1, 2, bias=False)).to(torch.bfloat16)
    nn.init.zeros_(next(model.parameters()))
    mesh = (dist.get_world_size(),) if strategy == "fsdp" else (2, 1)
    model = wrap(model, strategy, mesh)
    objective = da.Objective(lambda m, x: m(x).sum(dtype=torch.float32), len)
    accumulator = da.Accumulator(
        model, torch.optim.SGD(model.parameters(), lr=1.0), objective, sync=policy
    )
    accumulator.step([torch.ones(1, 1, dtype=torch.bfloat16)] * num_micro_batches)
    return -float(whole(next(model.parameters())).float().mean())


@pytest.mark.parametrize(
    ("strategy", "policy"),
    [
        ("ddp", "boundary"),
        ("fsdp", "gather_once"),
        ("fsdp", "boundary"),
        ("hsdp", "reduce_scatter"),
    ],
)
def test_trap_14_bf16_sums_do_not_stall(two_ranks: World, strategy: str, policy: str) -> None:
    """512 micro-batches; each strategy and policy with 1,024 is in test_precisions.py."""
    assert two_ranks.run(narrow_update, strategy, policy, 512) == [1.0, 1.0]


def narrow_gather(policy: str, num_micro_batches: int) -> float:
    """Float32 parameters that FSDP2 gathers in bf16, so that autograd delivers bf16 gradients."""
    model: nn.Module = nn.Sequential(nn.Linear(1, 2, bias=False))
    nn.init.zeros_(next(model.parameters()))
    mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = fully_shard(model, mesh=init_device_mesh("cpu", (2,)), mp_policy=mixed)
    objective = da.Objective(lambda m, x: m(x).sum(dtype=torch.float32), len)
    accumulator = da.Accumulator(
        model, torch.optim.SGD(model.parameters(), lr=1.0), objective, sync=policy
    )
    accumulator.step([torch.ones(1, 1)] * num_micro_batches)
    return -float(whole(next(model.parameters())).mean())


@pytest.mark.parametrize("policy", ["boundary", "gather_once", "every"])
def test_trap_14_nor_where_fsdp_gathers_in_bf16(two_ranks: World, policy: str) -> None:
    assert two_ranks.run(narrow_gather, policy, 512) == [1.0, 1.0]


def refuse_narrow_reduction() -> str:
    model = fully_shard(linear(torch.bfloat16), mesh=init_device_mesh("cpu", (2,)))
    try:
        da.Accumulator(model, torch.optim.SGD(model.parameters(), lr=1.0), mean_of_outputs())
    except da.ConfigError as error:
        return str(error)
    return "accepted"


def test_trap_14_a_bf16_reduction_is_refused(two_ranks: World) -> None:
    for message in two_ranks.run(refuse_narrow_reduction):
        assert (
            "reduces gradients in torch.bfloat16, but torch.float32 is needed, because long sums"
            in message
        )


def narrow_update_alone(num_micro_batches: int) -> float:
    model = linear(torch.bfloat16)
    objective = da.Objective(lambda m, x: m(x).sum(dtype=torch.float32), len)
    accumulator = da.Accumulator(model, torch.optim.SGD(model.parameters(), lr=1.0), objective)
    accumulator.step([torch.ones(1, 1, dtype=torch.bfloat16)] * num_micro_batches)
    return -float(model.weight.detach())


@pytest.mark.parametrize("num_micro_batches", [512, 1024])
def test_trap_14_nor_on_one_process(num_micro_batches: int) -> None:
    assert narrow_update_alone(num_micro_batches) == 1.0


class Conditional(nn.Module):
    """Uses parameter `a` or `b`, as the micro-batch says."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.ones(4, dtype=torch.float64))
        self.b = nn.Parameter(torch.ones(4, dtype=torch.float64))

    def forward(self, x: Tensor, use_a: bool) -> Tensor:
        return (self.a if use_a else self.b) * x


def conditional(strategy: str, policy: str) -> tuple[list[float], list[float], bool]:
    """`a` is used in micro-batch 0 only, with gradient 2; `b` in micro-batch 1 only, with gradient
    3 (times 1 / 2 micro-batches)."""
    model: nn.Module = Conditional()
    if strategy == "ddp":
        model = DistributedDataParallel(model, find_unused_parameters=True)
    else:
        shape = (2, 2) if strategy == "hsdp" else (4,)
        model = fully_shard(
            model, mesh=init_device_mesh("cpu", shape, mesh_dim_names=("r", "s")[-len(shape) :])
        )
    objective = da.Objective(
        lambda m, micro_batch: m(torch.full((4,), micro_batch[1]).double(), micro_batch[0]).sum(),
        lambda micro_batch: 1,
    )
    accumulator = da.Accumulator(
        model, torch.optim.SGD(model.parameters(), lr=1.0), objective, sync=policy, audit="always"
    )
    record = accumulator.step([(True, 2.0), (False, 3.0)])
    a, b = ((1.0 - whole(p)).tolist() for p in model.parameters())
    return a, b, record.verdict is not None and record.verdict.agrees


def test_trap_15_a_postponed_all_reduce_mixes_no_parameters(four_ranks: World) -> None:
    for policy in ("reduce_scatter", "boundary", "gather_once", "every"):
        assert four_ranks.run(conditional, "hsdp", policy) == [([1.0] * 4, [1.5] * 4, True)] * 4


def test_trap_25_parameters_used_in_some_micro_batches(four_ranks: World) -> None:
    for policy in ("boundary", "every"):
        assert four_ranks.run(conditional, "ddp", policy) == [([1.0] * 4, [1.5] * 4, True)] * 4
    for policy in ("boundary", "gather_once", "every"):
        assert four_ranks.run(conditional, "fsdp", policy) == [([1.0] * 4, [1.5] * 4, True)] * 4


class Fails(torch.autograd.Function):
    """Raises in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise ValueError("planned failure in the backward")


def clean_after_failure(strategy: str, policy: str, where: str, at: int) -> tuple[float, str]:
    """A window fails in its micro-batch `at`; the next one must be as if it had never been.
    Relative error of its update."""

    class Breaks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = make_model()
            self.failing = False

        def forward(self, x: Tensor) -> Tensor:
            y = self.inner[:2](x)
            if self.failing and where == "backward":
                y = Fails.apply(y)
            y = self.inner[2:](y)
            if self.failing and where == "forward":
                raise ValueError("planned failure in the forward")
            return y

    model = Breaks()
    expected = make_model()
    good = [make_micro_batch(i) for i in range(3)]
    loss = sum(((expected(m["x"]) - m["y"]).square()).sum() for m in good) / 24.0
    gradient = torch.autograd.grad(loss, list(expected.parameters()))

    wrapped: nn.Module
    if strategy == "single":
        wrapped = model
    elif strategy == "ddp":
        wrapped = DistributedDataParallel(model)
    else:
        shape = (2, 1) if strategy == "hsdp" else (2,)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
        for layer in (model.inner[0], model.inner[2], model.inner[4]):
            fully_shard(layer, mesh=mesh)
        wrapped = fully_shard(model, mesh=mesh)
    before = [whole(p) for p in wrapped.parameters()]
    accumulator = da.Accumulator(
        wrapped,
        torch.optim.SGD(wrapped.parameters(), lr=1.0),
        masked_objective(),
        sync=policy,
        audit="always",
        check_cut=False,  # calls are counted
    )
    calls = 0

    def bad(module: nn.Module, micro_batch: Any) -> Tensor:
        nonlocal calls
        model.failing = calls == at
        calls += 1
        return masked_objective().loss_sum(module, micro_batch)  # type: ignore[return-value]

    accumulator.objective = da.Objective(bad, masked_objective().denominator)
    message = ""
    try:
        accumulator.step([make_micro_batch(50 + i) for i in range(3)])
    except ValueError as error:
        message = str(error)
    model.failing = False
    accumulator.objective = masked_objective()
    accumulator.step(good)
    after = [whole(p) for p in wrapped.parameters()]
    worst = max(relative(b - a, g) for b, a, g in zip(before, after, gradient, strict=True))
    return worst, message


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_trap_16_a_failed_window_leaves_nothing_behind(two_ranks: World, where: str) -> None:
    for strategy, policies in (
        ("ddp", ("boundary", "every")),
        ("fsdp", ("boundary", "gather_once", "every")),
        ("hsdp", ("boundary", "gather_once", "reduce_scatter")),
    ):
        for policy in policies:
            for at in (1, 2):
                for worst, message in two_ranks.run(
                    clean_after_failure, strategy, policy, where, at
                ):
                    assert message == f"planned failure in the {where}"
                    assert worst <= 1e-12, (strategy, policy, at)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_trap_16_on_one_process(where: str) -> None:
    assert clean_after_failure("single", "boundary", where, 1)[0] <= 1e-12


def skipped_window(strategy: str) -> list[float]:
    """A window with an infinite loss on rank 1 is skipped on all ranks; the next one is exact."""
    model = wrap(make_model(), strategy, (2,))
    accumulator = da.Accumulator(
        model,
        torch.optim.SGD(model.parameters(), lr=1.0),
        masked_objective(),
        nonfinite="skip",
        audit="always",
    )
    before = [whole(p) for p in model.parameters()]
    micro_batches = [make_micro_batch(i) for i in range(2)]
    if dist.get_rank() == 1:
        micro_batches[1]["y"][0] = torch.inf
    record = accumulator.step(micro_batches)
    assert record.skipped == "loss not finite on rank 1, its micro-batch 1 (global 3)", (
        record.skipped
    )
    assert record.step == 0
    unchanged = max(relative(whole(p), b) for p, b in zip(model.parameters(), before, strict=True))
    expected = make_model()
    good = make_micro_batch(9)
    loss = (expected(good["x"]) - good["y"]).square().sum() / 8.0
    gradient = torch.autograd.grad(loss, list(expected.parameters()))
    accumulator.step([good])
    after = [whole(p) for p in model.parameters()]
    return [
        unchanged,
        max(relative(b - a, g) for b, a, g in zip(before, after, gradient, strict=True)),
    ]


def test_trap_16_a_skipped_window_leaves_nothing_behind(two_ranks: World) -> None:
    for strategy in ("ddp", "fsdp"):
        for unchanged, worst in two_ranks.run(skipped_window, strategy):
            assert unchanged == 0.0
            assert worst <= 1e-12


def static_graph() -> list[float]:
    model = DistributedDataParallel(linear(), static_graph=True)
    accumulator = da.Accumulator(
        model, torch.optim.SGD(model.parameters(), lr=1.0), mean_of_outputs(), audit="always"
    )
    found, rank = [], dist.get_rank()
    for start in (0, 10, 20):
        before = float(model.module.weight.detach())
        record = accumulator.step([column(float(start + 2 * i + rank)) for i in range(4)])
        assert record.verdict is not None
        assert record.verdict.agrees, record.verdict
        found.append(before - float(model.module.weight.detach()))
    return found


def test_trap_17_static_graph(two_ranks: World) -> None:
    assert two_ranks.run(static_graph) == [[3.5, 13.5, 23.5]] * 2


def refused() -> list[str]:
    """What torch's DDP cannot accumulate."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, on import
        from torch.distributed.optim import _apply_optimizer_in_backward

    messages = []
    delayed = linear()
    in_backward = nn.Sequential(linear())
    _apply_optimizer_in_backward(torch.optim.SGD, in_backward.parameters(), {"lr": 1.0})
    for model, options in (
        (
            nn.Sequential(delayed, linear()),
            {
                "delay_all_reduce_named_params": [("0.weight", delayed.weight)],
                "param_to_hook_all_reduce": delayed.weight,
            },
        ),
        (in_backward, {}),
    ):
        wrapped = DistributedDataParallel(model, **options)
        try:
            da.Accumulator(
                wrapped, torch.optim.SGD(wrapped.parameters(), lr=1.0), mean_of_outputs()
            )
        except da.ConfigError as error:
            messages.append(str(error))
    mixed = DistributedDataParallel(linear())
    # its own argument wants a GPU; the attribute is what is looked at
    mixed.mixed_precision = MixedPrecisionPolicy()
    try:
        da.Accumulator(mixed, torch.optim.SGD(mixed.parameters(), lr=1.0), mean_of_outputs())
    except da.ConfigError as error:
        messages.append(str(error))
    return messages


def test_trap_18_what_cannot_accumulate_is_refused(two_ranks: World) -> None:
    for delayed, in_backward, mixed in two_ranks.run(refused):
        assert "delay_all_reduce_named_params" in delayed
        assert "optimizer runs inside its backward" in in_backward
        assert "mixed_precision" in mixed


def two_terms() -> list[float]:
    """A token loss over 10 tokens and an auxiliary one over 4 micro-batches, weight 0.01: each has
    its own denominator."""
    model = DistributedDataParallel(linear())
    weight = model.module.weight
    objective = da.Objective(
        lambda m, x: {"tokens": m(x).sum(), "auxiliary": 0.01 * m(torch.ones(1, 1).double()).sum()},
        lambda x: {"tokens": len(x), "auxiliary": 1},
    )
    accumulator = da.Accumulator(model, torch.optim.SGD(model.parameters(), lr=1.0), objective)
    sizes = [(1, 2), (3, 4)][dist.get_rank()]
    record = accumulator.step([column(*[float(size)] * size) for size in sizes])
    return [
        -float(weight.detach()),
        record.denominators["tokens"],
        record.denominators["auxiliary"],
    ]


def test_trap_20_each_term_has_its_own_denominator(two_ranks: World) -> None:
    for update, tokens, micro_batches in two_ranks.run(two_terms):
        assert (tokens, micro_batches) == (10.0, 4.0)
        assert update == pytest.approx((1 + 4 + 9 + 16) / 10 + 0.01, rel=1e-15)


def logged_loss() -> float:
    """Squared errors 0, 1, 4, 9 over 1, 2, 3, 4 numbers: the mean over all ten."""
    model = DistributedDataParallel(linear())
    accumulator = da.Accumulator(
        model, torch.optim.SGD(model.parameters(), lr=0.1), da.Regression()
    )
    micro_batches = [(column(*[1.0] * (i + 1)), column(*[float(i)] * (i + 1))) for i in range(4)]
    return accumulator.step(micro_batches[dist.get_rank() :: 2]).loss


def test_trap_21_the_logged_loss_is_the_optimised_one(two_ranks: World) -> None:
    assert two_ranks.run(logged_loss) == [pytest.approx((0 + 2 + 12 + 36) / 10, rel=1e-15)] * 2


def one_rank_raises() -> float:
    """The failing rank's error leaves step() at once; it does not wait for the others."""
    model = DistributedDataParallel(linear())

    def loss_sum(module: nn.Module, x: Tensor) -> Tensor:
        if float(x[0]) == 13.0:
            raise ValueError("bad sample 13")
        return module(x).sum()

    accumulator = da.Accumulator(
        model, torch.optim.SGD(model.parameters(), lr=1.0), da.Objective(loss_sum, len)
    )
    accumulator.step([column(1.0), column(13.0 if dist.get_rank() == 1 else 2.0)])
    return 0.0


def test_trap_22_a_rank_that_raises_takes_the_others_down() -> None:
    """Here: its error comes first and the others end; the launcher's part is in tests/launch."""
    from worlds import RankFailed, world

    with world(2) as ranks, pytest.raises(RankFailed) as failure:
        ranks.run(one_rank_raises, timeout_s=30)
    text = str(failure.value)
    assert "bad sample 13" in text.split("rank 1:")[1]


def test_trap_23_never_another_effective_batch_than_asked_for() -> None:
    from distaccum.core.batch_size import Ragged, solve

    arithmetic = solve(world_size=8, effective_batch_size=100, micro_batch_size=5)
    assert (
        arithmetic.effective_batch_size,
        arithmetic.gradient_accumulation_steps,
        arithmetic.even,
    ) == (100, 3, False)
    window = da.Plan(1000, effective_batch_size=100, micro_batch_size=5).window()
    assert (
        sum(micro_batch.size for rank in range(8) for micro_batch in window.of_rank(rank, 8)) == 100
    )
    with pytest.raises(da.ConfigError, match="80 or 120"):
        solve(world_size=8, effective_batch_size=100, micro_batch_size=5, ragged=Ragged.refuse)


def fsdp_on_the_cpu() -> str:
    model = wrap(make_model(), "fsdp", (2,))
    return type(
        da.Accumulator(
            model, torch.optim.SGD(model.parameters(), lr=1.0), masked_objective()
        ).strategy
    ).__name__


def test_trap_24_fsdp_on_the_cpu_is_fsdp(two_ranks: World) -> None:
    assert two_ranks.run(fsdp_on_the_cpu) == ["FSDP", "FSDP"]
