"""Stores the tensors of all ranks in safetensors files, one file per rank.

The planner of torch.distributed.checkpoint computes where a rank's part of a DTensor lies in the
whole. Its storage is not used: it reads pickles, which run whatever code their writer put in.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.tensor import DTensor

from distaccum.errors import CheckpointError

from .folder import digest_of, sync_folder
from .manifest import DTYPES, Chunk, Manifest, StoredFile, StoredTensor, check_cover

_BLOCK_BYTES = 1 << 24
_MAX_NAME = 1000


@dataclass(frozen=True)
class LocalChunk:
    """Describes the rectangular block of one tensor that a rank holds."""

    name: str
    dtype: str  # a key of DTYPES
    shape: tuple[int, ...]  # of the whole tensor
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Return the size of the block in bytes."""
        return math.prod(self.sizes) * DTYPES[self.dtype][1]


def shard_name(rank: int) -> str:
    """Return the name of the file that a rank writes."""
    return f"shard-{rank:05d}.safetensors"


def local(tensor: Tensor) -> Tensor:
    """Return a detached view of a plain tensor, or of this rank's part of a DTensor."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_chunks(tensors: Mapping[str, Tensor]) -> list[LocalChunk]:
    """Return the blocks of tensors that this rank holds.

    Empty blocks (of uneven shards) are included, so that the shape of their tensor is known.

    Raises:
        CheckpointError: for a value that is not a tensor, or a tensor, name or sharding that cannot
            be stored.
    """
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"{name!r} is of type {type(tensor).__name__}, not a tensor; pass plain values in `facts`"
            )
        if tensor.layout != torch.strided or _dtype_name(tensor) not in DTYPES:
            raise CheckpointError(f"{name!r} is a {tensor.layout} tensor of {tensor.dtype}, which cannot be stored")
        if not 0 < len(name) <= _MAX_NAME or name == "__metadata__":
            raise CheckpointError(
                f"{name[:_MAX_NAME]!r} cannot name a tensor; use 1 to {_MAX_NAME} characters, not __metadata__"
            )
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(dict(tensors))
    pieces = []
    for item in planner.create_local_plan().items:
        name, data = item.index.fqn, item.tensor_data
        assert data is not None
        offsets, sizes = tuple(data.chunk.offsets), tuple(data.chunk.sizes)
        if sizes != tuple(local(tensors[name]).shape):
            raise CheckpointError(
                f"{name!r}: this rank holds {list(local(tensors[name]).shape)}, but its sharding says {list(sizes)}"
            )
        pieces.append(LocalChunk(name, _dtype_name(tensors[name]), tuple(tensors[name].shape), offsets, sizes))
    return pieces


def assign_writers(held: Sequence[Sequence[LocalChunk]]) -> list[list[LocalChunk]]:
    """Assign each block to one rank that holds it and has the least to write so far.

    Args:
        held: the blocks that each rank holds, by rank, from `local_chunks`.

    Returns:
        The blocks that each rank writes, by rank; equal on every rank, without empty blocks.

    Raises:
        CheckpointError: if the ranks disagree about a tensor, or their blocks do not cover it
            exactly once.
    """
    holders: dict[LocalChunk, list[int]] = {}
    whole: dict[str, tuple[str, tuple[int, ...]]] = {}
    boxes: dict[str, list[tuple[tuple[int, ...], tuple[int, ...]]]] = {}
    for rank, pieces in enumerate(held):
        for piece in pieces:
            described = (piece.dtype, piece.shape)
            if whole.setdefault(piece.name, described) != described:
                raise CheckpointError(
                    f"{piece.name!r} is {described} on rank {rank} and {whole[piece.name]} on another rank"
                )
            if piece not in holders and 0 not in piece.sizes:
                boxes.setdefault(piece.name, []).append((piece.offsets, piece.sizes))
            if 0 not in piece.sizes:
                holders.setdefault(piece, []).append(rank)
    for name, (_, shape) in whole.items():
        check_cover(name, shape, boxes.get(name, []))
    shares: list[list[LocalChunk]] = [[] for _ in held]
    load = [0] * len(held)
    for piece, ranks in sorted(holders.items(), key=lambda item: (-item[0].bytes, item[0].name, item[0].offsets)):
        rank = min(ranks, key=lambda rank: (load[rank], rank))
        load[rank] += piece.bytes
        shares[rank].append(piece)
    return shares


def contents(held: Sequence[Sequence[LocalChunk]], shares: Sequence[Sequence[LocalChunk]]) -> dict[str, StoredTensor]:
    """Build the table of tensors of a manifest from the blocks that ranks hold and write."""
    chunks: dict[str, list[Chunk]] = {piece.name: [] for pieces in held for piece in pieces}
    for rank, pieces in enumerate(shares):
        for piece in pieces:
            chunks[piece.name].append(Chunk(shard_name(rank), piece.offsets, piece.sizes))
    whole = {piece.name: (piece.dtype, piece.shape) for pieces in held for piece in pieces}
    return {name: StoredTensor(*whole[name], tuple(chunks[name])) for name in whole}


def write_file(
    path: Path, entries: Iterable[tuple[str, str, Sequence[int]]], tensor_of: Callable[[str], Tensor]
) -> StoredFile:
    """Write one safetensors file, tensor by tensor, and wait until it is on the disk.

    Args:
        path: the file to write, which must not exist.
        entries: the name, dtype and shape of each tensor.
        tensor_of: returns the tensor of a name, on any device; called once per name, so that only
            one tensor at a time is in memory.

    Returns:
        The size and checksum of the file.

    Raises:
        CheckpointError: if a tensor does not have the dtype and shape of its entry.
    """
    # The widest elements come first, so that each tensor begins at a multiple of its element size,
    # which readers that map files into memory need.
    ordered = sorted(entries, key=lambda entry: (-DTYPES[entry[1]][1], entry[0]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape in ordered:
        code, width = DTYPES[dtype]
        begin, end = end, end + math.prod(shape) * width
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest, size = hashlib.sha256(), 0
    with path.open("xb") as file:

        def put(content: memoryview | bytes) -> None:
            nonlocal size
            for at in range(0, len(content), _BLOCK_BYTES):
                block = content[at : at + _BLOCK_BYTES]
                digest.update(block)
                file.write(block)
                size += len(block)

        put(len(text).to_bytes(8, "little"))
        put(text)
        for name, dtype, shape in ordered:
            tensor = tensor_of(name)
            if _dtype_name(tensor) != dtype or tuple(tensor.shape) != tuple(shape):
                raise CheckpointError(f"{name!r} changed to {tensor.dtype} {list(tensor.shape)} while it was saved")
            put(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(path.parent)
    return StoredFile(size, digest.hexdigest())


def check_file(path: Path, name: str, manifest: Manifest) -> None:
    """Check that a file has the manifest's checksum and holds the chunks listed there.

    The caller has checked its size.

    Raises:
        CheckpointError: if the file differs from the manifest.
    """
    if digest_of(path / name) != manifest.files[name].sha256:
        raise CheckpointError(f"{name} is damaged: its checksum is not the one in the manifest")
    wanted = {
        key: (DTYPES[tensor.dtype][0], list(chunk.sizes))
        for key, tensor in manifest.tensors.items()
        for chunk in tensor.chunks
        if chunk.file == name
    }
    with Opened(path / name) as file:
        for key, (code, sizes) in wanted.items():
            if key not in file.names:
                raise CheckpointError(f"{name} does not hold {key!r}")
            found = file.slice(key)
            if (found.get_dtype(), list(found.get_shape())) != (code, sizes):
                raise CheckpointError(
                    f"{name} holds {key!r} as {found.get_dtype()} {found.get_shape()}, not {code} {sizes}"
                )


def read_into(path: Path, manifest: Manifest, into: Mapping[str, Tensor]) -> None:
    """Fill this rank's part of tensors from the files that hold something of it.

    Raises:
        CheckpointError: if a tensor is missing or differs in shape or dtype (then nothing was
            filled), or if a file cannot be read.
    """
    plan: dict[str, list[tuple[LocalChunk, Chunk]]] = {}
    for piece in local_chunks(into):
        stored = manifest.tensors.get(piece.name)
        if stored is None:
            raise CheckpointError(f"{path} does not hold {piece.name!r}; it holds {some(manifest.tensors)}")
        if (stored.dtype, stored.shape) != (piece.dtype, piece.shape):
            raise CheckpointError(
                f"{path} holds {piece.name!r} as {stored.dtype} {list(stored.shape)}, "
                f"but the tensor to fill is {piece.dtype} {list(piece.shape)}"
            )
        for chunk in stored.chunks:
            plan.setdefault(chunk.file, []).append((piece, chunk))
    for name, parts in plan.items():
        common = [(piece, chunk, both) for piece, chunk in parts if (both := _common(piece, chunk)) is not None]
        if not common:
            continue
        with Opened(path / name) as file:
            for piece, chunk, (offsets, ends) in common:
                source = _box(offsets, ends, chunk.offsets)
                target = local(into[piece.name])[_box(offsets, ends, piece.offsets)]
                target.copy_(file.slice(piece.name)[source] if source else file.whole(piece.name))


class Opened:
    """Opens a safetensors file, and raises CheckpointError if it is not one."""

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            self._file = cast(Any, safe_open(str(path), framework="pt"))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is not a safetensors file: {error}") from None
        self.names = set(self._file.keys())

    def __enter__(self) -> Opened:
        self._file.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._file.__exit__(*error)

    def slice(self, name: str) -> Any:
        """Return a handle to a tensor, from which parts can be read by slicing."""
        return self._file.get_slice(name)

    def whole(self, name: str) -> Tensor:
        """Read a whole tensor."""
        tensor: Tensor = self._file.get_tensor(name)
        return tensor


def _common(piece: LocalChunk, chunk: Chunk) -> tuple[list[int], list[int]] | None:
    """Return begins and ends of the overlap of two blocks in the whole tensor, or None."""
    begins = [max(a, b) for a, b in zip(piece.offsets, chunk.offsets, strict=True)]
    ends = [
        min(a + s, b + t) for a, s, b, t in zip(piece.offsets, piece.sizes, chunk.offsets, chunk.sizes, strict=True)
    ]
    return (begins, ends) if all(b < e for b, e in zip(begins, ends, strict=True)) else None


def _box(begins: Sequence[int], ends: Sequence[int], origin: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(b - o, e - o) for b, e, o in zip(begins, ends, origin, strict=True))


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def some(names: Iterable[str]) -> str:
    """Return the first five names and the number of the others, for a message."""
    listed = sorted(names)
    return ", ".join(listed[:5]) + (f" and {len(listed) - 5} more" if len(listed) > 5 else "")
