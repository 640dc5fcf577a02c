"""Models, data and the reference for the numerical tests: one float64 process over all data, in
plain torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from worlds import mesh_of

import distaccum as da

KINDS = (
    "uniform",
    "ragged",
    "zero_weight_micro_batches",
    "ranks_without_micro_batches",
    "short_last",
)


def make_model(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Three layers whose sizes divide by no number of ranks."""
    torch.manual_seed(5)
    layers = [nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, 3)]
    return nn.Sequential(*layers).to(dtype)


def masked_objective() -> da.Objective:
    """Squared error over the tokens that a mask counts."""
    return da.Objective(
        loss_sum=masked_sum, denominator=lambda micro_batch: int(micro_batch["mask"].sum())
    )


def masked_sum(model: nn.Module, micro_batch: dict[str, Tensor]) -> Tensor:
    """The sum of squared errors of the tokens that count; flat tokens, since FSDP2 warns of outputs
    that are views."""
    x, y, mask = (micro_batch[name].flatten(0, 1) for name in ("x", "y", "mask"))
    return (mask[:, None] * (model(x) - y).square()).sum()


def make_micro_batch(seed: int, size: int = 2, counted: str = "all") -> dict[str, Tensor]:
    """A micro-batch of `size` samples of 4 tokens: all, some or none of them counted."""
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(size, 4, n, generator=generator, dtype=torch.float64) for n in (5, 3))
    mask = torch.ones(size, 4, dtype=torch.float64)
    if counted == "some":
        lengths = torch.randint(0, 5, (size,), generator=generator)
        lengths[0] = max(1, int(lengths[0]))
        mask = (torch.arange(4)[None] < lengths[:, None]).double()
    if counted == "none":
        mask.zero_()
    return {"x": x, "y": y, "mask": mask}


def make_window(
    kind: str, num_micro_batches: int, ranks: int, seed: int
) -> list[list[dict[str, Tensor]]]:
    """The micro-batches of each rank in one window."""
    counted = "all" if kind in ("uniform", "short_last") else "some"
    dealt = [
        [make_micro_batch(1000 * seed + 10 * i * ranks + r,
                          size=1 + (i + r) % 3 if counted == "some" else 2, counted=counted)
         for i in range(num_micro_batches)]
        for r in range(ranks)
    ]  # fmt: skip
    if kind == "zero_weight_micro_batches":
        for rank, micro_batches in enumerate(dealt):
            for i in range(len(micro_batches)):
                if (i + rank) % 2 == 1 or (
                    rank == 0 and num_micro_batches > 1 and i == num_micro_batches - 1
                ):
                    micro_batches[i] = make_micro_batch(77 * i + rank, counted="none")
    if kind == "ranks_without_micro_batches":
        dealt = [
            micro_batches[: max(0, num_micro_batches - rank)] if rank else micro_batches
            for rank, micro_batches in enumerate(dealt)
        ]
        dealt[-1] = dealt[-1] if ranks == 1 else []
    if kind == "short_last":
        dealt = [micro_batches[: 1 if rank == 0 else 0] for rank, micro_batches in enumerate(dealt)]
    return dealt


def wrap(model: nn.Module, strategy: str, mesh_shape: tuple[int, ...], **ddp: Any) -> nn.Module:
    """The model as a user would wrap it."""
    if strategy == "single":
        return model
    if strategy == "ddp":
        return DistributedDataParallel(model, **ddp)
    names = ("shard",) if len(mesh_shape) == 1 else ("replicate", "shard")
    mesh = mesh_of(*mesh_shape, names=names)
    policy = (
        MixedPrecisionPolicy(reduce_dtype=torch.float32)
        if _is_narrow(model)
        else MixedPrecisionPolicy()
    )
    for layer in model.children():
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


def _is_narrow(model: nn.Module) -> bool:
    return any(p.dtype is torch.bfloat16 for p in model.parameters())


class RecordingSGD(torch.optim.SGD):
    """SGD that keeps the whole gradient it was given."""

    gradients: list[Tensor]

    def step(self, closure: Any = None) -> Any:
        parameters = [p for group in self.param_groups for p in group["params"]]
        self.gradients = [
            whole(p.grad) if p.grad is not None else torch.zeros(()) for p in parameters
        ]
        return super().step(closure)


def whole(tensor: Tensor) -> Tensor:
    """A plain copy of a tensor that may be sharded."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def reference(windows: list[list[list[dict[str, Tensor]]]], lr: float) -> list[dict[str, Any]]:
    """Each window as one batch on one process: loss, gradients and parameters after an SGD
    update."""
    model = make_model()
    results = []
    for dealt in windows:
        batch = [micro_batch for micro_batches in dealt for micro_batch in micro_batches]
        x, y, mask = (
            torch.cat([micro_batch[name] for micro_batch in batch]) for name in ("x", "y", "mask")
        )
        loss = (mask[..., None] * (model(x) - y).square()).sum() / mask.sum()
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter -= lr * gradient
        results.append(
            {
                "loss": float(loss.detach()),
                "gradients": gradients,
                "parameters": [whole(p) for p in model.parameters()],
            }
        )
    return results


def relative(found: Tensor, expected: Tensor) -> float:
    """The relative error in the L2 norm."""
    return float((found - expected).norm() / expected.norm())
