"""Defines the parts of the GPU check that have a right answer: numerics, bf16 and host syncs.

Every rank runs them.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch
from gpu_alarm import alarm
from gpu_ranks import Found, Place
from setting import (
    KINDS,
    RecordingSGD,
    make_model,
    make_window,
    masked_objective,
    reference,
    relative,
    whole,
)
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import distaccum as da
from distaccum.models.gpt import GPT, GPTConfig
from distaccum.parallel.precision import Precision

# As in tests/step: sums of some hundred float64 terms of order one, added in another order.
EXACT = 1e-12


def cases(ranks: int) -> list[tuple[str, tuple[int, ...], tuple[str, ...]]]:
    """Return the strategies for a number of ranks, each with its mesh shape and sync policies."""
    found: list[tuple[str, tuple[int, ...], tuple[str, ...]]] = [
        ("ddp", (), ("boundary", "every")),
        ("fsdp", (ranks,), ("boundary", "gather_once", "every")),
    ]
    if ranks == 1:
        found.insert(0, ("single", (), ("boundary",)))
    elif ranks % 2 == 0:
        found.append(
            ("hsdp", (2, ranks // 2), ("boundary", "gather_once", "every", "reduce_scatter"))
        )
    return found


def spread(
    model: nn.Module,
    strategy: str,
    mesh: tuple[int, ...],
    place: Place,
    policy: MixedPrecisionPolicy | None = None,
) -> nn.Module:
    """Move the model to the device and wrap it as a user would.

    Under FSDP2, each block is a group of its own, or each layer with parameters if the model has no
    blocks.
    """
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
    """Make a mesh only once, because each of its groups has a communicator, which takes memory."""
    return init_device_mesh(
        device_type, shape, mesh_dim_names=("replicate", "shard")[-len(shape) :]
    )


def numerics(place: Place) -> Found:
    """Compare gradients, updates, losses and norms with one float64 process, with the ledger on.

    Windows of all kinds are compared.
    """
    found, num_windows = Found(), 0
    for strategy, mesh, policies in cases(place.ranks):
        for policy in policies:
            errors = [
                _one_case(strategy, mesh, policy, num_micro_batches, place)
                for num_micro_batches in ((3,) if place.tiny else (1, 2, 3, 8))
            ]
            num_windows += len(KINDS) * len(errors)
            worst = {name: _largest([error[name] for error in errors]) for name in errors[0]}
            found.figures[f"{strategy} {policy}"] = worst
            found.require(
                _largest(list(worst.values())) <= EXACT,
                f"{strategy} {policy}: relative errors {worst}, limit {EXACT}",
            )
    found.figures["worst"] = _largest(
        [error for worst in found.figures.values() for error in worst.values()]
    )
    found.figures["windows, each as the ledger forecast"] = num_windows
    return found


def _one_case(
    strategy: str, mesh: tuple[int, ...], policy: str, num_micro_batches: int, place: Place
) -> dict[str, float]:
    """Train on one window of each kind in turn, and return the largest relative errors."""
    lr = 0.1
    windows = [
        make_window(kind, num_micro_batches, place.ranks, seed) for seed, kind in enumerate(KINDS)
    ]
    model = spread(make_model(), strategy, mesh, place)
    optimizer = RecordingSGD(model.parameters(), lr=lr)
    accumulator = da.Accumulator(model, optimizer, masked_objective(), sync=policy, audit="always")
    errors: dict[str, list[float]] = {"gradient": [], "parameter": [], "loss": [], "grad_norm": []}
    for dealt, right in zip(windows, reference(windows, lr), strict=True):
        record = accumulator.step(dealt[place.rank])
        if (
            record.skipped
            or record.verdict is None
            or record.num_micro_batches != sum(len(micro_batches) for micro_batches in dealt)
        ):
            raise AssertionError(
                f"{strategy} {policy}: the record does not belong to the given window: {record}"
            )
        for gradient, expected in zip(optimizer.gradients, right["gradients"], strict=True):
            errors["gradient"].append(relative(gradient.cpu(), expected))
        for parameter, expected in zip(model.parameters(), right["parameters"], strict=True):
            errors["parameter"].append(relative(whole(parameter).cpu(), expected))
        norm = sum(float(gradient.norm()) ** 2 for gradient in right["gradients"]) ** 0.5
        errors["loss"].append(abs(record.loss / right["loss"] - 1))
        errors["grad_norm"].append(abs(record.grad_norm / norm - 1))
    return {name: _largest(values) for name, values in errors.items()}


def _largest(values: list[float]) -> float:
    """Return the largest number, or nan if there is one, which Python's max() could lose."""
    return float(torch.tensor(values, dtype=torch.float64).max())


def bf16(place: Place) -> Found:
    """Check that bf16 sums do not stall, and that a bf16 gradient is near to that of float32."""
    found = Found()
    num_micro_batches = 512 if place.tiny else 1024  # a bf16 sum of ones stalls at 256
    for strategy, mesh, policies in cases(place.ranks):
        for policy in policies:
            if place.tiny and policy != policies[0]:
                continue
            update = _constant_update(strategy, mesh, policy, num_micro_batches, place)
            found.figures[
                f"update of {num_micro_batches} equal micro-batches, {strategy} {policy}"
            ] = update
            found.require(
                update == 1.0,
                f"bf16 parameters, {strategy} {policy}: the update is {update}, not 1.0",
            )
    _against_float32(place, found)
    return found


def _constant_update(
    strategy: str, mesh: tuple[int, ...], policy: str, num_micro_batches: int, place: Place
) -> float:
    model: nn.Module = nn.Sequential(nn.Linear(1, 2, bias=False)).to(torch.bfloat16)
    nn.init.zeros_(next(model.parameters()))
    model = spread(model, strategy, mesh, place, MixedPrecisionPolicy(reduce_dtype=torch.float32))
    objective = da.Objective(lambda m, x: m(x).sum(dtype=torch.float32), len)
    accumulator = da.Accumulator(
        model, torch.optim.SGD(model.parameters(), lr=1.0), objective, sync=policy
    )
    accumulator.step([torch.ones(1, 1, dtype=torch.bfloat16)] * num_micro_batches)
    weight = whole(next(model.parameters())).float()
    return -float(weight.mean()) if bool((weight == weight[0]).all()) else float("nan")


def small_gpt(tiny: bool, dropout: float = 0.0) -> GPT:
    """Build a small GPT with the same weights in every process."""
    torch.manual_seed(11)
    layers, width = (2, 32) if tiny else (4, 256)
    return GPT(
        GPTConfig(
            "gpt", 256, 64, num_layers=layers, num_heads=4, width=width, dropout=dropout, bias=True
        )
    )


def token_micro_batches(
    num_micro_batches: int, seed: int, vocab: int = 256, length: int = 64, size: int = 2
) -> list[dict[str, Tensor]]:
    """Make micro-batches of random tokens on the host, with ignored labels.

    The micro-batches have different denominators.
    """
    generator = torch.Generator().manual_seed(seed)
    micro_batches = []
    for index in range(num_micro_batches):
        tokens = torch.randint(vocab, (size, length + 1), generator=generator)
        labels = tokens[:, 1:].clone()
        labels[0, : 7 * index % length] = -100
        micro_batches.append({"input_ids": tokens[:, :-1].contiguous(), "labels": labels})
    return micro_batches


def _against_float32(place: Place, found: Found) -> None:
    """Compare the gradient of float32 parameters and bf16 products with that of one float32 batch.

    The error is the relative L2 norm of the difference of the whole gradients.
    """
    objective, num_micro_batches = da.CausalLM(shift=False), 8
    dealt = [token_micro_batches(num_micro_batches, seed=rank) for rank in range(place.ranks)]
    batch = {
        key: (
            torch.cat(
                [micro_batch[key] for micro_batches in dealt for micro_batch in micro_batches]
            ).to(place.device)
        )
        for key in ("input_ids", "labels")
    }

    def one_big_batch(objective: da.Objective | da.CausalLM) -> Tensor:
        model = small_gpt(place.tiny).to(place.device)
        (objective.loss_sum(model, batch) / objective.denominator(batch)).backward()
        return _flat(p.grad for p in model.parameters())

    right, in_bf16 = one_big_batch(objective), da.autocast(objective, torch.bfloat16)
    found.figures["gradient error of one big bf16 batch"] = relative(one_big_batch(in_bf16), right)
    for strategy, mesh, policies in cases(place.ranks):
        sharded = mesh != ()
        model = spread(
            small_gpt(place.tiny), strategy, mesh, place, Precision.bf16.sharded_policy(None)
        )
        optimizer = RecordingSGD(model.parameters(), lr=0.0)
        accumulator = da.Accumulator(
            model, optimizer, objective if sharded else in_bf16, sync=policies[0]
        )
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message="FSDP2-wrapped module .* returned a view tensor"
            )
            accumulator.step(dealt[place.rank])
        error = relative(_flat(optimizer.gradients), right)
        found.figures[
            f"gradient error of {num_micro_batches} bf16 micro-batches, {strategy} {policies[0]}"
        ] = error
        # bf16 rounds each number by up to 2^-9, and some dozen independent roundings in a row make
        # a few times that. A micro-batch that is lost or counted twice makes 1/8 or more.
        found.require(
            error <= 16 * 2**-9,
            f"bf16 {strategy}: the gradient differs from float32's by {error:.2e}",
        )


def _flat(tensors: Any) -> Tensor:
    return torch.cat([whole(tensor).flatten() for tensor in tensors])


def host_syncs(place: Place) -> Found:
    """Check that a window has one host sync in the steady state, at its boundary.

    Everything else runs in torch's sync debug mode, which raises.
    """
    found = Found()
    for strategy, mesh, policies in cases(place.ranks):
        for policy in policies:
            counts = _syncs_by_window(strategy, mesh, policy, place)
            found.figures[f"{strategy} {policy}"] = counts
            found.require(
                counts == [1] * 4,
                f"{strategy} {policy}: host syncs per window are {counts}, expected 1 each",
            )
    return found


def _syncs_by_window(strategy: str, mesh: tuple[int, ...], policy: str, place: Place) -> list[int]:
    warm_up, num_windows, num_micro_batches = 3, 4, 4
    objective = da.CausalLM(shift=False)
    sharded = mesh != ()
    model = spread(
        small_gpt(place.tiny, dropout=0.1),
        strategy,
        mesh,
        place,
        Precision.bf16.sharded_policy(None),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    in_bf16 = objective if sharded else da.autocast(objective, torch.bfloat16)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer)
    accumulator = da.Accumulator(
        model, optimizer, in_bf16, sync=policy, clip_norm=0.1, scheduler=scheduler, seed=3
    )  # fmt: skip
    micro_batches = [
        {key: value.pin_memory() for key, value in micro_batch.items()}
        for micro_batch in token_micro_batches(
            (warm_up + num_windows) * num_micro_batches, seed=place.rank
        )
    ]
    counts: list[int] = []
    with warnings.catch_warnings(), alarm() as (arm, reads):
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        # Detects host syncs in da.windows too, from the first micro-batch to the end of the loop.
        for index, window in enumerate(da.windows(micro_batches, num_micro_batches)):
            reads.clear()
            accumulator.step(window)
            if index >= warm_up:
                counts.append(sum(reads))
            if index == warm_up - 1:
                torch.cuda.synchronize()
                arm()  # by now DDP has rebuilt its buckets and the optimizer has its state
    return counts
