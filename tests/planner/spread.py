"""Real models, spread as the predictions are told, and what they really hold."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import distaccum as da
from distaccum._torch.sharded import _fsdp_groups
from distaccum.core.strategies import StrategyName, Sync
from distaccum.models.gpt import GPT, GPTConfig
from distaccum.planner.shapes import ModelShape, Setup, describe

VOCABULARY, TOKENS = 37, 6
OBJECTIVE = da.CausalLM(shift=False)


def setup(strategy: str, sync: str, world_size: int, **changes: Any) -> Setup:
    """The project's own choices for dtypes, FSDP2 and DDP, but for what is changed."""
    replicas = 2 if strategy == "hsdp" else 1
    chosen = Setup(
        StrategyName(strategy), Sync(sync), world_size, replicas, None, None, None, True, False, 25
    )
    return replace(chosen, **changes)


class Odd(nn.Module):
    """Sizes that divide by nothing, parameters with fewer rows than ranks, a scalar, a frozen one,
    a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 5)
        self.blocks = nn.ModuleList([nn.Linear(5, 7), nn.Linear(7, 3), nn.Linear(3, 3)])
        self.blocks[1].bias.requires_grad_(False)
        self.head = nn.Linear(3, VOCABULARY, bias=False)
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("offset", torch.zeros(11))

    def forward(self, ids: Tensor) -> Tensor:
        # FSDP2 warns of outputs that are views, as a 3-D linear's are
        x = self.embedding(ids).flatten(0, 1)
        for block in self.blocks:
            x = torch.tanh(block(x))
        return self.head(x).unflatten(0, ids.shape) * self.scale + self.offset.sum()


def make_model(name: str) -> nn.Module:
    """`odd`, or a GPT whose width is not a multiple of four ranks' shards everywhere."""
    torch.manual_seed(3)
    if name == "odd":
        return Odd()
    return GPT(GPTConfig("gpt", VOCABULARY, 13, 3, 3, 18, 0.0, True))


def make_micro_batch(size: int = 2) -> dict[str, Tensor]:
    ids = torch.arange(size * TOKENS).reshape(size, TOKENS) % VOCABULARY
    return {"input_ids": ids, "labels": ids}


def shapes_of(name: str, dtype: torch.dtype) -> ModelShape:
    """What the prediction is given: a model without memory."""
    with torch.device("meta"):
        model = make_model(name).to(dtype)
    return describe(model, list(model.blocks))


def mesh_of(setup: Setup) -> DeviceMesh:
    if setup.strategy == "hsdp":
        return init_device_mesh(
            "cpu", (setup.replicas, setup.shards), mesh_dim_names=("replicate", "shard")
        )
    return init_device_mesh("cpu", (setup.shards,), mesh_dim_names=("shard",))


def spread(model: nn.Module, setup: Setup, mesh: DeviceMesh | None = None, **ddp: Any) -> nn.Module:
    """The model as distaccum wraps it."""
    if setup.strategy == "single":
        return model
    if setup.strategy == "ddp":
        return DistributedDataParallel(
            model,
            bucket_cap_mb=setup.bucket_mb,
            find_unused_parameters=setup.find_unused_parameters,
            **ddp,
        )
    narrow = (torch.bfloat16, torch.float16)
    stored = next(model.parameters()).dtype
    chosen = torch.float32 if (setup.compute or stored) in narrow else None
    policy = MixedPrecisionPolicy(param_dtype=setup.compute, reduce_dtype=setup.reduce or chosen)
    mesh = mesh or mesh_of(setup)
    for block in model.blocks:
        fully_shard(
            block, mesh=mesh, mp_policy=policy, reshard_after_forward=setup.reshard_after_forward
        )
    return fully_shard(model, mesh=mesh, mp_policy=policy)


def accumulator_for(
    model: nn.Module,
    setup: Setup,
    optimizer: torch.optim.Optimizer,
    loss_sum: Callable[[nn.Module, Any], Tensor],
) -> da.Accumulator:
    return da.Accumulator(
        model,
        optimizer,
        da.Objective(loss_sum, OBJECTIVE.denominator),
        sync=setup.sync,
        accum_dtype=setup.accumulate,
        reduce_dtype=setup.reduce,
    )


def make_optimizer(name: str, momentum: float, model: nn.Module) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    return (
        torch.optim.AdamW(trained)
        if name == "adamw"
        else torch.optim.SGD(trained, lr=0.1, momentum=momentum)
    )


def measured(
    name: str, dtype: torch.dtype, setup: Setup, optimizer: tuple[str, float], micro_batches: int
) -> dict[str, int]:
    """Bytes on this rank in the second window, part by part; the largest seen where a part comes
    and goes."""
    model = spread(make_model(name).to(dtype), setup)
    optim = make_optimizer(*optimizer, model)
    seen: dict[str, list[int]] = {"gradients": [], "accumulation": [], "gathered": []}

    def loss_sum(module: nn.Module, micro_batch: Any) -> Tensor:
        """It runs first in each micro-batch: what is alive here came from the micro-batch
        before."""
        sums = accumulator.strategy.sums
        own = [] if sums is None else list(sums._sums.values())
        seen["accumulation"].append(held([*own, *unreduced(model)]))
        return OBJECTIVE.loss_sum(module, micro_batch)

    parameters = list(model.parameters())
    optim.register_step_pre_hook(
        lambda *_: seen["gradients"].append(held(p.grad for p in parameters if p.grad is not None))
    )
    accumulator = accumulator_for(model, setup, optim, loss_sum)
    window = [make_micro_batch() for _ in range(micro_batches)]
    accumulator.step(window)
    for numbers in seen.values():
        numbers.clear()
    groups = [group for group, _ in _fsdp_groups(model)]
    with (
        _Watch(lambda: seen["gathered"].append(held(gathered(groups)))) if groups else nullcontext()
    ):
        accumulator.step(window)
    states = [
        value
        for state in optim.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    ]
    found = {key: max(numbers, default=0) for key, numbers in seen.items()}
    return {
        **found,
        "weights": held([*parameters, *model.buffers()]),
        "optimizer": held(states),
        "buckets": ddp_bucket_bytes(model),
    }


class _Watch(TorchDispatchMode):
    """Looks after every operator."""

    def __init__(self, look: Callable[[], None]) -> None:
        super().__init__()
        self._look = look

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._look()
        return result


def held(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages behind this rank's part of the tensors, padding included."""
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    storages = {
        storage.data_ptr(): storage.nbytes() for storage in (t.untyped_storage() for t in local)
    }
    return sum(size for pointer, size in storages.items() if pointer)


def unreduced(model: nn.Module) -> list[Tensor]:
    """What FSDP2 keeps of gradients off the parameters."""
    found = []
    for group, _ in _fsdp_groups(model):
        found.append(group._partial_reduce_output)
        for param in group.fsdp_params:
            found.append(param.unsharded_accumulated_grad)
            found.append(getattr(getattr(param, "_unsharded_param", None), "grad", None))
    return [tensor for tensor in found if tensor is not None]


def gathered(groups: list[Any]) -> list[Tensor]:
    """The parameters that FSDP2 has gathered, with their padding, and those that it gathers
    ahead."""
    ahead = [
        group._all_gather_result.all_gather_output
        for group in groups
        if group._all_gather_result is not None
    ]
    return ahead + [
        tensor
        for group in groups
        for param in group.fsdp_params
        for tensor in param.all_gather_outputs
    ]


def ddp_bucket_bytes(model: nn.Module) -> int:
    if not isinstance(model, DistributedDataParallel):
        return 0
    data = model._get_ddp_logging_data()
    return sum(
        int(size)
        for size in str(data.get("rebuilt_bucket_sizes") or data["bucket_sizes"]).split(",")
    )
