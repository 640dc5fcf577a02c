"""Holds, reads and writes the speeds of a machine that `distaccum profile` measured."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

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
    are those of the whole message, not those that a network card sends.
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
        if num_bytes > self.sizes[-1]:
            return self.seconds[-1] * num_bytes / self.sizes[-1]
        return float(np.interp(num_bytes, self.sizes, self.seconds))


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
            raise ConfigError(
                f"machine={path} cannot be written: {error.strerror}. Name another file."
            ) from None

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
                f"machine={path} cannot be read: {error.strerror}. Name a file that `distaccum "
                "profile` has written."
            ) from None
        except ValueError:
            raise _foreign(path, "it is not JSON") from None
        if not isinstance(content, dict) or content.pop("format", None) != _FORMAT:
            raise _foreign(path, f'its "format" is not "{_FORMAT}"')
        if set(content) != set(_MUST_BE):
            wrong = sorted(set(content) ^ set(_MUST_BE))
            raise _foreign(path, f"fields are missing or unknown: {', '.join(wrong)}")
        for name, rule in _MUST_BE.items():
            _require(path, name, content[name], rule)
        links = {kind: _link(path, link) for kind, link in content.pop("links").items()}
        machine = HardwareProfile(**content, links=links)
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


_TEXT = "a string"
_COUNT = "an integer of at least 1"
_RATE = "a number above 0"
_SECONDS = "a number of at least 0"
# What the value of each field of the file must be, in words that `_keeps` understands.
_MUST_BE = {
    "device": _TEXT,
    "threads": _COUNT,
    "model": _TEXT,
    "precision": _TEXT,
    "micro_batch_overhead_s": _SECONDS,
    "flops_per_s": _RATE,
    "update_s_per_number": _SECONDS,
    "ranks": _COUNT,
    "links": f"empty, or have the keys {', '.join(KINDS)}",
    "overlaps": "true or false",
    "versions": "an object whose values are strings",
    "date": _TEXT,
}


def _keeps(rule: str, value: Any) -> bool:
    """Return whether a value is what the rule says."""
    items = value if isinstance(value, dict) else None
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    kept = {
        _TEXT: isinstance(value, str),
        _COUNT: number and isinstance(value, int) and value >= 1,
        _RATE: number and value > 0,
        _SECONDS: number and value >= 0,
        _MUST_BE["links"]: items is not None and set(items) in (set(), set(KINDS)),
        _MUST_BE["overlaps"]: isinstance(value, bool),
        _MUST_BE["versions"]: (
            items is not None and all(isinstance(text, str) for text in items.values())
        ),
    }
    return kept[rule]


def _require(path: Path, name: str, value: Any, rule: str) -> None:
    if not _keeps(rule, value):
        raise _must_be(path, name, rule, value)


def _link(path: Path, value: Any) -> LinkTimings:
    """Return the timings in one entry of `links`, after checks."""
    if not isinstance(value, dict) or set(value) != {"sizes", "seconds"}:
        raise _must_be(path, "links", "an object with sizes and seconds for each kind", value)
    sizes, seconds = value["sizes"], value["seconds"]
    if not isinstance(sizes, list) or not isinstance(seconds, list):
        raise _must_be(path, "links", "lists for sizes and for seconds", value)
    for rule, numbers in ((_COUNT, sizes), (_RATE, seconds)):
        for number in numbers:
            _require(path, "links", number, rule)
    if not sizes or len(sizes) != len(seconds) or sizes != sorted(set(sizes)):
        raise _must_be(path, "links", "ascending sizes and one number of seconds for each", value)
    return LinkTimings(tuple(sizes), tuple(seconds))


def _must_be(path: Path, name: str, rule: str, value: Any) -> ConfigError:
    return _foreign(path, f"{name} must be {rule}, but is {value!r}")


def _foreign(path: Path, why: str) -> ConfigError:
    return ConfigError(
        f"machine={path} was not written by `distaccum profile`, or is damaged: {why}. Name "
        "another file, or delete this one and run `distaccum profile` again."
    )
