"""What the tests of checkpoints save, and how it looks to one process."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from distaccum.checkpoint.store import Checkpoint, Checkpoints
from distaccum.parallel.world import World

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU, None)
DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]
# over 4 ranks: uneven, empty shards, and nothing at all
SHAPES = [(5, 3), (7,), (1, 4), (3, 2, 2), (8, 2), (0, 3)]


def whole(seed=0):
    """Every shape and dtype, by name: any bits, so NaN, infinities and -0.0 are among them."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for i, shape in enumerate(SHAPES):
        for dtype in (torch.float32, torch.bfloat16):
            tensors[f"model.{i}.{dtype}"] = _any_bits(shape, dtype, generator)
    for dtype in DTYPES:
        tensors[f"plain.{dtype}"] = _any_bits((4, 3), dtype, generator)
        tensors[f"plain.{dtype}.0d"] = _any_bits((), dtype, generator)
    tensors["plain.transposed"] = torch.arange(12.0).reshape(3, 4).t()
    return tensors


def spread(tensors, kind):
    """The tensors of `model.` as this world holds them: plain on all ranks, sharded, or sharded
    within replicas."""
    size = torch.distributed.get_world_size()
    if kind == "plain":
        return {name: tensor.clone() for name, tensor in tensors.items()}
    if kind == "sharded":
        mesh, placements = init_device_mesh("cpu", (size,)), [Shard(0)]
    else:
        replicas = 2 if size % 2 == 0 else 1
        mesh = init_device_mesh("cpu", (replicas, size // replicas))
        placements = [
            Replicate(),
            Shard(0),
        ]
    return {
        name: (
            distribute_tensor(tensor, mesh, placements, src_data_rank=None)
            if name.startswith("model.")
            else tensor.clone()
        )
        for name, tensor in tensors.items()
    }


def same_bits(held, expected):
    """Names whose bits differ; DTensors are put together first."""
    differ = sorted(set(held) ^ set(expected))
    for name in set(held) & set(expected):
        tensor = held[name].full_tensor() if isinstance(held[name], DTensor) else held[name]
        if tensor.dtype != expected[name].dtype or not torch.equal(
            _bits(tensor), _bits(expected[name])
        ):
            differ.append(name)
    return differ


def save_alone(folder: Path, *steps: int, keep=9, **options):
    """Save these steps, one after the other; every tensor is full of the step's number."""
    checkpoints = Checkpoints(folder, ALONE, keep=keep, **options)
    for step in steps:
        checkpoints.save(step, full_of(step), {"step": step})
    checkpoints.wait()
    return checkpoints


def full_of(step, numel=1000):
    return {"model.a": torch.full((numel, 3), float(step)), "model.b": torch.full((7,), step)}


def load_alone(checkpoint: Checkpoint):
    into = {
        name: torch.empty(info.shape, dtype=info.dtype) for name, info in checkpoint.tensors.items()
    }
    checkpoint.load(into)
    return into


def names(folder: Path):
    return sorted(path.name for path in folder.iterdir())


def _any_bits(shape, dtype, generator):
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator, dtype=torch.uint8).bool()
    whole = torch.randint(0, 256, (*shape, dtype.itemsize), generator=generator, dtype=torch.uint8)
    return whole.view(dtype).reshape(shape)


def _bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)
