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
from functools import cache
from typing import Any, get_args, get_origin, get_type_hints

from distaccum.errors import CheckpointError

MANIFEST = "manifest.json"
FORMAT = "distaccum checkpoint"
VERSION = 1
MAX_BYTES = 1 << 28  # size limit of a manifest, enough for millions of chunks
_FILE = re.compile(r"shard-[0-9]{5,9}\.safetensors")
_SHA256 = re.compile(r"[0-9a-f]{64}")

# Name in torch -> name in a safetensors file.
DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "complex64": "C64",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
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
    """Lists the contents of one checkpoint.

    The annotations of this class and of those above are the schema of manifest.json.
    """

    step: int
    serial: int  # counts the saves of a run; it also grows when a run returns to an earlier step
    facts: Mapping[str, Any]  # plain JSON
    files: Mapping[str, StoredFile]
    tensors: Mapping[str, StoredTensor]

    def to_json(self) -> str:
        """Return the text of manifest.json."""
        return (
            json.dumps(
                {"format": FORMAT, "version": VERSION, **asdict(self)}, separators=(",", ":")
            )
            + "\n"
        )

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
            raise CheckpointError(
                f"{MANIFEST} is not the manifest of a checkpoint: its format is not {FORMAT!r}"
            )
        if parsed.get("version") != VERSION:
            raise CheckpointError(
                f"{MANIFEST} has version {parsed.get('version')!r}; only version {VERSION} can be "
                "read"
            )
        manifest: Manifest = _built(Manifest, parsed, "")
        _check_values(manifest)
        return manifest


def _built(kind: Any, value: Any, name: str, field: str = "") -> Any:
    """Build a value of an annotated type from parsed JSON, and check everything in it.

    Args:
        kind: a dataclass of this file, or the type of one of its fields.
        value: the parsed JSON.
        name: the name of the file or tensor that the value describes, or "", for the error.
        field: the field that holds the value, or "", for the error.
    """
    if kind is Any:
        return value
    container = get_origin(kind) or kind
    expected, what = _IN_JSON.get(container, (dict, "a JSON object"))
    found = type(value)
    if found is not expected or (expected is int and not 0 <= value < 1 << 62):
        where = f"{field} of {name}" if field and name else field or name
        raise CheckpointError(f"{MANIFEST}: {where} is {value!r:.80}, which is not {what}")
    if container is tuple:
        return tuple(_built(get_args(kind)[0], item, name, field) for item in value)
    if container is Mapping:
        return {key: _built(get_args(kind)[1], item, key) for key, item in value.items()}
    if expected is not dict:
        return value
    fields = _hints(kind)
    missing = next((key for key in fields if key not in value), None)
    if missing is not None:
        raise CheckpointError(f"{MANIFEST}: {name or 'it'} has no {missing}")
    return kind(**{key: _built(hint, value[key], name, key) for key, hint in fields.items()})


# How JSON holds a type, and how to call it in an error. Everything else is a JSON object.
_IN_JSON: dict[Any, tuple[type, str]] = {
    int: (int, "a count (an integer of at least 0)"),
    str: (str, "a text"),
    tuple: (list, "a list"),
}
_hints = cache(get_type_hints)


def _check_values(manifest: Manifest) -> None:
    """Refuse names, checksums, dtypes and chunks that no checkpoint can have."""
    for name, file in manifest.files.items():
        if not _FILE.fullmatch(name):
            raise CheckpointError(
                f"{MANIFEST} names the file {name[:80]!r}; only names such as "
                "shard-00000.safetensors are accepted"
            )
        if not _SHA256.fullmatch(file.sha256):
            raise CheckpointError(f"{MANIFEST}: {name} has no sha256, but {file.sha256[:80]!r}")
    for name, tensor in manifest.tensors.items():
        if tensor.dtype not in DTYPES:
            dtype = tensor.dtype[:40]
            raise CheckpointError(f"{MANIFEST}: tensor {name!r} has the unknown dtype {dtype!r}")
        unlisted = [chunk.file for chunk in tensor.chunks if chunk.file not in manifest.files]
        if unlisted:
            raise CheckpointError(
                f"{MANIFEST}: tensor {name!r} is in the file {unlisted[0][:80]!r}, which the "
                "manifest does not list"
            )
        check_cover(name, tensor.shape, [(chunk.offsets, chunk.sizes) for chunk in tensor.chunks])


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
            f"{where} is of type {type(value).__name__}; facts must be plain JSON (dict, list, "
            "str, int, float, bool, None), and tensors belong to `tensors`"
        )


def check_cover(
    name: str, shape: Sequence[int], boxes: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> None:
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
        if not inside or any(
            s < 1 or o + s > n for o, s, n in zip(offsets, sizes, shape, strict=True)
        ):
            raise CheckpointError(
                f"tensor {name!r} has a chunk at {list(offsets)} of size {list(sizes)} outside its "
                f"shape {list(shape)}"
            )
    filled = sum(math.prod(sizes) for _, sizes in boxes)
    if filled != math.prod(shape):
        raise CheckpointError(
            f"tensor {name!r} has {math.prod(shape)} elements, but its chunks hold {filled}"
        )
    # Overlapping blocks overlap in every dimension, so the dimension with the most distinct offsets
    # finds candidates. (A tensor without dimensions has one block.)
    along = max(
        range(len(shape)), key=lambda d: len({offsets[d] for offsets, _ in boxes}), default=0
    )
    ordered = sorted(boxes, key=lambda box: tuple(box[0][along : along + 1]))
    for i, (offsets, sizes) in enumerate(ordered):
        for others, other_sizes in ordered[i + 1 :]:
            if others[along] >= offsets[along] + sizes[along]:
                break
            if all(
                a < b + t and b < a + s
                for a, s, b, t in zip(offsets, sizes, others, other_sizes, strict=True)
            ):
                raise CheckpointError(
                    f"tensor {name!r} has chunks that overlap, at {list(offsets)} and "
                    f"{list(others)}"
                )
