"""Gradients that nobody would have reduced: refused before an update, or reduced like all others.

y = (w + c) x in float64, w0 = c0 = 0, SGD with lr 1 and the sum of outputs: the update of each is
minus the mean of x. Rank 0 has x = 1, 2, 5 and rank 1 has 2, 3, so that it is -2.6.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from setting import whole
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from worlds import World

import distaccum as da

XS = ((1.0, 2.0, 5.0), (2.0, 3.0))
MEAN = 2.6
F64 = torch.float64


class Line(nn.Module):
    """y = (w + c) x, with a part that is used or not."""

    def __init__(self, used: tuple[str, ...] = ("w", "c"), dtype: torch.dtype = F64) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1, dtype=dtype))
        self.c = nn.Parameter(torch.zeros(1, dtype=dtype))
        self.used = used

    def forward(self, x: Tensor) -> Tensor:
        return sum(getattr(self, name) for name in self.used) * x

    def loss(self, x: Tensor) -> Tensor:
        return self.forward(x).sum()


def outputs() -> da.Objective:
    return da.Objective(lambda model, x: model(x).double().sum(), lambda x: len(x))


def own_micro_batches(dtype: torch.dtype = F64) -> list[Tensor]:
    rank = dist.get_rank() if dist.is_initialized() else 0
    return [torch.tensor([x], dtype=dtype) for x in XS[rank]]


def value(parameter: Tensor) -> float:
    return float(whole(parameter))


def values(model: nn.Module) -> list[float]:
    return [value(parameter) for parameter in model.parameters()]


def sgd(parameters: Any) -> torch.optim.SGD:
    return torch.optim.SGD(parameters, lr=1.0)


def refusal(action: Callable[[], Any]) -> str:
    """The text of the ConfigError that this rank raises; without one, what was returned."""
    try:
        return f"accepted: {action()}"
    except da.ConfigError as error:
        return str(error)


def everywhere(texts: list[str], words: str) -> None:
    assert all(words in text for text in texts), texts


def criterion_outside(kind: str) -> str:
    model = Line(("w",))
    model.c.requires_grad_(False)
    temperature = nn.Parameter(torch.zeros(1, dtype=F64))
    wrapped = DistributedDataParallel(model) if kind == "ddp" else fully_shard(model)
    objective = da.Objective(lambda model, x: (model(x) + temperature * x).sum(), lambda x: len(x))
    optimizer = sgd([*(p for p in wrapped.parameters() if p.requires_grad), temperature])
    return refusal(lambda: da.Accumulator(wrapped, optimizer, objective).step(own_micro_batches()))


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_criterion_of_its_own_in_the_optimizer(two_ranks: World, kind: str) -> None:
    everywhere(two_ranks.run(criterion_outside, kind), "are not in the wrapped model")


def criterion_inside() -> list[float]:
    wrapped = DistributedDataParallel(Line())
    da.Accumulator(wrapped, sgd(wrapped.parameters()), outputs()).step(own_micro_batches())
    return values(wrapped)


def test_a_criterion_inside_of_the_wrapped_model_is_exact(two_ranks: World) -> None:
    assert two_ranks.run(criterion_inside) == [[-MEAN, -MEAN]] * 2


def test_a_criterion_of_its_own_on_one_process_is_exact() -> None:
    for dtype, xs in ((F64, XS[0]), (torch.bfloat16, (1.0,) * 512)):
        model, c = Line(("w",), dtype), nn.Parameter(torch.zeros(1, dtype=dtype))
        objective = da.Objective(
            lambda model, x, c=c: (model(x) + c * x).double().sum(), lambda x: len(x)
        )
        with pytest.warns(da.StateWarning, match="not in the optimizer"):
            accumulator = da.Accumulator(model, sgd([model.w, c]), objective)
        accumulator.step([torch.tensor([x], dtype=dtype) for x in xs])
        assert (
            value(model.w)
            == value(c)
            == pytest.approx(-sum(xs) / len(xs), rel=1e-2 if dtype != F64 else 1e-15)
        )


def thawed(when: str, dtype: torch.dtype = F64) -> str:
    model = Line(dtype=dtype)
    if when != "ignored":
        model.c.requires_grad_(False)
    else:
        # as it names those of the root
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, [".c"])
    wrapped = DistributedDataParallel(model)
    optimizer = sgd(model.parameters())
    if when == "before the accumulator":
        model.c.requires_grad_(True)
    accumulator = None
    if when not in ("before the accumulator", "ignored"):
        accumulator = da.Accumulator(wrapped, optimizer, outputs())
        accumulator.step(own_micro_batches(dtype))
        model.c.requires_grad_(True)
    if when == "added":
        model.late = nn.Parameter(torch.zeros(1, dtype=dtype))
        optimizer.add_param_group({"params": [model.late]})

    def act() -> list[float]:
        made = accumulator or da.Accumulator(wrapped, optimizer, outputs())
        made.step(own_micro_batches(dtype))
        return values(model)

    return refusal(act)


@pytest.mark.parametrize("when", ["before the accumulator", "between windows", "added", "ignored"])
def test_a_parameter_thawed_or_added_after_ddp_was_made(two_ranks: World, when: str) -> None:
    everywhere(two_ranks.run(thawed, when), "would get the gradients of this rank only")


def test_a_parameter_thawed_after_ddp_was_made_is_kept_where_sums_are_ours(
    two_ranks: World,
) -> None:
    texts = two_ranks.run(thawed, "before the accumulator", torch.bfloat16)
    assert len(set(texts)) == 1
    values = [float(value) for value in texts[0].removeprefix("accepted: ").strip("[]").split(", ")]
    assert values == pytest.approx([-MEAN, -MEAN], rel=2**-8)
    everywhere(
        two_ranks.run(thawed, "between windows", torch.bfloat16),
        "would get the gradients of this rank only",
    )


def frozen_later(find_unused: bool) -> str:
    model = Line()
    wrapped = DistributedDataParallel(model, find_unused_parameters=find_unused)
    accumulator = da.Accumulator(wrapped, sgd(model.parameters()), outputs(), audit="always")
    accumulator.step(own_micro_batches())
    model.c.requires_grad_(False)
    before = value(model.w)
    text = refusal(lambda: accumulator.step(own_micro_batches()).loss)
    assert find_unused or value(model.w) == before
    # nothing of the refused window is left, and c stays frozen
    accumulator.step(own_micro_batches())
    return f"{text} {value(model.w):.6f} {value(model.c):.6f}"


def test_a_layer_frozen_after_ddp_was_made(two_ranks: World) -> None:
    texts = two_ranks.run(frozen_later, False)
    everywhere(texts, "1 parameter(s) (c) were frozen after DistributedDataParallel was made")
    everywhere(texts, f"{-2 * MEAN:.6f} {-MEAN:.6f}")
    everywhere(two_ranks.run(frozen_later, True), f"{-3 * MEAN:.6f} {-MEAN:.6f}")


def unused_in_the_last(policy: str, by_all: bool, **ddp: bool) -> tuple[float, float]:
    """The third micro-batch does not reach c, on rank 0 or on both ranks."""
    model = Line()
    wrapped = DistributedDataParallel(model, **ddp)
    rounds = [0]

    def loss_sum(called: nn.Module, x: Tensor) -> Tensor:
        rounds[0] += 1
        leaves_out = rounds[0] == 3 and (by_all or dist.get_rank() == 0)
        model.used = ("w",) if leaves_out else ("w", "c")
        return called(x).sum()

    objective = da.Objective(loss_sum, lambda x: len(x))
    accumulator = da.Accumulator(
        wrapped, sgd(model.parameters()), objective, sync=policy, check_cut=False, audit="always"
    )
    accumulator.step(own_micro_batches())
    return value(model.w), value(model.c)


@pytest.mark.parametrize("by_all", [True, False], ids=["on all ranks", "on one rank"])
@pytest.mark.parametrize("policy", ["boundary", "every"])
def test_a_parameter_unused_in_the_last_micro_batch(
    two_ranks: World, policy: str, by_all: bool
) -> None:
    """x = 5 of rank 0 does not reach c; the third micro-batch of rank 1 is padding."""
    expected = [(pytest.approx(-MEAN, rel=1e-15), pytest.approx(-8 / 5, rel=1e-15))] * 2
    assert two_ranks.run(unused_in_the_last, policy, by_all) == expected


def unused_with_options(option: str) -> tuple[float, float]:
    return unused_in_the_last("boundary", False, **{option: True})


@pytest.mark.parametrize("option", ["find_unused_parameters", "gradient_as_bucket_view"])
def test_a_parameter_unused_in_the_last_micro_batch_with_options(
    two_ranks: World, option: str
) -> None:
    expected = [(pytest.approx(-MEAN, rel=1e-15), pytest.approx(-8 / 5, rel=1e-15))] * 2
    assert two_ranks.run(unused_with_options, option) == expected


def past_ddp(method: str) -> str:
    model = Line()
    wrapped = DistributedDataParallel(model)
    objective = da.Objective(
        lambda called, x: called.module.loss(x) if method == "method" else called.module(x).sum(),
        lambda x: len(x),
    )
    accumulator = da.Accumulator(wrapped, sgd(model.parameters()), objective)
    text = refusal(lambda: accumulator.step(own_micro_batches()).loss)
    return f"{text} {value(model.w)}"


@pytest.mark.parametrize("method", ["method", "module"])
def test_an_objective_past_ddps_forward(two_ranks: World, method: str) -> None:
    texts = two_ranks.run(past_ddp, method)
    everywhere(texts, "not model.module(...)")
    everywhere(texts, " 0.0")


def under_no_sync(kind: str) -> list[float]:
    model = Line()
    if kind == "ddp":
        wrapped: Any = DistributedDataParallel(model)
        accumulator = da.Accumulator(wrapped, sgd(model.parameters()), outputs(), audit="always")
        for _ in range(2):
            with wrapped.no_sync():
                accumulator.step(own_micro_batches())
        assert wrapped.require_backward_grad_sync
    else:
        wrapped = fully_shard(model)
        accumulator = da.Accumulator(wrapped, sgd(wrapped.parameters()), outputs(), audit="always")
        for _ in range(2):
            wrapped.set_requires_gradient_sync(False)
            accumulator.step(own_micro_batches())
    return values(wrapped)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_an_old_no_sync_around_the_step(two_ranks: World, kind: str) -> None:
    assert two_ranks.run(under_no_sync, kind) == [pytest.approx([-2 * MEAN] * 2, rel=1e-15)] * 2


def other_parameters(kind: str) -> str:
    model = Line()
    if kind == "copy":
        optimizer = sgd(copy.deepcopy(model).parameters())
        wrapped: nn.Module = DistributedDataParallel(model)
    else:
        optimizer = sgd(model.parameters())
        wrapped = fully_shard(model)
    return refusal(lambda: da.Accumulator(wrapped, optimizer, outputs()))


@pytest.mark.parametrize("kind", ["copy", "before fully_shard"])
def test_an_optimizer_over_other_parameters(two_ranks: World, kind: str) -> None:
    everywhere(two_ranks.run(other_parameters, kind), "belongs to the model")


def test_an_optimizer_over_a_copy_on_one_process() -> None:
    model = Line()
    with pytest.raises(da.ConfigError, match="None of the optimizer's 2"):
        da.Accumulator(model, sgd(copy.deepcopy(model).parameters()), outputs())


STRATEGIES = ("single", "ddp", "ddp map", "ddp apart", "fsdp", "fsdp in groups")


def decayed(kind: str) -> tuple[float, float]:
    """What two windows of AdamW with decay 0.05 make of a parameter that starts at 1 and is not
    used."""
    model = Line(("w",))
    wrapped: nn.Module = model
    dtype: dict[str, Any] = {}
    if kind.startswith("ddp"):
        wrapped = DistributedDataParallel(model, find_unused_parameters=kind == "ddp map")
        dtype = {"accum_dtype": torch.float32} if kind == "ddp apart" else {}
    with torch.no_grad():
        model.c.fill_(1.0)
    if kind == "fsdp in groups":
        parts = nn.Sequential(Line(("w",)), Line(("w",)))
        with torch.no_grad():
            parts[1].w.fill_(1.0)
            parts[0].c.fill_(1.0)
        for part in parts:
            fully_shard(part)
        wrapped = fully_shard(parts)
        wrapped.forward = lambda x: parts[0](x)
    elif kind.startswith("fsdp"):
        wrapped = fully_shard(model)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1.0, weight_decay=0.05)
    accumulator = da.Accumulator(wrapped, optimizer, outputs(), **dtype)
    for _ in range(2):
        accumulator.step(own_micro_batches())
    if kind == "fsdp in groups":
        return value(parts[1].w), value(parts[0].c)
    unused = dict(wrapped.named_parameters())
    return (value(unused.get("c", unused.get("module.c"))),) * 2


def test_a_parameter_that_no_micro_batch_uses(two_ranks: World) -> None:
    """It gets a gradient of zeros, so that decay moves it: (1 - lr x 0.05)^2 everywhere."""
    expected = [(pytest.approx(0.9025, rel=1e-15),) * 2] * 2
    assert decayed("single") == expected[0]
    for kind in STRATEGIES[1:]:
        assert two_ranks.run(decayed, kind) == expected, kind


def part_of_the_parameters(kind: str) -> list[float]:
    import warnings

    model = Line()
    wrapped: nn.Module = {
        "single": lambda m: m,
        "ddp": DistributedDataParallel,
        "fsdp": fully_shard,
    }[kind](model)
    named = {name.removeprefix("module."): p for name, p in wrapped.named_parameters()}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        accumulator = da.Accumulator(wrapped, sgd([named["w"]]), outputs())
        found = []
        for _ in range(3):
            norm = accumulator.step(own_micro_batches()).grad_norm
            found += [norm, 0.0 if named["c"].grad is None else 1.0]
    rank = dist.get_rank() if dist.is_initialized() else 0
    assert len([w for w in caught if "not in the optimizer" in str(w.message)]) == (rank == 0)
    return found


def test_an_optimizer_over_a_part_of_the_trained_parameters(two_ranks: World) -> None:
    own = sum(XS[0]) / len(XS[0])
    assert part_of_the_parameters("single") == pytest.approx([own, 0.0] * 3, rel=1e-15)
    for kind in ("ddp", "fsdp"):
        assert (
            two_ranks.run(part_of_the_parameters, kind)
            == [pytest.approx([MEAN, 0.0] * 3, rel=1e-15)] * 2
        )


def meshes(kind: str) -> str:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).double()
    if kind == "two meshes":
        one = init_device_mesh("cpu", (4,), mesh_dim_names=("one",))
        flat = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        fully_shard(model[0], mesh=flat)
        fully_shard(model, mesh=one)
    elif kind == "tensor":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))
        for layer in model:
            parallelize_module(layer, mesh["model"], ColwiseParallel(use_local_output=True))
        fully_shard(model, mesh=mesh["data"])
    elif kind == "offload":
        fully_shard(
            model,
            mesh=init_device_mesh("cpu", (4,)),
            offload_policy=CPUOffloadPolicy(pin_memory=False),
        )
    else:
        fully_shard(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", kind)))
    return refusal(lambda: da.Accumulator(model, sgd(model.parameters()), outputs()))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("tensor", "neither replicates nor shards whole parameters"),
        ("two meshes", "another mesh"),
        ("cp", "ranks along cp share samples"),
        ("pp", "ranks along pp share samples"),
        ("offload", "CPUOffloadPolicy"),
    ],
)
def test_meshes_whose_ranks_share_samples(four_ranks: World, kind: str, words: str) -> None:
    everywhere(four_ranks.run(meshes, kind), words)


def thawed_and_frozen_under_fsdp() -> list[list[float]]:
    """FSDP2 asks for gradients of what is trained when it gathers: what is thawed or frozen between
    windows is kept."""
    model = Line()
    model.c.requires_grad_(False)
    wrapped = fully_shard(model)
    accumulator = da.Accumulator(wrapped, sgd(wrapped.parameters()), outputs(), audit="always")
    found = []
    for trained in (False, True, False):
        wrapped.c.requires_grad_(trained)
        accumulator.step(own_micro_batches())
        found.append(values(wrapped))
    return found


def test_a_parameter_thawed_and_frozen_under_fsdp(two_ranks: World) -> None:
    expected = [[-MEAN, 0.0], [-2 * MEAN, -MEAN], [-3 * MEAN, -MEAN]]
    for found in two_ranks.run(thawed_and_frozen_under_fsdp):
        assert found == [pytest.approx(pair, rel=1e-15) for pair in expected]


def frozen_after_an_evaluation(reshard: bool) -> list[Any]:
    """An evaluation leaves FSDP2's root gathered, and what is frozen then is a copy that the next
    shards replace."""
    model = fully_shard(Line())
    optimizer = sgd(model.parameters())
    with torch.no_grad():
        model(own_micro_batches()[0])  # before the accumulator is made, too
    accumulator = da.Accumulator(model, optimizer, outputs(), audit="always")
    found: list[Any] = []
    for trained in (True, True, False):
        with torch.no_grad():
            model(own_micro_batches()[0])
        if reshard:
            model.reshard()
        model.c.requires_grad_(trained)
        try:
            accumulator.step(own_micro_batches())
        except da.ConfigError as error:
            return [*found, str(error)]
        found.append(values(model))
    return found


def test_a_parameter_frozen_after_an_evaluation_under_fsdp(two_ranks: World) -> None:
    both = [
        pytest.approx([-MEAN, -MEAN], rel=1e-15),
        pytest.approx([-2 * MEAN, -2 * MEAN], rel=1e-15),
    ]
    for found in two_ranks.run(frozen_after_an_evaluation, False):
        assert found[:2] == both
        assert found[2].startswith(
            "1 parameter(s), such as c, were frozen or unfrozen while FSDP2 held the model"
        )
        assert len(found) == 3
    for found in two_ranks.run(frozen_after_an_evaluation, True):
        assert found == [*both, pytest.approx([-3 * MEAN, -2 * MEAN], rel=1e-15)]


def dtensor_collectives() -> list[str]:
    """What the ledger counts where DTensor communicates on its own."""
    from distaccum.parallel.ledger import Ledger

    mesh = init_device_mesh("cpu", (2,))
    sharded = DTensor.from_local(torch.ones(2, 2), mesh, [Shard(0)])
    with Ledger() as ledger:
        sharded.full_tensor()
        dist.all_to_all_single(torch.empty(2), torch.ones(2))
    return sorted(ledger.traffic.counts)


def test_the_ledger_sees_what_dtensor_and_all_to_all_send(two_ranks: World) -> None:
    for kinds in two_ranks.run(dtensor_collectives):
        assert "all_to_all" in kinds
        assert len(kinds) == 2, kinds


def test_the_ledger_names_why_less_travelled() -> None:
    from distaccum.core.traffic import Traffic
    from distaccum.parallel.ledger import Verdict

    with pytest.raises(
        da.LedgerError, match="Less was sent than expected: perhaps the objective calls"
    ):
        Verdict(Traffic.of([("all_reduce", 100)]), Traffic()).require(1)
    with pytest.raises(da.LedgerError, match="a module communicates on its own"):
        Verdict(Traffic(), Traffic.of([("all_reduce", 100)])).require(1)


def after_an_exception() -> list[int]:
    """Windows under sync='every' whose ledger must agree, around one that fails."""
    wrapped = DistributedDataParallel(
        nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), bucket_cap_mb=0.0001
    )
    accumulator = da.Accumulator(
        wrapped, sgd(wrapped.parameters()), outputs(), sync="every", audit="always"
    )
    good, bad = [torch.ones(1, 8)] * 2, [torch.full((1, 8), torch.inf)] * 2
    accumulator.step(good)
    with pytest.raises(da.DivergenceError):
        accumulator.step(bad)
    return [accumulator.step(good).step for _ in range(2)]


def test_the_ledger_after_an_exception_with_sync_every(two_ranks: World) -> None:
    assert two_ranks.run(after_an_exception) == [[2, 3]] * 2
