"""Parts of the GPU check that have a right answer: numerics, bf16, host syncs. Every rank runs them."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch
from gpu_alarm import alarm
from gpu_ranks import Found, Place
from setting import KINDS, RecordingSGD, make_model, make_window, masked_objective, reference, relative, whole
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import distaccum as da
from distaccum.models.gpt import GPT, GPTConfig
from distaccum.parallel.precision import Precision

# As in tests/step: sums of some hundred float64 terms of order one, in another order.
EXACT = 1e-12


def cases(ranks: int) -> list[tuple[str, tuple[int, ...], tuple[str, ...]]]:
    """Strategy, mesh and its policies, for so many ranks."""
    found: list[tuple[str, tuple[int, ...], tuple[str, ...]]] = [
        ("ddp", (), ("boundary", "every")),
        ("fsdp", (ranks,), ("boundary", "keep", "every")),
    ]
    if ranks == 1:
        found.insert(0, ("single", (), ("boundary",)))
    elif ranks % 2 == 0:
        found.append(("hsdp", (2, ranks // 2), ("boundary", "keep", "every", "shard")))
    return found


def spread(
    model: nn.Module, strategy: str, mesh: tuple[int, ...], place: Place, policy: MixedPrecisionPolicy | None = None
) -> nn.Module:
    """The model on its device, as a user would wrap it; layers with parameters, or blocks, are FSDP2's groups."""
    model = model.to(place.device)
    if strategy == "single":
        return model
    if strategy == "ddp":
        return DistributedDataParallel(model)
    made = _mesh(place.device.type, mesh)
    policy = policy or MixedPrecisionPolicy()
    for layer in getattr(model, "blocks", model.children()):
        if any(True for _ in layer.parameters()):
            fully_shard(layer, mesh=made, mp_policy=policy)
    return fully_shard(model, mesh=made, mp_policy=policy)


@cache
def _mesh(device_type: str, shape: tuple[int, ...]) -> DeviceMesh:
    """Made once: each of its groups has a communicator of its own, which takes memory."""
    return init_device_mesh(device_type, shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])


def numerics(place: Place) -> Found:
    """Gradients, updates, losses and norms of windows of all kinds against one float64 process, with the ledger on."""
    found, num_windows = Found(), 0
    for strategy, mesh, policies in cases(place.ranks):
        for policy in policies:
            errors = [
                _one_case(strategy, mesh, policy, num_micros, place)
                for num_micros in ((3,) if place.tiny else (1, 2, 3, 8))
            ]
            num_windows += len(KINDS) * len(errors)
            worst = {name: _largest([error[name] for error in errors]) for name in errors[0]}
            found.figures[f"{strategy} {policy}"] = worst
            found.require(
                _largest(list(worst.values())) <= EXACT, f"{strategy} {policy}: relative errors {worst}, limit {EXACT}"
            )
    found.figures["worst"] = _largest([error for worst in found.figures.values() for error in worst.values()])
    found.figures["windows, each as the ledger forecast"] = num_windows
    return found


def _one_case(strategy: str, mesh: tuple[int, ...], policy: str, num_micros: int, place: Place) -> dict[str, float]:
    """One window of each kind, one after the other: the worst relative errors."""
    lr = 0.1
    windows = [make_window(kind, num_micros, place.ranks, seed) for seed, kind in enumerate(KINDS)]
    model = spread(make_model(), strategy, mesh, place)
    optimizer = RecordingSGD(model.parameters(), lr=lr)
    accumulator = da.Accumulator(model, optimizer, masked_objective(), sync=policy, audit="always")
    errors: dict[str, list[float]] = {"gradient": [], "parameter": [], "loss": [], "grad_norm": []}
    for dealt, right in zip(windows, reference(windows, lr), strict=True):
        record = accumulator.step(dealt[place.rank])
        if record.skipped or record.verdict is None or record.num_micros != sum(len(micros) for micros in dealt):
            raise AssertionError(f"{strategy} {policy}: not the window that was given: {record}")
        for gradient, expected in zip(optimizer.gradients, right["gradients"], strict=True):
            errors["gradient"].append(relative(gradient.cpu(), expected))
        for parameter, expected in zip(model.parameters(), right["parameters"], strict=True):
            errors["parameter"].append(relative(whole(parameter).cpu(), expected))
        norm = sum(float(gradient.norm()) ** 2 for gradient in right["gradients"]) ** 0.5
        errors["loss"].append(abs(record.loss / right["loss"] - 1))
        errors["grad_norm"].append(abs(record.grad_norm / norm - 1))
    return {name: _largest(values) for name, values in errors.items()}


def _largest(values: list[float]) -> float:
    """The largest number, or nan where there is one: Python's max() would lose it."""
    return float(torch.tensor(values, dtype=torch.float64).max())


def bf16(place: Place) -> Found:
    """Sums that do not stall, and a gradient that is as near to float32's as one big bf16 batch is."""
    found = Found()
    num_micros = 512 if place.tiny else 1024  # a bf16 sum of ones stalls at 256
    for strategy, mesh, policies in cases(place.ranks):
        for policy in policies:
            if place.tiny and policy != policies[0]:
                continue
            update = _constant_update(strategy, mesh, policy, num_micros, place)
            found.figures[f"update of {num_micros} equal micros, {strategy} {policy}"] = update
            found.require(update == 1.0, f"bf16 parameters, {strategy} {policy}: the update is {update}, not 1.0")
    _against_float32(place, found)
    return found


def _constant_update(strategy: str, mesh: tuple[int, ...], policy: str, num_micros: int, place: Place) -> float:
    model: nn.Module = nn.Sequential(nn.Linear(1, 2, bias=False)).to(torch.bfloat16)
    nn.init.zeros_(next(model.parameters()))
    model = spread(model, strategy, mesh, place, MixedPrecisionPolicy(reduce_dtype=torch.float32))
    objective = da.Objective(lambda m, x: m(x).sum(dtype=torch.float32), len)
    accumulator = da.Accumulator(model, torch.optim.SGD(model.parameters(), lr=1.0), objective, sync=policy)
    accumulator.step([torch.ones(1, 1, dtype=torch.bfloat16)] * num_micros)
    weight = whole(next(model.parameters())).float()
    return -float(weight.mean()) if bool((weight == weight[0]).all()) else float("nan")


def small_gpt(tiny: bool, dropout: float = 0.0) -> GPT:
    """The same weights wherever it is called."""
    torch.manual_seed(11)
    layers, width = (2, 32) if tiny else (4, 256)
    return GPT(GPTConfig("gpt", 256, 64, num_layers=layers, num_heads=4, width=width, dropout=dropout, bias=True))


def token_micros(
    num_micros: int, seed: int, vocab: int = 256, length: int = 64, size: int = 2
) -> list[dict[str, Tensor]]:
    """Random tokens with a part of the labels ignored: micros of different weights, on the host."""
    generator = torch.Generator().manual_seed(seed)
    micros = []
    for index in range(num_micros):
        tokens = torch.randint(vocab, (size, length + 1), generator=generator)
        labels = tokens[:, 1:].clone()
        labels[0, : 7 * index % length] = -100
        micros.append({"input_ids": tokens[:, :-1].contiguous(), "labels": labels})
    return micros


def _against_float32(place: Place, found: Found) -> None:
    """Float32 parameters, bf16 products: relative L2 error of the whole gradient against one float32 batch."""
    objective, num_micros = da.CausalLM(shift=False), 8
    dealt = [token_micros(num_micros, seed=rank) for rank in range(place.ranks)]
    batch = {
        key: torch.cat([micro[key] for micros in dealt for micro in micros]).to(place.device)
        for key in ("input_ids", "labels")
    }

    def one_big_batch(objective: da.Objective | da.CausalLM) -> Tensor:
        model = small_gpt(place.tiny).to(place.device)
        (objective.loss_sum(model, batch) / objective.weight(batch)).backward()
        return _flat(p.grad for p in model.parameters())

    right, in_bf16 = one_big_batch(objective), da.autocast(objective, torch.bfloat16)
    found.figures["gradient error of one big bf16 batch"] = relative(one_big_batch(in_bf16), right)
    for strategy, mesh, policies in cases(place.ranks):
        sharded = mesh != ()
        model = spread(small_gpt(place.tiny), strategy, mesh, place, Precision.bf16.sharded_policy(None))
        optimizer = RecordingSGD(model.parameters(), lr=0.0)
        accumulator = da.Accumulator(model, optimizer, objective if sharded else in_bf16, sync=policies[0])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
            accumulator.step(dealt[place.rank])
        error = relative(_flat(optimizer.gradients), right)
        found.figures[f"gradient error of {num_micros} bf16 micros, {strategy} {policies[0]}"] = error
        # bf16 rounds each number by up to 2^-9, in a row of some dozen independent roundings: a few times that. A micro
        # that is lost or counted twice shows as 1/8 or more.
        found.require(error <= 16 * 2**-9, f"bf16 {strategy}: the gradient is off by {error:.2e} of float32's")


def _flat(tensors: Any) -> Tensor:
    return torch.cat([whole(tensor).flatten() for tensor in tensors])


def host_syncs(place: Place) -> Found:
    """In steady state a window makes one host sync, at its boundary: everything else runs with torch's alarm on."""
    found = Found()
    for strategy, mesh, policies in cases(place.ranks):
        for policy in policies:
            counts = _syncs_by_window(strategy, mesh, policy, place)
            found.figures[f"{strategy} {policy}"] = counts
            found.require(counts == [1] * 4, f"{strategy} {policy}: host syncs by window {counts}, expected one each")
    return found


def _syncs_by_window(strategy: str, mesh: tuple[int, ...], policy: str, place: Place) -> list[int]:
    warm_up, num_windows, num_micros = 3, 4, 4
    objective = da.CausalLM(shift=False)
    sharded = mesh != ()
    model = spread(small_gpt(place.tiny, dropout=0.1), strategy, mesh, place, Precision.bf16.sharded_policy(None))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    in_bf16 = objective if sharded else da.autocast(objective, torch.bfloat16)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer)
    accumulator = da.Accumulator(
        model, optimizer, in_bf16, sync=policy, clip_norm=0.1, scheduler=scheduler, seed=3
    )  # fmt: skip
    micros = [
        {key: value.pin_memory() for key, value in micro.items()}
        for micro in token_micros((warm_up + num_windows) * num_micros, seed=place.rank)
    ]
    counts: list[int] = []
    with warnings.catch_warnings(), alarm() as (arm, reads):
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        # From reading the first micro to leaving the loop: what da.windows does is watched too.
        for index, window in enumerate(da.windows(micros, num_micros)):
            reads.clear()
            accumulator.step(window)
            if index >= warm_up:
                counts.append(sum(reads))
            if index == warm_up - 1:
                torch.cuda.synchronize()
                arm()  # by now DDP has arranged its buckets and the optimizer has its state
    return counts
