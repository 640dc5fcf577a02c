"""The predicted peak against a real step of the real accumulator on tensors without memory, which
sends nothing.

Unlike in test_peak.py no rank is needed, and nothing is computed: a release of torch that allocates
in another order is noticed here, in seconds.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from spread import mesh_of, spread
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from windows import Case, predicted

import distaccum as da
from distaccum._torch import fake_process_group, fake_tensors
from distaccum.app.auto.dry_run import _known
from distaccum.nn.blocks import blocks_of
from distaccum.parallel.world import World
from distaccum.planner.meter import Tracker
from distaccum.planner.shapes import Setup
from distaccum.planner.trace import _fill

TOLERANCE = 0.02  # as in test_peak.py; most are off by less than 0.002
CASES = [
    pytest.param(Case(micro_batches=1), 1, marks=pytest.mark.nightly),
    (Case(micro_batches=4, optimizer="fused", checkpoint=True), 1),
    (Case(precision="bf16-pure", micro_batches=2), 1),
    (Case(model="resnet", micro_batches=2, samples=12, optimizer="sgd"), 1),
    pytest.param(Case("ddp", micro_batches=2), 2, marks=pytest.mark.nightly),
    (Case("ddp", precision="bf16-pure", micro_batches=4), 8),
    pytest.param(Case("ddp", precision="bf16", checkpoint=True), 2, marks=pytest.mark.nightly),
    (Case("ddp", micro_batches=4, overlap=2, samples=12), 2),
    pytest.param(Case("fsdp", micro_batches=4), 2, marks=pytest.mark.nightly),
    (Case("fsdp", precision="bf16", micro_batches=2, samples=8), 8),
    (Case("fsdp", "every", precision="bf16-pure", micro_batches=2), 4),
    (Case("fsdp", "gather_once", micro_batches=4, overlap=4, checkpoint=True, samples=8), 64),
    pytest.param(Case("hsdp", micro_batches=2), 4, marks=pytest.mark.nightly),
    (Case("hsdp", "reduce_scatter", precision="bf16", micro_batches=4), 16),
    (Case("hsdp", "every", micro_batches=2, optimizer="sgd"), 8),
]


class AsOnGloo(TorchDispatchMode):
    """Answers what depends on data as 1, and reduces in a copy of the message, as gloo's
    reduce-scatter does."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind.__name__ == "DTensor" for kind in types):
            return NotImplemented
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0 if args[0].is_floating_point() else 1
        copies = []
        if "reduce_scatter" in str(func):
            copies = [
                torch.empty_like(
                    max(tree_leaves(args), key=lambda leaf: getattr(leaf, "nbytes", 0))
                )
            ]
        result = func(*args, **(kwargs or {}))
        del copies
        return result


class Rows:
    """Rows that arrive at once: every rank has sent what this one did, and what was measured is
    1."""

    def __init__(self, world: World, known: Any, measured: Any = ()) -> None:
        self._rows = [[*known, *[1.0] * sum(map(len, measured))]] * world.size

    def read(self, *others: Any) -> Any:
        return self._rows, [1.0] * len(others)


@contextmanager
def silent_ranks(world_size: int) -> Iterator[None]:
    if world_size > 1:
        fake_process_group(world_size, 0)
    try:
        yield
    finally:
        if world_size > 1:
            dist.destroy_process_group()


def stepped(case: Case, world_size: int) -> int:
    """The most bytes of tensors in a window that finds the optimizer's state."""
    gc.collect()
    with torch.device("meta"):
        model = case.make_model()
    setup = case.setup(world_size)
    with silent_ranks(world_size):
        mesh = mesh_of(setup) if setup.sharded else None
        return _stepped(case, setup, model, mesh)


def _stepped(case: Case, setup: Setup, model: nn.Module, mesh: DeviceMesh | None) -> int:
    with fake_tensors(), Tracker(fake_tensors=True) as tracker, AsOnGloo():
        _fill(model, lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype))
        blocks = blocks_of(model)
        wrapped = spread(model, setup, mesh, init_sync=False)
        # DDP expects a result that the fake group does not give.
        if isinstance(wrapped, DistributedDataParallel):
            wrapped.register_comm_hook(None, lambda _, bucket: _known(bucket.buffer()))
        optimizer = case.make_optimizer(wrapped)
        micro_batches = [case.micro_batch(case.samples) for _ in range(min(2, case.micro_batches))]
        window = [micro_batches[index % 2] for index in range(case.micro_batches)]
        if isinstance(wrapped, DistributedDataParallel):
            # In a second window DDP would arrange its buckets anew, and for that read what has no
            # memory.
            for parameter in wrapped.parameters():
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            optimizer.zero_grad()
        accumulator = da.Accumulator(
            wrapped,
            optimizer,
            case.objective,
            sync=case.sync,
            overlap_micro_batches=case.overlap,
            blocks=blocks,
            clip_norm=1.0,
            check_cut=False,
        )
        if not isinstance(wrapped, DistributedDataParallel):
            accumulator.step(window)
        gc.collect()
        tracker.reset_peak()
        accumulator.step(window)
        return tracker.peak


@pytest.mark.parametrize(("case", "world_size"), CASES, ids=str)
def test_a_step_takes_what_is_predicted(
    case: Case, world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        World, "gather_rows", lambda world, known, measured=(): Rows(world, known, measured)
    )
    monkeypatch.setattr(World, "gather_objects", lambda world, value: [value] * world.size)
    assert predicted(case, world_size).total == pytest.approx(
        stepped(case, world_size), rel=TOLERANCE
    )
