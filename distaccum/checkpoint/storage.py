"""Shares out the tensors of all ranks, and writes them in safetensors files, one file per rank.

The planner of torch.distributed.checkpoint computes where a rank's part of a DTensor lies in the
whole. Its storage is not used: it reads pickles, which run whatever code their writer put in.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import create_default_local_save_plan
from torch.distributed.tensor import DTensor

from distaccum.errors import CheckpointError

from .folder import sync_folder, write_durably
from .manifest import DTYPES, Chunk, StoredFile, StoredTensor, check_cover


@dataclass(frozen=True)
class LocalChunk:
    """Describes the rectangular block of one tensor that a rank holds."""

    name: str
    dtype: str  # a key of DTYPES
    shape: tuple[int, ...]  # of the whole tensor
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    bytes: int


def shard_name(rank: int) -> str:
    """Return the name of the file that a rank writes."""
    return f"shard-{rank:05d}.safetensors"


def local(tensor: Tensor) -> Tensor:
    """Return a detached view of a plain tensor, or of this rank's part of a DTensor."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_chunks(tensors: Mapping[str, Tensor]) -> list[LocalChunk]:
    """Return the blocks of tensors that this rank holds, one per tensor.

    Empty blocks (of uneven shards) are included, so that the shape of their tensor is known.

    Raises:
        CheckpointError: for a value that is not a tensor, or a tensor or sharding that cannot be
            stored.
    """
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"{name!r} is of type {type(tensor).__name__}, not a tensor; pass plain values in "
                "`facts`"
            )
        if tensor.layout != torch.strided or _dtype_name(tensor) not in DTYPES:
            raise CheckpointError(
                f"{name!r} is a {tensor.layout} tensor of {tensor.dtype}, which cannot be stored"
            )
    pieces = []
    for item in create_default_local_save_plan(dict(tensors), is_coordinator=False).items:
        assert item.tensor_data is not None
        name, chunk = item.index.fqn, item.tensor_data.chunk
        whole, held = tensors[name], local(tensors[name])
        if chunk.sizes != held.shape:
            raise CheckpointError(
                f"{name!r}: this rank holds {list(held.shape)}, but its sharding says "
                f"{list(chunk.sizes)}"
            )
        piece = LocalChunk(
            name=name,
            dtype=_dtype_name(whole),
            shape=tuple(whole.shape),
            offsets=tuple(chunk.offsets),
            sizes=tuple(chunk.sizes),
            bytes=held.nbytes,
        )
        pieces.append(piece)
    return pieces


def share_out(
    held: Sequence[Sequence[LocalChunk]],
) -> tuple[dict[str, StoredTensor], list[list[str]]]:
    """Assign each block to one rank that holds it and has the least to write so far.

    Args:
        held: the blocks that each rank holds, by rank, from `local_chunks`.

    Returns:
        The tensors of the checkpoint, and the names of those of which each rank writes its block.

    Raises:
        CheckpointError: if the ranks disagree about a tensor, or their blocks do not cover it
            exactly once.
    """
    holders: dict[LocalChunk, list[int]] = {}
    whole: dict[str, tuple[str, tuple[int, ...]]] = {}
    for rank, pieces in enumerate(held):
        for piece in pieces:
            described = (piece.dtype, piece.shape)
            if whole.setdefault(piece.name, described) != described:
                raise CheckpointError(
                    f"{piece.name!r} is {described} on rank {rank} and {whole[piece.name]} on "
                    "another rank"
                )
            if piece.bytes:
                holders.setdefault(piece, []).append(rank)
    chunks: dict[str, list[Chunk]] = {name: [] for name in whole}
    shares: list[list[str]] = [[] for _ in held]
    load = [0] * len(held)
    for piece, ranks in sorted(
        holders.items(), key=lambda item: (-item[0].bytes, item[0].name, item[0].offsets)
    ):
        rank = min(ranks, key=lambda rank: (load[rank], rank))
        load[rank] += piece.bytes
        shares[rank].append(piece.name)
        chunks[piece.name].append(Chunk(shard_name(rank), piece.offsets, piece.sizes))
    for name, (_, shape) in whole.items():
        chunks[name].sort(key=lambda chunk: chunk.file)
        check_cover(name, shape, [(chunk.offsets, chunk.sizes) for chunk in chunks[name]])
    return {name: StoredTensor(*whole[name], tuple(chunks[name])) for name in whole}, shares


def write_file(
    path: Path, tensors: Mapping[str, Tensor], read: Callable[[str], Tensor]
) -> StoredFile:
    """Write one safetensors file, tensor by tensor, and wait until it is on the disk.

    Args:
        path: the file to write.
        tensors: tensors that have the names, dtypes and shapes to write; they may be on `meta`.
        read: returns the tensor of a name, on any device; called once per name, so that only one
            tensor at a time is in memory.

    Returns:
        The size and checksum of the file.
    """
    # The widest elements come first, so that each tensor begins at a multiple of its element size,
    # which readers that map files into memory need.
    names = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        tensor = tensors[name]
        begin, end = end, end + tensor.nbytes
        code = DTYPES[_dtype_name(tensor)]
        header[name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    begin_of_file = [len(text).to_bytes(8, "little"), text]
    written = write_durably(path, chain(begin_of_file, (_content(read(name)) for name in names)))
    sync_folder(path.parent)
    return written


def _content(tensor: Tensor) -> memoryview:
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def some(names: Iterable[str]) -> str:
    """Return the first five names and the number of the others, for a message."""
    listed = sorted(names)
    return ", ".join(listed[:5]) + (f" and {len(listed) - 5} more" if len(listed) > 5 else "")
