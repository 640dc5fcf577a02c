"""Defines the manifest of a checkpoint: its tensors, where their parts are stored, and its files.

A manifest may come from an untrusted source. It is plain JSON, and everything in it is checked here
before it is used.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from distaccum.errors import CheckpointError

MANIFEST = "manifest.json"
FORMAT = "distaccum checkpoint"
VERSION = 1
MAX_BYTES = 1 << 28  # size limit of a manifest, enough for millions of chunks
_MAX_DIMS = 64
_FILE = re.compile(r"shard-[0-9]{5,9}\.safetensors")

# Name in torch -> (name in a safetensors file, bytes per element).
DTYPES = {
    "float64": ("F64", 8),
    "float32": ("F32", 4),
    "float16": ("F16", 2),
    "bfloat16": ("BF16", 2),
    "float8_e4m3fn": ("F8_E4M3", 1),
    "float8_e5m2": ("F8_E5M2", 1),
    "complex64": ("C64", 8),
    "int64": ("I64", 8),
    "int32": ("I32", 4),
    "int16": ("I16", 2),
    "int8": ("I8", 1),
    "uint64": ("U64", 8),
    "uint32": ("U32", 4),
    "uint16": ("U16", 2),
    "uint8": ("U8", 1),
    "bool": ("BOOL", 1),
}


@dataclass(frozen=True)
class Chunk:
    """Locates a rectangular block of one tensor, stored in a file under the tensor's name."""

    file: str
    offsets: tuple[int, ...]  # where the block begins in the whole tensor, by dimension
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class StoredTensor:
    """Describes one tensor, which its chunks cover without overlapping."""

    dtype: str  # a key of DTYPES
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class StoredFile:
    """Describes the expected size and checksum of a file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Lists the contents of one checkpoint."""

    step: int
    serial: int  # counts the saves of a run; it also grows when a run returns to an earlier step
    facts: Mapping[str, Any]  # plain JSON
    files: Mapping[str, StoredFile]
    tensors: Mapping[str, StoredTensor]

    def to_json(self) -> str:
        """Return the text of manifest.json."""
        return json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, separators=(",", ":")) + "\n"

    @staticmethod
    def from_json(text: bytes) -> Manifest:
        """Parse and check the text of a manifest.

        Raises:
            CheckpointError: if it is not a valid manifest.
        """
        try:
            parsed = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{MANIFEST} is not JSON: {error}") from None
        if not isinstance(parsed, dict) or parsed.get("format") != FORMAT:
            raise CheckpointError(f"{MANIFEST} is not the manifest of a checkpoint: its format is not {FORMAT!r}")
        if parsed.get("version") != VERSION:
            raise CheckpointError(
                f"{MANIFEST} has version {parsed.get('version')!r}; only version {VERSION} can be read"
            )
        step, serial = _count(parsed.get("step"), "step"), _count(parsed.get("serial"), "serial")
        facts = _table(parsed.get("facts"), "facts")
        files = {name: _file(name, entry) for name, entry in _table(parsed.get("files"), "files").items()}
        entries = _table(parsed.get("tensors"), "tensors")
        return Manifest(
            step, serial, facts, files, {name: _tensor(name, entry, files) for name, entry in entries.items()}
        )


def check_plain(value: object, where: str) -> None:
    """Refuse a value that JSON would not reproduce exactly.

    Args:
        value: the value to check, with everything inside it.
        where: the name of the value, for the error.

    Raises:
        CheckpointError: for a key that is not a string, or a value that is not plain JSON.
    """
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise CheckpointError(f"{where} has the key {key!r}; keys must be strings")
            check_plain(item, f"{where}.{key}")
    elif isinstance(value, list):
        for i, item in enumerate(value):
            check_plain(item, f"{where}[{i}]")
    elif value is not None and type(value) not in (str, int, float, bool):
        raise CheckpointError(
            f"{where} is of type {type(value).__name__}; facts must be plain JSON (dict, list, str, int, float, bool, "
            "None), and tensors belong to `tensors`"
        )


def check_cover(name: str, shape: Sequence[int], boxes: Sequence[tuple[Sequence[int], Sequence[int]]]) -> None:
    """Refuse blocks that exceed a tensor's shape, overlap, or leave a part of it uncovered.

    Args:
        name: the tensor's name, for the error.
        shape: the shape of the whole tensor.
        boxes: offsets and sizes of each block, by dimension.

    Raises:
        CheckpointError: if the blocks do not cover the tensor exactly once.
    """
    for offsets, sizes in boxes:
        inside = len(offsets) == len(sizes) == len(shape)
        if not inside or any(s < 1 or o + s > n for o, s, n in zip(offsets, sizes, shape, strict=True)):
            raise CheckpointError(
                f"tensor {name!r} has a chunk at {list(offsets)} of size {list(sizes)} outside its shape {list(shape)}"
            )
    filled = sum(math.prod(sizes) for _, sizes in boxes)
    if filled != math.prod(shape):
        raise CheckpointError(f"tensor {name!r} has {math.prod(shape)} elements, but its chunks hold {filled}")
    # Overlapping blocks overlap in every dimension, so the dimension with the most distinct offsets
    # finds candidates.
    along = max(range(len(shape)), key=lambda d: len({offsets[d] for offsets, _ in boxes}), default=0)
    ordered = sorted(boxes, key=lambda box: tuple(box[0][along : along + 1]))
    for i, (offsets, sizes) in enumerate(ordered):
        for others, other_sizes in ordered[i + 1 :]:
            if len(shape) and others[along] >= offsets[along] + sizes[along]:
                break
            if all(a < b + t and b < a + s for a, s, b, t in zip(offsets, sizes, others, other_sizes, strict=True)):
                raise CheckpointError(f"tensor {name!r} has chunks that overlap, at {list(offsets)} and {list(others)}")


def _table(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise CheckpointError(f"{MANIFEST}: {where} is not a JSON object")
    return value


def _count(value: object, where: str) -> int:
    if type(value) is not int or not 0 <= value < 1 << 62:
        raise CheckpointError(f"{MANIFEST}: {where} is {value!r:.40}, which is not a count (an integer of at least 0)")
    return value


def _counts(value: object, where: str) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) > _MAX_DIMS:
        raise CheckpointError(f"{MANIFEST}: {where} is not a list of at most {_MAX_DIMS} numbers")
    return tuple(_count(item, where) for item in value)


def _file(name: str, entry: object) -> StoredFile:
    if not _FILE.fullmatch(name):
        raise CheckpointError(
            f"{MANIFEST} names the file {name[:80]!r}; only names such as shard-00000.safetensors are accepted"
        )
    fields = _table(entry, name)
    digest = fields.get("sha256")
    if not isinstance(digest, str) or not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise CheckpointError(f"{MANIFEST}: {name} has no sha256")
    return StoredFile(_count(fields.get("bytes"), f"bytes of {name}"), digest)


def _tensor(name: str, entry: object, files: Mapping[str, StoredFile]) -> StoredTensor:
    fields = _table(entry, name)
    dtype = fields.get("dtype")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{MANIFEST}: tensor {name!r} has the unknown dtype {str(dtype)[:40]!r}")
    shape = _counts(fields.get("shape"), f"shape of {name}")
    listed = fields.get("chunks")
    if not isinstance(listed, list):
        raise CheckpointError(f"{MANIFEST}: tensor {name!r} has no list of chunks")
    chunks = []
    for item in listed:
        chunk = _table(item, f"a chunk of {name}")
        file = chunk.get("file")
        if not isinstance(file, str) or file not in files:
            raise CheckpointError(
                f"{MANIFEST}: tensor {name!r} is in the file {str(file)[:80]!r}, which the manifest does not list"
            )
        offsets, sizes = (_counts(chunk.get(key), f"{key} of {name}") for key in ("offsets", "sizes"))
        chunks.append(Chunk(file, offsets, sizes))
    check_cover(name, shape, [(chunk.offsets, chunk.sizes) for chunk in chunks])
    return StoredTensor(dtype, shape, tuple(chunks))
