"""What surrounds a step in other people's loops: exact, or refused before anything is updated.

Unless said otherwise: y = w x in float64, w0 = 0, SGD with lr 1 and the sum of outputs, so that the
update is minus the mean of x over everything counted.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from setting import make_micro_batch, make_model, masked_objective, relative, whole, wrap
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, ReduceLROnPlateau
from worlds import World

import distaccum as da

F64 = torch.float64


def linear(dtype: torch.dtype = F64) -> nn.Linear:
    model = nn.Linear(1, 1, bias=False, dtype=dtype)
    nn.init.zeros_(model.weight)
    return model


def outputs() -> da.Objective:
    return da.Objective(lambda model, x: model(x).sum(), lambda x: len(x))


def squares() -> da.Objective:
    """Not linear, so that old weights would show."""
    return da.Objective(
        lambda model, x: (model(x).to(x.dtype) - 1).square().sum(), lambda x: len(x)
    )


def column(*values: float, dtype: torch.dtype = F64) -> Tensor:
    return torch.tensor(values, dtype=dtype)[:, None]


def sgd(model: nn.Module, lr: float = 1.0) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=lr)


def value(model: nn.Module) -> float:
    return float(whole(next(model.parameters())))


def refusal(action: Callable[[], Any]) -> str:
    try:
        return f"accepted: {action()}"
    except da.ConfigError as error:
        return str(error)


def test_autocast_around_the_whole_loop() -> None:
    model = linear(torch.float32)
    accumulator = da.Accumulator(model, sgd(model, 0.1), squares())
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(da.ConfigError, match=r"da\.autocast"),
    ):
        accumulator.step([column(1.0, dtype=torch.float32)])
    assert value(model) == 0.0
    losses = []
    accumulator = da.Accumulator(model, sgd(model, 0.25), da.autocast(squares(), torch.bfloat16))
    for _ in range(3):
        losses.append(accumulator.step([column(1.0, dtype=torch.float32)]).loss)
    assert losses == [1.0, 0.25, 0.0625]  # w = 0, 1/2, 3/4: each forward sees the newest weights


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_switched_off_around_the_step(mode: Any) -> None:
    model = linear()
    accumulator = da.Accumulator(model, sgd(model), outputs())
    with mode(), pytest.raises(da.ConfigError, match=mode.__name__):
        accumulator.step([column(1.0)])
    assert accumulator.step([column(2.0)]).step == 1
    assert value(model) == -2.0


@pytest.mark.parametrize(
    "denominator", [None, torch.ones(2), torch.tensor(float("nan")), "three", -1], ids=str
)
def test_a_denominator_that_is_no_number(denominator: Any) -> None:
    model = linear()
    accumulator = da.Accumulator(
        model, sgd(model), da.Objective(outputs().loss_sum, lambda x: denominator)
    )
    with pytest.raises(da.ConfigError, match="denominator for 'loss' is"):
        accumulator.step([column(1.0)])


def draws_of_the_user(size: int) -> list[list[int]]:
    """Permutations from torch's own generator, between windows whose dropout is keyed."""
    torch.manual_seed(3)
    model: nn.Module = nn.Sequential(nn.Dropout(0.5), linear())
    model = DistributedDataParallel(model) if size > 1 else model
    accumulator = da.Accumulator(model, sgd(model), outputs(), seed=1)
    found = []
    for _ in range(3):
        accumulator.step([column(1.0, 2.0)])
        found.append(torch.randperm(8).tolist())
    return found


def test_the_users_generator_beside_keyed_randomness(two_ranks: World) -> None:
    torch.manual_seed(3)
    linear()  # draws what the model draws
    expected = [torch.randperm(8).tolist() for _ in range(3)]
    assert draws_of_the_user(1) == expected
    assert two_ranks.run(draws_of_the_user, 2) == [expected] * 2


def mean_and_count(kind: str) -> str:
    model = wrap(make_model(), kind, (dist.get_world_size(),) if kind == "fsdp" else ())
    micro_batch = make_micro_batch(1, size=4)
    before = [whole(p) for p in model.parameters()]
    objective = da.Objective(
        lambda called, m: masked_objective().loss_sum(called, m) / m["mask"].sum(),
        masked_objective().denominator,
    )
    text = refusal(
        lambda: da.Accumulator(model, sgd(model), objective).step(
            [micro_batch] if dist.get_rank() else []
        )
    )
    assert all(torch.equal(a, whole(b)) for a, b in zip(before, model.parameters(), strict=True))
    quiet = da.Accumulator(model, sgd(model), objective, check_cut=False)
    return f"{text} {quiet.step([micro_batch]).step}"


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_mean_in_the_place_of_a_sum(two_ranks: World, kind: str) -> None:
    for text in two_ranks.run(mean_and_count, kind):
        assert "0.5 times the sum of its two halves'" in text
        assert "reduction='sum'" in text
        assert "check_cut=False" in text
        assert text.endswith(" 1")


def test_losses_that_are_not_taken_for_means() -> None:
    """A random one, one that evaluation mode does not have, and one term of two that is averaged
    over micro-batches."""

    class Moody(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = linear()

        def forward(self, x: Tensor) -> Any:
            return self.inner(x) if self.training else {"boxes": x}

    for model, objective in (
        (linear(), da.Objective(lambda m, x: (m(x) * torch.rand(())).mean(), lambda x: len(x))),
        (Moody(), outputs()),
        (
            linear(),
            da.Objective(
                lambda m, x: {"loss": m(x).sum(), "aux": m(x).mean()},
                lambda x: {"loss": len(x), "aux": 1},
            ),
        ),
    ):
        accumulator = da.Accumulator(model, sgd(model), objective)
        torch.manual_seed(1)
        expected = torch.rand(2).tolist()
        torch.manual_seed(1)
        assert accumulator.step([column(1.0, 2.0)]).step == 1
        if model is not linear:
            assert torch.rand(1).item() in expected  # the look has drawn nothing


def test_logs_beside_the_loss() -> None:
    model = linear()
    objective = da.Objective(lambda m, x: (m(x).sum(), {"accuracy": 1}), lambda x: len(x))
    with pytest.raises(da.ConfigError, match="Return only the sum"):
        da.Accumulator(model, sgd(model), objective).step([column(1.0)])


def plateau(size: int) -> list[float]:
    model: nn.Module = linear()
    model = DistributedDataParallel(model) if size > 1 else model
    optimizer = sgd(model, 1.0)
    scheduler = ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    accumulator = da.Accumulator(
        model,
        optimizer,
        da.Objective(lambda m, x: m(x).sum() * 0 + len(x), len),
        scheduler=scheduler,
    )
    return [accumulator.step([column(1.0)] * (1 + size)).lr for _ in range(4)]


def test_reduce_on_plateau_follows_the_loss_of_all_ranks(two_ranks: World) -> None:
    assert plateau(1) == [1.0, 1.0, 0.5, 0.25]
    assert two_ranks.run(plateau, 2) == [[1.0, 1.0, 0.5, 0.25]] * 2


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda o: [LambdaLR(o, lambda s: 1.0)], "ChainedScheduler"),
        (lambda o: object(), "no step"),
        (lambda o: type("Needs", (), {"step": lambda self, metric: None})(), "requires arguments"),
    ],
    ids=["list", "object", "needs a metric"],
)
def test_schedulers_that_cannot_be_stepped(make: Any, words: str) -> None:
    model = linear()
    optimizer = sgd(model)
    with pytest.raises(da.ConfigError, match=words):
        da.Accumulator(model, optimizer, outputs(), scheduler=make(optimizer))


def test_one_cycle_past_its_end() -> None:
    model = linear()
    optimizer = sgd(model)
    scheduler = OneCycleLR(optimizer, max_lr=1.0, total_steps=3)
    accumulator = da.Accumulator(model, optimizer, outputs(), scheduler=scheduler)
    for _ in range(3):
        accumulator.step([column(1.0)])
    before = value(model)
    with pytest.raises(da.ConfigError, match="total_steps=3"):
        accumulator.step([column(1.0)])
    assert (value(model), accumulator.steps, accumulator.num_windows) == (before, 3, 3)


def test_a_scheduler_that_fails_leaves_a_whole_boundary() -> None:
    def factor(step: int) -> float:
        if step == 2:
            raise ValueError("no rate for step 2")
        return 1.0

    model = linear()
    optimizer = sgd(model)
    accumulator = da.Accumulator(model, optimizer, outputs(), scheduler=LambdaLR(optimizer, factor))
    accumulator.step([column(1.0)])
    with pytest.raises(ValueError, match="no rate"):
        accumulator.step([column(1.0)])
    assert (value(model), accumulator.steps, accumulator.num_windows) == (-2.0, 2, 2)
    assert model.weight.grad is None


def test_an_optimizer_that_fails_leaves_no_gradient() -> None:
    class Fails(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            raise ValueError("planned")

    model = linear()
    accumulator = da.Accumulator(model, Fails(model.parameters(), lr=1.0), outputs())
    with pytest.raises(ValueError, match="planned"):
        accumulator.step([column(1.0)])
    assert model.weight.grad is None
    assert (accumulator.steps, accumulator.num_windows) == (0, 0)


def accelerated() -> tuple[list[float], list[float]]:
    """Learning rates and weights of three windows with what Accelerate has prepared."""
    import os

    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    rank, size = str(dist.get_rank()), str(dist.get_world_size())
    os.environ |= {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": size,
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "1",
    }
    accelerator = Accelerator(cpu=True)
    model = linear()
    optimizer = sgd(model)
    scheduler = LambdaLR(optimizer, lambda step: 1.0 / (1 + step))
    prepared, its_optimizer, its_scheduler = accelerator.prepare(model, optimizer, scheduler)
    accumulator = da.Accumulator(prepared, its_optimizer, outputs(), scheduler=its_scheduler)
    rates, weights = [], []
    for _ in range(3):
        rates.append(accumulator.step([column(1.0), column(3.0)]).lr)
        weights.append(value(model))
    AcceleratorState._reset_state(reset_partial_state=True)
    return rates, weights


def test_what_accelerate_has_prepared(two_ranks: World) -> None:
    rates, weights = [1.0, 0.5, 1 / 3], [-2.0, -3.0, -3.0 - 2 / 3]
    assert two_ranks.run(accelerated) == [(rates, pytest.approx(weights, rel=1e-15))] * 2


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda model: torch.optim.LBFGS(model.parameters()), "step\\(closure\\)"),
        (lambda model: [sgd(model), sgd(model)], "parameter groups"),
        (lambda model: None, "NoneType"),
    ],
    ids=["LBFGS", "list", "none"],
)
def test_optimizers_that_cannot_be_stepped(make: Any, words: str) -> None:
    model = linear()
    with pytest.raises(da.ConfigError, match=words):
        da.Accumulator(model, make(model), outputs())


@pytest.mark.parametrize(
    "window",
    [(column(1.0) for _ in range(2)), {"x": column(1.0)}, column(1.0, 2.0), "ab"],
    ids=lambda w: type(w).__name__,
)
def test_a_window_that_is_no_list(window: Any) -> None:
    model = linear()
    with pytest.raises(da.ConfigError, match=type(window).__name__):
        da.Accumulator(model, sgd(model), outputs()).step(window)


class _FabricModule(nn.Module):
    """As Lightning Fabric wraps: by name and attribute."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._forward_module = module

    def forward(self, *args: Any) -> Any:
        return self._forward_module(*args)


def looked_through(kind: str) -> Any:
    torch.manual_seed(0)
    expected = [whole(p) for p in make_model().parameters()]
    window = [make_micro_batch(10 * dist.get_rank() + i) for i in range(3)]
    results = []
    for wrapping in (False, True):
        model = wrap(make_model(), "ddp", ())
        if wrapping:
            model = (
                torch.compile(model, backend="eager")
                if kind == "compiled"
                else _FabricModule(model)
            )
        accumulator = da.Accumulator(model, sgd(model, 0.1), masked_objective(), audit="always")
        accumulator.step(window)
        accumulator.step(window)
        results.append([whole(p) for p in model.parameters()])
    assert not torch.equal(expected[0], results[0][0])
    return max(relative(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("kind", ["compiled", "fabric"])
def test_wrappers_around_ddp_are_looked_through(two_ranks: World, kind: str) -> None:
    assert max(two_ranks.run(looked_through, kind)) <= 1e-12


def replicated(kind: str) -> str:
    if kind == "replicate":
        from torch.distributed._composable import replicate
    else:
        from torch.distributed._composable.replicate_with_fsdp import replicate
    model = linear()
    replicate(model)
    return refusal(lambda: da.Accumulator(model, sgd(model), outputs()).step([column(1.0)]).step)


def test_replicate_is_refused_with_its_reason(two_ranks: World) -> None:
    for text in two_ranks.run(replicated, "replicate"):
        assert "replicate() was applied" in text
    for text in two_ranks.run(replicated, "replicate_with_fsdp"):
        assert "replicate" in text.lower()
        assert "accepted" not in text


class Codebook(nn.Module):
    """Moves a buffer in each forward."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = linear()
        self.register_buffer("centre", torch.zeros(1, dtype=F64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.centre += x.detach().mean()
        return self.inner(x)


def warned(model: nn.Module, windows: int = 3) -> list[str]:
    accumulator = da.Accumulator(model, sgd(model), outputs())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(windows):
            accumulator.step([column(1.0, 2.0), column(3.0, 5.0)])
    return [str(w.message) for w in caught if w.category is da.StateWarning]


def test_state_that_a_forward_moves_is_named_once() -> None:
    batchnorm = nn.Sequential(linear(), nn.BatchNorm1d(1, dtype=F64))
    (text,) = warned(batchnorm)
    assert "1.running_var" in text
    assert "convert_batchnorm(model, 'pooled')" in text
    (text,) = warned(Codebook())
    assert "centre" in text
    assert warned(nn.Sequential(linear(), nn.BatchNorm1d(1, dtype=F64).eval()).train(False)) == []
    for mode in ("pooled", "frozen", "micro_batch"):
        model = nn.Sequential(linear(), nn.BatchNorm1d(1, dtype=F64))
        assert warned(da.convert_batchnorm(model, da.BatchNormMode(mode))) == [], mode


def test_one_sample_under_batchnorm() -> None:
    model = da.convert_batchnorm(
        nn.Sequential(linear(), nn.BatchNorm1d(1, dtype=F64)), da.BatchNormMode.pooled
    )
    accumulator = da.Accumulator(model, sgd(model), outputs())
    with pytest.raises(da.ConfigError, match=r"Micro-batch 1 .*frozen") as caught:
        accumulator.step([column(1.0, 2.0), column(3.0)])
    assert "GroupNorm" in str(caught.value)


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_loss_sums_in_sixteen_bits(narrow: torch.dtype) -> None:
    """1/3 is rounded by 2e-3 in bfloat16, and so would be each gradient."""
    model = linear(torch.float32)
    for loss in (lambda m, x: m(x).sum().to(narrow), lambda m, x: m(x).sum()):
        objective = da.Objective(loss, lambda x: 3)
        accumulator = da.Accumulator(model, sgd(model), objective)
        if loss(model, column(1.0, dtype=torch.float32)).dtype is narrow:
            with pytest.raises(da.ConfigError, match=r"losses\.float\(\)\.sum\(\)"):
                accumulator.step([column(1.0, dtype=torch.float32)])
            assert value(model) == 0.0
    accumulator.step([column(1.0, dtype=torch.float32)])
    assert value(model) == pytest.approx(-1 / 3, rel=2**-23)


def test_a_loss_that_is_no_number_is_not_the_loss_scales_fault() -> None:
    model = linear(torch.float32)
    accumulator = da.Accumulator(model, sgd(model), outputs(), loss_scale=da.LossScale())
    with pytest.raises(da.DivergenceError, match="loss not finite"):
        accumulator.step([column(float("nan"), dtype=torch.float32)])
    assert accumulator.loss_scale is not None
    assert accumulator.loss_scale.value == 2.0**16
    skipping = da.Accumulator(
        model, sgd(model), outputs(), loss_scale=da.LossScale(), nonfinite="skip"
    )
    assert skipping.step([column(float("nan"), dtype=torch.float32)]).skipped is not None
    assert skipping.loss_scale is not None
    assert skipping.loss_scale.value == 2.0**16


def evaluated_between(policy: str) -> list[bool]:
    """The user's own evaluation between windows, under a ledger."""
    model = wrap(make_model(), "fsdp", (2,))
    accumulator = da.Accumulator(
        model, sgd(model, 0.1), masked_objective(), sync=policy, audit="always"
    )
    agrees = []
    for i in range(3):
        record = accumulator.step([make_micro_batch(i), make_micro_batch(10 + i)])
        agrees.append(record.verdict is not None and record.verdict.agrees)
        model.eval()
        with torch.no_grad():
            model(make_micro_batch(5)["x"].flatten(0, 1))
        model.train()
    return agrees


@pytest.mark.parametrize("policy", ["boundary", "gather_once", "every"])
def test_an_evaluation_between_windows_adds_nothing_to_the_next_one(
    two_ranks: World, policy: str
) -> None:
    assert two_ranks.run(evaluated_between, policy) == [[True] * 3] * 2


def test_a_first_error_is_not_hidden_by_the_clean_up(monkeypatch: pytest.MonkeyPatch) -> None:
    model = linear()

    def fails(m: nn.Module, x: Tensor) -> Tensor:
        raise KeyError("the first")

    accumulator = da.Accumulator(model, sgd(model), da.Objective(fails, len))
    monkeypatch.setattr(accumulator.strategy, "abort", lambda: F.relu(None))
    with pytest.raises(KeyError, match="the first") as caught:
        accumulator.step([column(1.0)])
    assert "Clearing the window failed too" in caught.value.__notes__[0]


def one_rank_cannot_count(when: str) -> str:
    """A denominator that is no number on rank 1 only, in the first window or a later one, read
    ahead or not."""
    model = DistributedDataParallel(linear())
    calls = [0]

    def denominator(x: Tensor) -> float:
        calls[0] += 1
        late = when == "first" or calls[0] > 2
        return float("nan") if dist.get_rank() == 1 and late else len(x)

    accumulator = da.Accumulator(
        model, sgd(model), da.Objective(outputs().loss_sum, denominator), check_cut=False
    )
    micro_batches = [column(2.0)] * 4
    loader: Any = (
        (micro_batch for micro_batch in micro_batches) if when == "streamed" else micro_batches
    )

    def train() -> None:
        for window in da.windows(loader, gradient_accumulation_steps=1):
            accumulator.step(window)

    return f"{refusal(train)} {accumulator.steps} {value(model)}"


@pytest.mark.parametrize(("when", "steps"), [("first", 0), ("later", 1), ("streamed", 1)])
def test_a_denominator_that_is_no_number_on_one_rank(
    two_ranks: World, when: str, steps: int
) -> None:
    first, second = two_ranks.run(one_rank_cannot_count, when)
    assert "The micro-batches of rank 1 cannot be counted" in first
    assert "denominator for 'loss' is nan" in second
    for text in (first, second):
        assert text.endswith(f" {steps} {-2.0 * steps + 0.0}"), text


def test_samples_that_interact_in_the_loss_are_named() -> None:
    """A contrastive loss: no mean, and not the sum of its halves'."""
    model = linear()
    objective = da.Objective(lambda m, x: (m(x) - m(x).mean()).square().sum() + m(x).sum(), len)
    nn.init.ones_(model.weight)
    accumulator = da.Accumulator(model, sgd(model, 0.1), objective)
    with pytest.warns(da.StateWarning, match="samples interact in the loss"):
        accumulator.step([column(1.0, 2.0, 5.0, 9.0)])
    assert accumulator.step([column(1.0, 2.0, 5.0, 9.0)]).step == 2  # said once


def test_modules_beside_the_model_are_left_alone() -> None:
    """A generator whose BatchNorm trains: the look at the loss neither moves it nor takes the loss
    for a mean."""
    model, other = linear(), nn.Sequential(nn.Linear(1, 1, dtype=F64), nn.BatchNorm1d(1, dtype=F64))
    objective = da.Objective(lambda m, x: m(other(x).detach()).sum(), len)
    da.Accumulator(model, sgd(model), objective).step([column(1.0, 2.0, 5.0, 9.0)])
    assert int(other[1].num_batches_tracked) == 1


def test_buffers_loaded_after_the_accumulator_was_made_have_not_moved() -> None:
    model = da.convert_batchnorm(nn.Sequential(linear(), nn.BatchNorm1d(1, dtype=F64)), "pooled")
    state = {name: value + 1 for name, value in model.state_dict().items()}
    accumulator = da.Accumulator(model, sgd(model), outputs())
    model.load_state_dict(state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        accumulator.step([column(1.0, 2.0)])


def bad_sample(when: str) -> str:
    """A micro-batch that the objective cannot count, on rank 1 only: its own error there, a refusal
    elsewhere."""
    model = DistributedDataParallel(linear())
    objective = da.Objective(lambda m, batch: m(batch["x"]).sum(), lambda batch: len(batch["x"]))
    accumulator = da.Accumulator(model, sgd(model), objective)
    good = {"x": column(2.0)}
    bad = {"y": column(2.0)} if dist.get_rank() else good
    loader = [bad] if when == "first" else [good, bad]
    try:
        for window in da.windows(loader, gradient_accumulation_steps=1):
            accumulator.step(window)
    except (KeyError, da.ConfigError) as error:
        return f"{type(error).__name__} {error} after {accumulator.steps}"
    return "accepted"


@pytest.mark.parametrize(("when", "steps"), [("first", 0), ("later", 1)])
def test_a_micro_batch_that_one_rank_cannot_count(two_ranks: World, when: str, steps: int) -> None:
    first, second = two_ranks.run(bad_sample, when)
    assert "ConfigError The micro-batches of rank 1 cannot be counted" in first
    assert second == f"KeyError 'x' after {steps}"
    assert first.endswith(f"after {steps}")


# What newcomers try first.


@pytest.mark.parametrize("retain", [False, True])
def test_an_objective_that_calls_backward_is_refused(two_ranks: World, retain: bool) -> None:
    for text in two_ranks.run(calls_backward, retain):
        assert text.startswith("The objective called backward")


def calls_backward(retain: bool) -> str:
    def loss_sum(model: Any, micro_batch: Any) -> Any:
        loss = masked_objective().loss_sum(model, micro_batch)
        loss.backward(retain_graph=retain)
        return loss

    model = wrap(make_model(), "ddp", ())
    accumulator = da.Accumulator(
        model, sgd(model), da.Objective(loss_sum, masked_objective().denominator), check_cut=False
    )
    with pytest.raises(da.ConfigError) as refused:
        accumulator.step([make_micro_batch(i) for i in range(2)])
    return str(refused.value)


def test_a_scheduler_of_another_optimizer_is_refused() -> None:
    model = make_model()
    scheduler = torch.optim.lr_scheduler.StepLR(sgd(model), 1)
    with pytest.raises(
        da.ConfigError, match="StepLR changes the learning rate of another optimizer"
    ):
        da.Accumulator(model, sgd(model), masked_objective(), scheduler=scheduler)


@pytest.mark.parametrize(
    "objective", [torch.nn.MSELoss(), len, None], ids=["module", "function", "none"]
)
def test_a_loss_function_is_no_objective(objective: Any) -> None:
    model = make_model()
    with pytest.raises(
        da.ConfigError, match=r"without the methods loss_sum and denominator. Write da.Objective"
    ):
        da.Accumulator(model, sgd(model), objective)


def test_the_length_of_a_pair_is_no_number_of_samples() -> None:
    model = torch.nn.Linear(2, 1).double()
    objective = da.Objective(lambda called, pair: (called(pair[0]) - pair[1]).square().sum(), len)
    pair = (torch.ones(4, 2, dtype=torch.float64), torch.zeros(4, 1, dtype=torch.float64))
    with pytest.warns(
        da.StateWarning,
        match=r"the denominator of one micro-batch is 2, and those of its halves are 2",
    ):
        da.Accumulator(model, sgd(model), objective).step([pair])


@pytest.mark.parametrize(
    "objective", [da.CausalLM(), da.Classification()], ids=lambda o: type(o).__name__
)
def test_labels_that_are_no_class_numbers_are_refused(objective: Any) -> None:
    with pytest.raises(
        da.ConfigError,
        match=r"Labels have dtype torch.float32, but this objective needs the numbers",
    ):
        objective.denominator((torch.ones(2, 3), torch.ones(2, 3)))
