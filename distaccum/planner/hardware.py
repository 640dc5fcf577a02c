"""Holds, reads and writes the speeds of a machine that `distaccum profile` measured."""

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
# The first field of the file. The number changes whenever the meaning of a field changes.
_FORMAT = "distaccum machine 2"

Point = tuple[float, float]


@dataclass(frozen=True)
class LinkTimings:
    """Holds the measured time of one kind of collective, at several message sizes.

    The collective runs among `HardwareProfile.ranks` ranks. A line through two sizes is not
    accurate enough: the rate of an all-gather over gloo falls by a third from 0.5 to 8 MB. Bytes
    are those of the whole message, as in `traffic.CollectiveCost`, not the bytes that a network
    card sends.
    """

    sizes: tuple[int, ...]  # bytes, ascending, at least one
    seconds: tuple[float, ...]  # one for each size

    @property
    def latency_s(self) -> float:
        """Return the seconds of the smallest message that was measured."""
        return self.seconds[0]

    def message_s(self, num_bytes: float) -> float:
        """Return the predicted seconds of a message of any size.

        Between two measured sizes the time is interpolated linearly. Below the smallest size it is
        the time of the smallest. Above the largest size it grows in proportion to the bytes.
        """
        if num_bytes <= self.sizes[0]:
            return self.seconds[0]
        if num_bytes >= self.sizes[-1]:
            return self.seconds[-1] * num_bytes / self.sizes[-1]
        i = bisect_right(self.sizes, num_bytes)
        share = (num_bytes - self.sizes[i - 1]) / (self.sizes[i] - self.sizes[i - 1])
        return self.seconds[i - 1] + share * (self.seconds[i] - self.seconds[i - 1])


@dataclass(frozen=True)
class HardwareProfile:
    """Holds the measured speeds of the slowest rank, for one model in one precision.

    All ranks were working while these were measured.
    """

    device: str  # cpu, or the name of the GPU
    threads: int  # CPU threads per rank
    model: str  # the measured model; other models compute at other rates
    precision: str
    # The forward and backward of a micro-batch take micro_batch_overhead_s + FLOPs / flops_per_s.
    micro_batch_overhead_s: float
    flops_per_s: float
    # Gradient norm, clipping, optimizer and zeroing, for each parameter element that a rank holds.
    update_s_per_number: float
    ranks: int  # ranks that took part in the measurement
    links: Mapping[str, LinkTimings]  # by kind of collective; empty on one rank
    overlaps: bool  # whether FSDP2's collectives overlap computation; on CPUs they block
    versions: Mapping[str, str]  # of torch, distaccum and Python
    date: str

    def save(self, path: Path) -> None:
        """Write the profile to a file atomically: the file is complete or unchanged.

        Args:
            path: the JSON file to write; an existing file is replaced.

        Raises:
            ConfigError: if the path cannot be written.
        """
        draft = path.with_name(f"{path.name}.draft")
        try:
            draft.write_text(json.dumps({"format": _FORMAT, **asdict(self)}, indent=1) + "\n")
            os.replace(draft, path)
        except OSError as error:
            raise ConfigError(f"machine={path} cannot be written: {error.strerror}. Name another file.") from None

    @staticmethod
    def load(path: Path) -> HardwareProfile:
        """Return the profile that `save` wrote to a file.

        Nothing in the file is executed, and every field is checked.

        Args:
            path: the JSON file to read.

        Raises:
            ConfigError: if the file is missing, is damaged or is not a hardware profile.
        """
        try:
            content = json.loads(path.read_text())
        except OSError as error:
            raise ConfigError(
                f"machine={path} cannot be read: {error.strerror}. Name a file that `distaccum profile` has written."
            ) from None
        except ValueError:
            raise _foreign(path, "it is not JSON") from None
        if not isinstance(content, dict) or content.pop("format", None) != _FORMAT:
            raise _foreign(path, f'its "format" is not "{_FORMAT}"')
        names = [field.name for field in fields(HardwareProfile)]
        if set(content) != set(names):
            wrong = sorted(set(content) ^ set(names))
            raise _foreign(path, f"fields are missing or unknown: {', '.join(wrong)}")
        machine = HardwareProfile(**{name: _CHECKS[name](_Field(path, name), content[name]) for name in names})
        if bool(machine.links) is not (machine.ranks > 1):
            raise _foreign(path, f"it has {len(machine.links)} link(s) for {machine.ranks} rank(s)")
        return machine


def fit(small: Point, large: Point) -> Point:
    """Fit a line through two measurements, and return its seconds at size 0 and per unit of size.

    Neither result is ever negative, and the line always passes through the larger measurement. If
    noise makes the seconds at size 0 negative, or the slope zero or negative, the seconds at size 0
    are set to 0, and the larger measurement alone determines the slope.

    Args:
        small: size and seconds of the smaller measurement.
        large: size and seconds of the larger measurement.
    """
    (size, seconds), (larger, longer) = small, large
    at_zero = (seconds * larger - longer * size) / (larger - size)
    if not 0 <= at_zero < longer:
        at_zero = 0.0
    return at_zero, (longer - at_zero) / larger


class _Field:
    """Checks one field of the file: methods return its value or raise `ConfigError`."""

    def __init__(self, path: Path, name: str) -> None:
        self._path, self._name = path, name

    def text(self, value: Any) -> str:
        if not isinstance(value, str):
            raise self._wrong("a string", value)
        return value

    def flag(self, value: Any) -> bool:
        if not isinstance(value, bool):
            raise self._wrong("true or false", value)
        return value

    def count(self, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self._wrong("an integer of at least 1", value)
        return value

    def seconds(self, value: Any) -> float:
        if not _is_number(value) or value < 0:
            raise self._wrong("a number of at least 0", value)
        return float(value)

    def rate(self, value: Any) -> float:
        if not _is_number(value) or value <= 0:
            raise self._wrong("a number above 0", value)
        return float(value)

    def texts(self, value: Any) -> dict[str, str]:
        if not isinstance(value, dict):
            raise self._wrong("an object whose values are strings", value)
        return {name: self.text(one) for name, one in value.items()}

    def links(self, value: Any) -> dict[str, LinkTimings]:
        if not isinstance(value, dict) or set(value) not in (set(), set(KINDS)):
            raise self._wrong(f"empty, or have the keys {', '.join(KINDS)}", value)
        return {kind: self.link(link) for kind, link in value.items()}

    def link(self, value: Any) -> LinkTimings:
        if not isinstance(value, dict) or set(value) != {"sizes", "seconds"}:
            raise self._wrong("an object with sizes and seconds for each kind", value)
        if not all(isinstance(column, list) for column in value.values()):
            raise self._wrong("lists for sizes and for seconds", value)
        link = LinkTimings(tuple(map(self.count, value["sizes"])), tuple(map(self.rate, value["seconds"])))
        ascending = all(small < large for small, large in pairwise(link.sizes))
        if not link.sizes or len(link.sizes) != len(link.seconds) or not ascending:
            raise self._wrong("ascending sizes and one number of seconds for each", value)
        return link

    def _wrong(self, expected: str, value: Any) -> ConfigError:
        return _foreign(self._path, f"{self._name} must be {expected}, but is {value!r}")


_CHECKS: Mapping[str, Any] = {
    "device": _Field.text,
    "threads": _Field.count,
    "model": _Field.text,
    "precision": _Field.text,
    "micro_batch_overhead_s": _Field.seconds,
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
        f"machine={path} was not written by `distaccum profile`, or is damaged: {why}. Name another file, or delete "
        "this one and run `distaccum profile` again."
    )
