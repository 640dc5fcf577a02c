"""BatchNorm under accumulation against arithmetic: all inputs of a layer at once, on one process,
in float64.

Numbers are of order 1 and sums have fewer than 1,000 terms, so that two orders of summation differ
by less than 1,000 x 2.2e-16 = 2.2e-13: 1e-12 everywhere.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint
from worlds import World

from distaccum.errors import ConfigError
from distaccum.nn.batchnorm import (
    BatchNormMode,
    PooledStatistics,
    collectives,
    convert_batchnorm,
    has_batchnorm,
    mode_of,
    pooled_statistics,
)
from distaccum.parallel.ledger import Ledger

NEAR = {"rtol": 0.0, "atol": 1e-12}
CPU = torch.device("cpu")
SHAPES: dict[str, tuple[int, ...]] = {"1d": (), "2d": (3, 2), "3d": (2, 2, 2)}
# Samples of each micro-batch, by window and rank of four: uneven, and some rank without any.
SIZES = [[[3, 2], [4], [], [2, 5, 3]], [[2], [], [3, 3], [2, 2]]]


@pytest.fixture(scope="module", params=[1, 2, 4], ids=lambda size: f"{size}ranks")
def ranks(request: pytest.FixtureRequest, worlds: Callable[[int], World]) -> World:
    return worlds(request.param)


def net(kind: str = "2d", momentum: float | None = 0.1) -> nn.Sequential:
    """BatchNorm of 4 and of 3 channels (layers 1 and 4), with running statistics of earlier
    windows."""
    torch.manual_seed(3)
    linear: Any = {"1d": nn.Linear, "2d": nn.Conv2d, "3d": nn.Conv3d}[kind]
    norm: Any = {"1d": nn.BatchNorm1d, "2d": nn.BatchNorm2d, "3d": nn.BatchNorm3d}[kind]
    kernel = () if kind == "1d" else (1,)
    model = nn.Sequential(
        linear(2, 4, *kernel),
        norm(4, momentum=momentum),
        nn.Tanh(),
        linear(4, 3, *kernel),
        norm(3, eps=1e-3, momentum=momentum),
    ).double()
    for layer in (model[1], model[4]):
        for tensor in (layer.weight, layer.bias, layer.running_mean, layer.running_var):
            nn.init.uniform_(tensor, 0.5, 1.5)
        layer.num_batches_tracked.fill_(2)
    return model


def converted(
    mode: str, kind: str = "2d", momentum: float | None = 0.1
) -> tuple[nn.Module, PooledStatistics]:
    model = convert_batchnorm(net(kind, momentum), BatchNormMode(mode))
    statistics = pooled_statistics(model)
    assert statistics is not None
    return model, statistics


def sample(kind: str, size: int, *key: int) -> Tensor:
    """A micro-batch [size, 2, ...] with mean 0.7."""
    generator = torch.Generator().manual_seed(sum(n * 101**i for i, n in enumerate(key)))
    return torch.randn(size, 2, *SHAPES[kind], generator=generator, dtype=torch.float64) + 0.7


def deal(kind: str, window: int, ranks: int) -> list[list[Tensor]]:
    rows = SIZES[window]
    if ranks < 4:
        rows = [[n for row in rows for n in row]] + [[]] * (ranks - 1)
    return [
        [sample(kind, n, window, rank, i) for i, n in enumerate(row)]
        for rank, row in enumerate(rows)
    ]


def buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def update(running: dict[str, Tensor], layer: str, inputs: Tensor, momentum: float | None) -> None:
    """One update of a layer's running statistics with inputs [n, C, ...], by hand."""
    flat = inputs.transpose(0, 1).flatten(1)
    batches = running[f"{layer}.num_batches_tracked"] = running[f"{layer}.num_batches_tracked"] + 1
    factor = 1 / int(batches) if momentum is None else momentum
    for name, new in (("running_mean", flat.mean(1)), ("running_var", flat.var(1, unbiased=True))):
        running[f"{layer}.{name}"] = (1 - factor) * running[f"{layer}.{name}"] + factor * new


def inputs_of_layers(micro_batches: list[Tensor], kind: str) -> dict[str, Tensor]:
    """What torch's own layers see when they normalise micro-batch by micro-batch, all of it."""
    plain = net(kind)
    seen: dict[str, list[Tensor]] = {"1": [], "4": []}
    for name, inputs in seen.items():
        plain[int(name)].register_forward_pre_hook(
            lambda _, args, inputs=inputs: inputs.append(args[0].detach())
        )
    for micro_batch in micro_batches:
        plain(micro_batch)
    return {name: torch.cat(inputs) for name, inputs in seen.items()}


def our_group() -> dist.ProcessGroup | None:
    return dist.group.WORLD if dist.get_world_size() > 1 else None


def pooled_windows(kind: str, momentum: float | None, skipped: int | None) -> Any:
    """Two windows; the running statistics found and expected, and what each window sent."""
    rank, size = dist.get_rank(), dist.get_world_size()
    model, statistics = converted("pooled", kind, momentum)
    plain = net(kind, momentum)
    expected, sent = buffers(model), []
    for window in (0, 1):
        dealt = deal(kind, window, size)
        before = buffers(model)
        with Ledger() as ledger:
            for micro_batch in dealt[rank]:
                with statistics.observing():
                    out = model(micro_batch)
                torch.testing.assert_close(out, plain(micro_batch), **NEAR)
                model(micro_batch + 5)  # outside: not observed
            with statistics.padding():
                model(sample(kind, 3, 99))
            statistics.send(our_group(), CPU)
        sent.append((dict(ledger.traffic.counts), dict(ledger.traffic.bytes)))
        assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())
        if window == skipped:
            statistics.forget()
            continue
        statistics.commit()
        for name, inputs in inputs_of_layers(
            [micro_batch for row in dealt for micro_batch in row], kind
        ).items():
            update(expected, name, inputs, momentum)
    after = buffers(model)
    statistics.send(our_group(), CPU)  # a window in which nobody observed anything
    statistics.commit()
    assert all(torch.equal(value, after[name]) for name, value in model.named_buffers())
    return after, expected, sent, statistics.num_bytes


@pytest.mark.parametrize("skipped", [None, 0])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("kind", list(SHAPES))
def test_pooled_running_statistics(
    ranks: World, kind: str, momentum: float | None, skipped: int | None
) -> None:
    results = ranks.run(pooled_windows, kind, momentum, skipped)
    for found, expected, sent, num_bytes in results:
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name], **NEAR)
            assert torch.equal(value, results[0][0][name])
        assert num_bytes == 8 * ((1 + 2 * 4) + (1 + 2 * 3))
        assert (
            sent
            == [({"all_reduce": 1}, {"all_reduce": num_bytes}) if ranks.size > 1 else ({}, {})] * 2
        )


def synced_rounds(kind: str, momentum: float | None, repeat: bool) -> Any:
    """Two rounds beside one process that has the whole batch of each; the last rank has no
    micro-batch in the second."""
    rank, size = dist.get_rank(), dist.get_world_size()
    model, statistics = converted("sync", kind, momentum)
    plain = net(kind, momentum)
    before = buffers(model)
    pairs: list[tuple[Tensor, Tensor]] = []
    for i in range(2):
        sizes = [2 + (r + i) % 3 for r in range(size if i == 0 or size == 1 else size - 1)]
        batch = torch.cat([sample(kind, n, i, r) for r, n in enumerate(sizes)]).requires_grad_()
        own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        pads = rank >= len(sizes)
        micro_batch = (sample(kind, 3, 99) if pads else batch.detach()[own]).requires_grad_()
        with Ledger() as ledger:
            with statistics.padding() if pads else statistics.observing():
                out = (
                    checkpoint(model, micro_batch, use_reentrant=False)
                    if repeat
                    else model(micro_batch)
                )
            (out.sin().sum() * float(not pads)).backward()
        told = collectives(model)
        assert (sum(told), len(told)) == (
            ledger.traffic.bytes["all_reduce"],
            ledger.traffic.counts["all_reduce"],
        )
        whole = plain(batch)
        whole.sin().sum().backward()
        assert out.isfinite().all()
        assert micro_batch.grad is not None
        if pads:
            assert not micro_batch.grad.any()
        else:
            pairs += [(out.detach(), whole.detach()[own]), (micro_batch.grad, batch.grad[own])]
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        dist.all_reduce(ours.grad)
        pairs.append((ours.grad, theirs.grad))
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())
    assert statistics.num_bytes == 0
    statistics.send(our_group(), CPU)
    statistics.commit()
    return pairs, buffers(model), buffers(plain), told


@pytest.mark.parametrize("repeat", [False, True], ids=["once", "checkpointed"])
@pytest.mark.parametrize(
    ("kind", "momentum"), [("1d", 0.1), ("2d", 0.1), ("2d", None), ("3d", 0.1)]
)
def test_sync_is_one_batch(ranks: World, kind: str, momentum: float | None, repeat: bool) -> None:
    results = ranks.run(synced_rounds, kind, momentum, repeat)
    for pairs, found, expected, told in results:
        assert len(pairs) >= 2 + 8
        for ours, theirs in pairs:
            torch.testing.assert_close(ours, theirs, **NEAR)
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name], **NEAR)
            assert torch.equal(value, results[0][1][name])
        assert told == ([8 * 9, 8 * 7, 8 * 6, 8 * 8] if ranks.size > 1 else [])


def shared_layer() -> Any:
    """One layer that runs twice in a forward, repeated for the backward: beside the same on one
    process."""
    rank, size = dist.get_rank(), dist.get_world_size()
    layer = nn.BatchNorm1d(2, track_running_stats=False).double()
    layer.weight.data.copy_(torch.tensor([0.5, 2.0]))
    ours, theirs = (nn.Sequential(norm, nn.Tanh(), norm) for norm in (copy.deepcopy(layer), layer))
    convert_batchnorm(ours, BatchNormMode.sync)
    statistics = pooled_statistics(ours)
    assert statistics is not None
    batch = torch.cat([sample("1d", 3, r) for r in range(size)]).requires_grad_()
    micro_batch = batch.detach()[3 * rank : 3 * rank + 3].requires_grad_()
    with statistics.observing():
        out = checkpoint(ours, micro_batch, use_reentrant=False)
    out.pow(3).sum().backward()
    theirs(batch).pow(3).sum().backward()
    statistics.send(our_group(), CPU)
    statistics.commit()
    assert batch.grad is not None
    return micro_batch.grad, batch.grad[3 * rank : 3 * rank + 3]


def test_a_layer_that_runs_twice(ranks: World) -> None:
    for found, expected in ranks.run(shared_layer):
        torch.testing.assert_close(found, expected, **NEAR)


def sharded_in_bf16(mode: str) -> Any:
    """A step under FSDP2 with bf16 compute: what the layer saw, its running statistics, and outputs
    in eval mode."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 1))
    convert_batchnorm(model, BatchNormMode(mode))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))
    statistics = pooled_statistics(model)
    seen: list[Tensor] = []
    handle = model[1].register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    x = torch.randn(4, 2, 5, 5, generator=torch.Generator().manual_seed(dist.get_rank()))
    if statistics is None:
        model(x).sum().backward()
    else:
        with statistics.observing():
            out = model(x)
        statistics.send(dist.group.WORLD, CPU)
        out.sum().backward()
        statistics.commit()
    handle.remove()
    evaluated = model.eval()(x)
    return seen[0].float(), buffers(model), evaluated.dtype, bool(evaluated.isfinite().all())


@pytest.mark.parametrize("mode", ["pooled", "sync", "frozen"])
def test_under_fsdp_in_bf16(two_ranks: World, mode: str) -> None:
    results = two_ranks.run(sharded_in_bf16, mode)
    running = buffers(nn.Sequential(nn.Identity(), nn.BatchNorm2d(4)))
    if mode != "frozen":
        update(running, "1", torch.cat([seen for seen, *_ in results]), 0.1)
    for _, found, dtype, finite in results:
        assert dtype == torch.bfloat16
        assert finite
        for name, value in found.items():
            assert value.dtype == running[name].dtype  # buffers stay in float32
            # The reference itself sums 72 float32 numbers: 72 x 6e-8 = 4e-6.
            torch.testing.assert_close(value, running[name], rtol=0, atol=1e-5)


def test_frozen_is_eval_mode_with_trained_affine() -> None:
    model = convert_batchnorm(net(), BatchNormMode.frozen)
    plain = net().eval()
    before = buffers(model)
    x = sample("2d", 5, 1)
    ours = model(x)
    with torch.no_grad():
        for buffer in model.buffers():
            # as whoever broadcasts or restores buffers does before the backward
            buffer.copy_(buffer.clone())
    ours.sin().sum().backward()
    (theirs := plain(x)).sin().sum().backward()
    assert torch.equal(ours, theirs)
    assert all(
        torch.equal(a.grad, b.grad)
        for a, b in zip(model.parameters(), plain.parameters(), strict=True)
    )
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())
    assert pooled_statistics(model).layers == []


def test_micro_batch_changes_nothing() -> None:
    model = net()
    kinds = [type(module) for module in model.modules()]
    assert convert_batchnorm(model, BatchNormMode.micro_batch) is model
    assert [type(module) for module in model.modules()] == kinds
    assert pooled_statistics(model).layers == []
    assert collectives(model) == []


@pytest.mark.parametrize("mode", ["sync", "pooled", "frozen"])
def test_conversion_keeps_everything(mode: str) -> None:
    plain = net().eval()
    plain[4].train()
    held = {id(tensor) for tensor in (*plain.parameters(), *plain.buffers())}
    x = sample("2d", 4, 5)
    expected = copy.deepcopy(plain)
    model = convert_batchnorm(plain, BatchNormMode(mode))
    assert held == {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    assert [m.training for m in model.modules()] == [m.training for m in expected.modules()]
    assert repr(model[4]).replace("Window", "") == repr(expected[4])
    assert isinstance(model[4], nn.BatchNorm2d)
    assert list(model.state_dict()) == list(expected.state_dict())
    torch.testing.assert_close(model.eval()(x), expected.eval()(x), rtol=0, atol=0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # both keep the mode
        assert (pooled_statistics(other).layers == []) == (mode == "frozen")


def test_state_dict_goes_to_and_from_a_plain_model() -> None:
    model, statistics = converted("pooled")
    with statistics.observing():
        model(sample("2d", 4, 1))
    assert set(model.state_dict()) == set(net().state_dict())  # what was observed is no part of it
    statistics.send(None, CPU)
    statistics.commit()
    plain = net()
    plain.load_state_dict(model.state_dict())
    x = sample("2d", 3, 2)
    assert torch.equal(plain.eval()(x), model.eval()(x))
    again = convert_batchnorm(net(), BatchNormMode.pooled)
    again.load_state_dict(plain.state_dict())
    assert torch.equal(again.eval()(x), model(x))


def test_a_layer_alone_is_converted_too() -> None:
    layer = nn.BatchNorm1d(2, affine=False, track_running_stats=False)
    model = convert_batchnorm(layer, BatchNormMode.pooled)
    assert model is layer
    statistics = pooled_statistics(model)
    assert statistics is not None
    assert statistics.num_bytes == 0  # nothing is kept, nothing is sent
    with statistics.observing():
        model(torch.randn(4, 2))
    statistics.send(None, CPU)
    statistics.commit()


def test_a_distant_mean_costs_no_variance() -> None:
    """Mean 1e4, standard deviation 1, running mean 0: 1,000 squares of 1e8 lose 1e8 x 2.2e-13 =
    2e-5."""
    model = convert_batchnorm(nn.BatchNorm1d(2, momentum=1.0), BatchNormMode.pooled)
    statistics = pooled_statistics(model)
    assert statistics is not None
    x = torch.randn(500, 2, generator=torch.Generator().manual_seed(0)) + 1e4
    with statistics.observing():
        model(x)
    statistics.send(None, CPU)
    statistics.commit()
    torch.testing.assert_close(model.running_var.double(), x.double().var(0), rtol=0, atol=2e-5)


def test_what_is_refused() -> None:
    class Activated(nn.BatchNorm2d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).relu()

    untouched = nn.Sequential(nn.BatchNorm2d(2), nn.LazyBatchNorm2d())
    with pytest.raises(ConfigError, match=r"1 is a LazyBatchNorm2d .* does not know its channels"):
        convert_batchnorm(untouched, BatchNormMode.pooled)
    assert type(untouched[0]) is nn.BatchNorm2d
    with pytest.raises(ConfigError, match="Activated, a BatchNorm with code of its own"):
        convert_batchnorm(Activated(2), BatchNormMode.sync)
    with pytest.raises(ConfigError, match="no running statistics to be frozen"):
        convert_batchnorm(nn.BatchNorm1d(2, track_running_stats=False), BatchNormMode.frozen)
    model = convert_batchnorm(nn.BatchNorm2d(2), BatchNormMode.pooled)
    with pytest.raises(ValueError, match="an input of 3 dimensions"):
        model(torch.randn(2, 3, 3))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        model(torch.randn(1, 2, 1, 1))


def test_layers_of_several_modes_are_refused_by_name() -> None:
    model = nn.Sequential(
        convert_batchnorm(nn.BatchNorm1d(2), BatchNormMode.sync), nn.Sequential(nn.BatchNorm1d(2))
    )
    told = (
        r"needs one BatchNorm mode for all layers, but 0 is sync, 1\.0 is micro_batch\. Call"
        r" convert_batchnorm"
    )
    with pytest.raises(ConfigError, match=told):
        mode_of(model)
    assert mode_of(convert_batchnorm(model, BatchNormMode.pooled)) is BatchNormMode.pooled
    assert mode_of(model.eval()) is None


def test_has_batchnorm() -> None:
    assert has_batchnorm(net())
    assert has_batchnorm(convert_batchnorm(net(), BatchNormMode.sync))
    assert has_batchnorm(nn.LazyBatchNorm1d())
    assert not has_batchnorm(nn.Sequential(nn.Linear(2, 2), nn.SyncBatchNorm(2), nn.LayerNorm(2)))
