"""`verify` does not prove what forwards move K times a window, and leaves everything as it was,
whatever happens."""

from __future__ import annotations

import copy
import random
from collections import UserDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import BatchEncoding
from worlds import World

import distaccum as da
from distaccum.app.commands.verify import shown

CHANNELS = 3
# What the accumulator itself says of moved buffers in its first window.
pytestmark = pytest.mark.filterwarnings("ignore:Each forward changes")


class Layer(nn.Module):
    """A linear layer beside which a test moves something."""

    def __init__(self, **state: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(2, CHANNELS)
        for name, value in state.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x)
        if self.training:
            with torch.no_grad():
                self.move(out.detach())
        return out

    def move(self, out: Tensor) -> None:
        """Move nothing."""


class Codebook(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.zeros(CHANNELS))

    def move(self, out: Tensor) -> None:
        self.codes.lerp_(out.mean(0), 0.1)


class Counts(Layer):
    """Of the newest micro-batch only: they depend on the cut too."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("tokens_per_expert", torch.zeros(()))

    def move(self, out: Tensor) -> None:
        self.tokens_per_expert.fill_(out.abs().sum())


class Rebound(Codebook):
    def move(self, out: Tensor) -> None:
        self.codes = 0.9 * self.codes + 0.1 * out.mean(0)


class Teacher(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.teacher = nn.Linear(2, CHANNELS).requires_grad_(False)

    def move(self, out: Tensor) -> None:
        self.teacher.weight.lerp_(self.linear.weight, 0.1)


class HiddenTeacher(Layer):
    def __init__(self) -> None:
        super().__init__(teachers=[nn.Linear(2, CHANNELS).requires_grad_(False)])

    def move(self, out: Tensor) -> None:
        self.teachers[0].weight.lerp_(self.linear.weight, 0.1)


class Counter(Layer):
    def move(self, out: Tensor) -> None:
        self.calls += 1


class Centre(Layer):
    def move(self, out: Tensor) -> None:
        self.centre = 0.9 * self.centre + 0.1 * out.mean()


class Held(Layer):
    def move(self, out: Tensor) -> None:
        self.stats["seen"] += len(out)


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(2, CHANNELS), nn.BatchNorm1d(CHANNELS))


def spectral() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(2, CHANNELS)))


MOVED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "unconverted BatchNorm": (normed, "1.num_batches_tracked, 1.running_mean, 1.running_var"),
    "codebook": (Codebook, "codes"),
    "codebook that is bound anew": (Rebound, "codes"),
    "counts of the newest micro-batch": (Counts, "tokens_per_expert"),
    "teacher": (Teacher, "teacher.weight"),
    "teacher outside the modules": (HiddenTeacher, "teachers.0.weight"),
    "counter": (lambda: Counter(calls=0), "calls"),
    "centre": (lambda: Centre(centre=torch.zeros(())), "centre"),
    "number in a dict": (lambda: Held(stats={"seen": 0}), "stats.seen"),
    "spectral norm": (spectral, "0.parametrizations.weight.0._u, 0.parametrizations.weight.0._v"),
}


def loss_sum(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().sum()


def made(model: nn.Module, objective: Any = None, **options: Any) -> da.Accumulator:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return da.Accumulator(model, optimizer, objective or da.Objective(loss_sum, len), **options)


def micro_batches(number: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(4, 2, generator=generator) for _ in range(number)]


def everything(accumulator: da.Accumulator, *modules: nn.Module) -> Mapping[str, Any]:
    """What a training holds, as text and copies."""
    model, optimizer = accumulator.strategy.model, accumulator.optimizer
    attributes = [
        (
            name,
            copy.deepcopy(
                {k: v for k, v in vars(m).items() if k in ("training", "calls", "centre", "stats")}
            ),
        )
        for top in (model, *modules)
        for name, m in top.named_modules()
    ]
    return copy.deepcopy({
        "model": [{**dict(m.named_parameters()), **dict(m.named_buffers())} for m in (model,
        *modules)], "hidden": [list(m.parameters()) for top in getattr(model, "teachers",
        []) for m in [top]], "attributes": attributes,
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "optimizer": optimizer.state_dict(),
        "scheduler": accumulator.scheduler and accumulator.scheduler.state_dict(),
        "counters": accumulator.state_dict(),
        "rng": (torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()),
    })  # fmt: skip


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


@pytest.mark.parametrize("kind", MOVED)
def test_what_each_forward_moves_is_not_proven(kind: str) -> None:
    make, names = MOVED[kind]
    accumulator = made(make())
    accumulator.step(micro_batches())
    before = everything(accumulator)
    proof = da.verify(accumulator, micro_batches())
    assert same(everything(accumulator), before)
    assert not proof.holds
    (line,) = [line for line in proof.lines if not line.holds]
    assert (line.name, line.tolerance) == ("state", 0.0)
    assert line.note == f"changed by each forward: {names}"
    assert "3 times in this window" in proof.failures
    assert ('da.convert_batchnorm(model, "pooled")' in proof.failures.replace("'", '"')) == (
        "BatchNorm" in kind
    )
    assert ("once per window" in proof.failures) == ("BatchNorm" not in kind)
    assert names in shown(proof)
    assert names in str(proof)
    assert da.verify(accumulator, micro_batches(1)).holds  # one micro-batch moves it once


def test_the_first_window_of_the_training_is_looked_at_after_a_proof_too() -> None:
    accumulator = made(normed())
    assert not da.verify(accumulator, micro_batches()).holds
    with pytest.warns(UserWarning, match="Each forward changes"):
        accumulator.step(micro_batches())


@pytest.mark.parametrize("mode", ["pooled", "sync", "frozen", "micro_batch"])
def test_batchnorm_with_a_mode_is_judged_by_it(mode: str) -> None:
    accumulator = made(da.convert_batchnorm(normed(), mode))
    proof = da.verify(accumulator, micro_batches())
    assert proof.holds, proof
    assert "state" not in [line.name for line in proof.lines]
    assert ("differs by design (BatchNorm: micro_batch)" in str(proof)) == (mode == "micro_batch")
    assert "None" not in str(proof)


def test_micro_batch_takes_a_conversion_back() -> None:
    model = da.convert_batchnorm(da.convert_batchnorm(normed(), "pooled"), "micro_batch")
    assert type(model[1]) is nn.BatchNorm1d  # type: ignore[index]
    with pytest.raises(da.ConfigError, match="mode='pool' is unknown"):
        da.convert_batchnorm(normed(), "pool")


class Cached(Layer):
    """Holds a cache, and of each forward what the objective reads after it, with its graph."""

    def forward(self, x: Tensor) -> Tensor:
        if self.cache is None:
            self.cache = torch.arange(2.0)
        out: Tensor = self.linear(x)
        self.aux = out.mean() * torch.rand(())
        return out


def test_caches_and_results_of_a_forward_are_no_state() -> None:
    model = Cached(cache=None, aux=None)
    accumulator = made(model, da.Objective(lambda m, x: m(x).square().sum() + 0.0 * m.aux, len))
    assert da.verify(accumulator, micro_batches()).holds
    assert model.cache is None
    accumulator.step(micro_batches())
    assert da.verify(accumulator, micro_batches()).holds


class Centred:
    """An objective with state of its own."""

    def __init__(self) -> None:
        self.centre, self.teacher = torch.zeros(CHANNELS), Teacher()

    def loss_sum(self, model: nn.Module, x: Tensor) -> Tensor:
        out = model(x)
        self.centre = 0.9 * self.centre + 0.1 * out.detach().mean(0).float()
        return out.square().sum()

    def denominator(self, x: Tensor) -> int:
        return len(x)


def test_state_of_the_objective_is_not_proven() -> None:
    objective = Centred()
    centre = objective.centre
    proof = da.verify(made(Layer(), objective), micro_batches())
    assert objective.centre is centre
    assert not centre.any()
    assert "objective.centre" in proof.failures


def test_a_parameter_outside_the_model_is_refused_and_nothing_moves() -> None:
    temperature = nn.Parameter(torch.ones(()))
    model = Layer()
    optimizer = torch.optim.AdamW([*model.parameters(), temperature], lr=0.1)
    objective = da.Objective(lambda m, x: (m(x) * temperature).square().sum(), len)
    accumulator = da.Accumulator(model, optimizer, objective)
    before = everything(accumulator)
    with pytest.raises(
        da.ConfigError, match=r"1 parameter\(s\) that are not the model's.*register them"
    ):
        da.verify(accumulator, micro_batches())
    assert same(everything(accumulator), before)
    assert float(temperature.detach()) == 1.0
    assert temperature.grad is None


class Fails(nn.Module):
    """A model that moves everything that it can reach and raises in one of its forwards."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(2, CHANNELS), nn.BatchNorm1d(CHANNELS)
        self.calls, self.at, self.stats = 0, None, {"seen": 0}

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.stats["seen"] += (
            int(torch.randint(3, ())) + random.randrange(3) + int(numpy.random.randint(3))
        )
        if self.at in (self.calls, str(x.dtype), "training" if self.training else "evaluating"):
            raise ArithmeticError("in the middle")
        out: Tensor = self.norm(self.linear(x))
        return out


@pytest.mark.parametrize("at", [None, 1, 3, "training", "torch.float64"])
def test_everything_is_as_before_whatever_happens(at: Any) -> None:
    model: Any = Fails()
    accumulator = made(model, clip_norm=1.0, seed=3)
    accumulator.scheduler = torch.optim.lr_scheduler.StepLR(accumulator.optimizer, 1)
    accumulator.step(micro_batches())
    model.calls, model.at = 0, at
    parameter = model.linear.weight
    parameter.grad = torch.ones_like(parameter)
    outside = nn.Linear(2, 2)
    before, group = everything(accumulator, outside), accumulator.optimizer.param_groups[0]
    try:
        da.verify(accumulator, micro_batches())
    except ArithmeticError:
        assert at is not None
    else:
        assert at is None
    assert same(everything(accumulator, outside), before)
    assert accumulator.optimizer.param_groups[0] is group
    assert torch.equal(parameter.grad, torch.ones_like(parameter))


def test_the_model_itself_as_plain_stays_as_it_is() -> None:
    model = Layer()
    accumulator = made(model)
    assert da.verify(accumulator, micro_batches(), plain=model).holds
    assert model.linear.weight.dtype is torch.float32


def test_torch_sync_batchnorm_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, CHANNELS), nn.SyncBatchNorm(CHANNELS))
    with pytest.raises(
        da.ConfigError, match=r"1 is a torch.nn.SyncBatchNorm.*convert_batchnorm\(model, 'sync'\)"
    ):
        da.verify(made(model), micro_batches())


def on_two_ranks(kind: str) -> tuple[bool, str]:
    torch.manual_seed(0)
    model = MOVED[kind][0]()
    accumulator = made(DistributedDataParallel(model))
    proof = da.verify(accumulator, micro_batches(2)[dist.get_rank() :])  # rank 1 has one less
    return proof.holds, proof.failures


@pytest.mark.parametrize("kind", ["unconverted BatchNorm", "counter"])
def test_ranks_agree_on_what_is_not_proven(two_ranks: World, kind: str) -> None:
    one, other = two_ranks.run(on_two_ranks, kind)
    assert one == other
    assert not one[0]
    assert "3 times in this window" in one[1]


class Own:
    """A micro-batch of a class of its own."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def to(self, device: torch.device) -> Own:
        return Own(self.x.to(device))


@dataclass
class Batch:
    x: Tensor


class Pair(NamedTuple):
    x: Tensor
    name: str = "one"


CLASSES: dict[str, Callable[[Tensor], Any]] = {
    "UserDict": lambda x: UserDict(x=x),
    "BatchEncoding": lambda x: BatchEncoding({"x": x}),
    "dataclass": Batch,
    "namedtuple": Pair,
    "nested": lambda x: {"inputs": UserDict(x=x)},
    "own class": Own,
}


def x_of(micro_batch: Any) -> Tensor:
    """The tensor of a micro-batch, whose class must be what it was."""
    if type(micro_batch) is dict:
        micro_batch = micro_batch["inputs"]
    found: Tensor = micro_batch["x"] if isinstance(micro_batch, UserDict) else micro_batch.x
    return found


@pytest.mark.parametrize("kind", CLASSES)
def test_micro_batches_of_any_class_are_proven(kind: str) -> None:
    accumulator = made(
        Layer(),
        da.Objective(
            lambda m, micro_batch: loss_sum(m, x_of(micro_batch)),
            lambda micro_batch: len(x_of(micro_batch)),
        ),
    )
    window = [CLASSES[kind](x) for x in micro_batches()]
    if kind == "own class":
        with pytest.raises(da.ConfigError, match="combine=function"):
            da.verify(accumulator, window)
        combine = partial(da.verify, combine=lambda those: Own(torch.cat([own.x for own in those])))
        assert combine(accumulator, window).holds
    else:
        assert da.verify(accumulator, window).holds


def test_lists_of_samples_are_not_joined_channel_by_channel() -> None:
    samples = [([x, x], [1, 2]) for x in micro_batches()]
    accumulator = made(
        Layer(),
        da.Objective(lambda m, micro_batch: loss_sum(m, torch.cat(micro_batch[0])), lambda _: 8),
    )
    with pytest.raises(da.ConfigError, match="combine=function"):
        da.verify(accumulator, samples)
