"""Converts any value of a configuration to plain JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence, Set
from enum import Enum
from pathlib import Path
from typing import Any


def plain_dict(fields: Mapping[str, object]) -> dict[str, Any]:
    """Convert the values of a mapping by `to_plain`."""
    return {str(name): to_plain(value) for name, value in fields.items()}


def to_plain(value: object) -> object:
    """Convert a value to types that `json.dumps(..., allow_nan=False)` accepts.

    Dataclasses and mappings become dicts with string keys. Sequences and sets become lists, and
    sets are sorted. An Enum becomes its value. Paths and all other types become their text. A float
    that is not finite becomes "nan", "inf" or "-inf", because JSON has no such number. The argument
    itself is not changed.
    """
    if isinstance(value, Enum):
        return to_plain(value.value)
    if value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else repr(float(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)
        }
    if isinstance(value, Mapping):
        return {str(to_plain(key)): to_plain(item) for key, item in value.items()}
    if isinstance(value, Set):
        return sorted((to_plain(item) for item in value), key=str)
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray, Path)):
        return [to_plain(item) for item in value]
    return str(value)
