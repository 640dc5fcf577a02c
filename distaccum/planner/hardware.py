"""What a machine does in a second, as `distaccum profile` measured it: a small file of plain numbers."""

from __future__ import annotations

import json
import math
import os
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

from distaccum.errors import ConfigError

KINDS = ("all_reduce", "all_gather", "reduce_scatter")
_FORMAT = "distaccum machine 1"  # the file's first field; another number where a field gets another meaning

Point = tuple[float, float]


@dataclass(frozen=True)
class Link:
    """One kind of collective among `Machine.ranks`: seconds of a message, at several sizes.

    A line through two of them would not do: the rate of an all-gather over gloo falls by a third from 0.5 to 8 MB. The
    bytes are those of the whole message, as in `traffic.Sends`, not what a network card sends.
    """

    sizes: tuple[int, ...]  # bytes, ascending, at least one
    seconds: tuple[float, ...]

    @property
    def latency_s(self) -> float:
        """Of the smallest message that was measured."""
        return self.seconds[0]

    def message_s(self, num_bytes: float) -> float:
        """On straight lines between the sizes that were measured, and behind the largest at its rate."""
        if num_bytes <= self.sizes[0]:
            return self.seconds[0]
        if num_bytes >= self.sizes[-1]:
            return self.seconds[-1] * num_bytes / self.sizes[-1]
        i = bisect_right(self.sizes, num_bytes)
        share = (num_bytes - self.sizes[i - 1]) / (self.sizes[i] - self.sizes[i - 1])
        return self.seconds[i - 1] + share * (self.seconds[i] - self.seconds[i - 1])


@dataclass(frozen=True)
class Machine:
    """Speeds of a rank while all ranks are at work, by the slowest of them, for one model in one precision."""

    device: str  # cpu, or the name of the GPU
    threads: int  # of a rank on the CPU
    model: str  # what was measured: other models compute at other rates
    precision: str
    micro_overhead_s: float  # forward and backward of a micro take micro_overhead_s + its FLOPs / flops_per_s
    flops_per_s: float
    update_s_per_number: (
        float  # norm, clipping, optimizer and zeroing, for each number of a parameter that a rank holds
    )
    ranks: int
    links: Mapping[str, Link]  # by kind; empty on one rank
    overlaps: bool  # whether FSDP2's collectives run beside computation: on CPUs they block
    versions: Mapping[str, str]
    date: str

    def save(self, path: Path) -> None:
        """Write the file as a whole, or not at all.

        Raises:
            ConfigError: for a path that cannot be written.
        """
        draft = path.with_name(f"{path.name}.draft")
        try:
            draft.write_text(json.dumps({"format": _FORMAT, **asdict(self)}, indent=1) + "\n")
            os.replace(draft, path)
        except OSError as error:
            raise ConfigError(f"machine={path} cannot be written: {error.strerror}. Name another file.") from None

    @staticmethod
    def load(path: Path) -> Machine:
        """Read what `save` wrote. Nothing in the file is executed, and every field is checked.

        Raises:
            ConfigError: for a file that is missing, damaged, or of something else.
        """
        try:
            told = json.loads(path.read_text())
        except OSError as error:
            raise ConfigError(
                f"machine={path} cannot be read: {error.strerror}. Name a file that `distaccum profile` writes."
            ) from None
        except ValueError:
            raise _foreign(path, "it is no JSON") from None
        if not isinstance(told, dict) or told.pop("format", None) != _FORMAT:
            raise _foreign(path, f'its "format" is not "{_FORMAT}"')
        names = [field.name for field in fields(Machine)]
        if set(told) != set(names):
            wrong = sorted(set(told) ^ set(names))
            raise _foreign(path, f"fields are missing or unknown: {', '.join(wrong)}")
        machine = Machine(**{name: _CHECKS[name](_Field(path, name), told[name]) for name in names})
        if bool(machine.links) is not (machine.ranks > 1):
            raise _foreign(path, f"it has {len(machine.links)} link(s) between {machine.ranks} rank(s)")
        return machine


def fit(small: Point, large: Point) -> Point:
    """The line through two (size, seconds): what it costs at size 0, and per unit of size.

    Neither is ever negative, and the larger one is met exactly. Where noise has bent the line too far, there is no cost
    at size 0: then the larger measurement alone decides.
    """
    (size, seconds), (larger, longer) = small, large
    at_zero = (seconds * larger - longer * size) / (larger - size)
    if not 0 <= at_zero < longer:
        at_zero = 0.0
    return at_zero, (longer - at_zero) / larger


class _Field:
    """Checks of one field of a file."""

    def __init__(self, path: Path, name: str) -> None:
        self._path, self._name = path, name

    def text(self, value: Any) -> str:
        if not isinstance(value, str):
            raise self._wrong("a text", value)
        return value

    def flag(self, value: Any) -> bool:
        if not isinstance(value, bool):
            raise self._wrong("true or false", value)
        return value

    def count(self, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self._wrong("a whole number from 1 on", value)
        return value

    def seconds(self, value: Any) -> float:
        if not _is_number(value) or value < 0:
            raise self._wrong("a number from 0 on", value)
        return float(value)

    def rate(self, value: Any) -> float:
        if not _is_number(value) or value <= 0:
            raise self._wrong("a number above 0", value)
        return float(value)

    def texts(self, value: Any) -> dict[str, str]:
        if not isinstance(value, dict):
            raise self._wrong("names and texts", value)
        return {name: self.text(one) for name, one in value.items()}

    def links(self, value: Any) -> dict[str, Link]:
        if not isinstance(value, dict) or set(value) not in (set(), set(KINDS)):
            raise self._wrong(f"nothing, or {', '.join(KINDS)}", value)
        return {kind: self.link(link) for kind, link in value.items()}

    def link(self, value: Any) -> Link:
        if not isinstance(value, dict) or set(value) != {"sizes", "seconds"}:
            raise self._wrong("sizes and seconds for each kind", value)
        if not all(isinstance(column, list) for column in value.values()):
            raise self._wrong("lists of sizes and seconds", value)
        link = Link(tuple(map(self.count, value["sizes"])), tuple(map(self.rate, value["seconds"])))
        ascending = all(small < large for small, large in pairwise(link.sizes))
        if not link.sizes or len(link.sizes) != len(link.seconds) or not ascending:
            raise self._wrong("ascending sizes and as many seconds", value)
        return link

    def _wrong(self, expected: str, value: Any) -> ConfigError:
        return _foreign(self._path, f"{self._name} should be {expected} and is {value!r}")


_CHECKS: Mapping[str, Any] = {
    "device": _Field.text,
    "threads": _Field.count,
    "model": _Field.text,
    "precision": _Field.text,
    "micro_overhead_s": _Field.seconds,
    "flops_per_s": _Field.rate,
    "update_s_per_number": _Field.seconds,
    "ranks": _Field.count,
    "links": _Field.links,
    "overlaps": _Field.flag,
    "versions": _Field.texts,
    "date": _Field.text,
}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _foreign(path: Path, why: str) -> ConfigError:
    return ConfigError(
        f"machine={path} is no file of `distaccum profile`, or damaged: {why}. Name another file, or remove this one "
        "and measure again."
    )
