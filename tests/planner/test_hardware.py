"""The file of a machine's speeds: what goes in comes out, and nothing else does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from distaccum.errors import ConfigError
from distaccum.planner.hardware import KINDS, HardwareProfile, LinkTimings, fit

LINK = LinkTimings((1_000, 3_000, 10_000), (1.0, 2.0, 9.0))
MACHINE = HardwareProfile(
    "cpu", 2, "gpt, 7 parameters", "bf16", 0.001, 1.5e10, 2e-9, 4, dict.fromkeys(KINDS, LINK),
    False, {"torch": "2.13.0"}, "2026-11-21 12:00 UTC",
)  # fmt: skip


def test_round_trip(tmp_path: Path) -> None:
    MACHINE.save(tmp_path / "machine.json")
    MACHINE.save(tmp_path / "machine.json")
    assert HardwareProfile.load(tmp_path / "machine.json") == MACHINE
    assert [path.name for path in tmp_path.iterdir()] == ["machine.json"]


def test_messages_lie_on_lines_between_what_was_measured() -> None:
    assert LINK.latency_s == LINK.message_s(1) == LINK.message_s(1_000) == 1.0
    assert LINK.message_s(2_000) == 1.5
    assert LINK.message_s(3_000) == 2.0
    assert LINK.message_s(10_000) == 9.0
    assert LINK.message_s(20_000) == 18.0  # at the rate of the largest


def test_a_line_through_two_sizes() -> None:
    """0.3 s of 1 and 0.5 s of 2: 0.1 s at 0, and 0.2 s for each."""
    assert fit((1, 0.3), (2, 0.5)) == pytest.approx((0.1, 0.2))


@pytest.mark.parametrize("seconds", [0.2, 0.5, 0.6])
def test_where_noise_bends_the_line_the_larger_one_decides(seconds: float) -> None:
    """Less than half of 0.5 s would be less than nothing at 0, and 0.5 s or more nothing for
    each."""
    assert fit((1, seconds), (2, 0.5)) == (0.0, 0.25)


def damaged(**changes: Any) -> str:
    told = {"format": "distaccum machine 2", **json.loads(WRITTEN), **changes}
    return json.dumps({name: value for name, value in told.items() if value != "left out"})


WRITTEN = json.dumps(
    {
        "device": "cpu", "threads": 2, "model": "gpt", "precision": "fp32",
        "micro_batch_overhead_s": 0, "flops_per_s": 1e9,
        "update_s_per_number": 1e-9, "ranks": 2, "links": {kind: {"sizes": [8],
        "seconds": [0.1]} for kind in KINDS}, "overlaps": True, "versions": {}, "date": "-",
    }
)  # fmt: skip


def link(**changes: Any) -> dict[str, Any]:
    return {kind: {"sizes": [8, 16], "seconds": [0.1, 0.2], **changes} for kind in KINDS}


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("", "it is not JSON"),
        ("\0\1", "it is not JSON"),
        ("[]", 'its "format" is not "distaccum machine 2"'),
        ('{"format": "distaccum machine 1"}', 'its "format" is not'),
        (damaged(date="left out"), "fields are missing or unknown: date"),
        (damaged(more=1), "fields are missing or unknown: more"),
        (damaged(device=1), "device must be a string, but is 1"),
        (damaged(threads=0), "threads must be an integer of at least 1, but is 0"),
        (damaged(ranks=True), "ranks must be an integer"),
        (damaged(flops_per_s=0), "flops_per_s must be a number above 0, but is 0"),
        (damaged(flops_per_s="1e9"), "flops_per_s must be a number above 0"),
        (
            damaged(micro_batch_overhead_s=-1),
            "micro_batch_overhead_s must be a number of at least 0",
        ),
        (
            damaged(update_s_per_number=float("nan")),
            "update_s_per_number must be a number of at least 0, but is nan",
        ),
        (damaged(overlaps=1), "overlaps must be true or false"),
        (damaged(versions=["2.13"]), "versions must be an object whose values are strings"),
        (
            damaged(links={"all_reduce": {}}),
            "links must be empty, or have the keys all_reduce, all_gather, reduce_scatter",
        ),
        (damaged(links=link(rate=1)), "links must be an object with sizes and seconds"),
        (damaged(links=link(sizes=8)), "links must be lists"),
        (damaged(links=link(sizes=[16, 8])), "links must be ascending sizes"),
        (
            damaged(links=link(sizes=[8])),
            "links must be ascending sizes and one number of seconds for each",
        ),
        (damaged(links=link(sizes=[], seconds=[])), "links must be ascending sizes"),
        (damaged(links=link(seconds=[0.1, -0.2])), "links must be a number above 0"),
        (damaged(links={}), r"it has 0 link\(s\) for 2 rank\(s\)"),
        (damaged(ranks=1), r"it has 3 link\(s\) for 1 rank\(s\)"),
    ],
)
def test_what_is_no_machine(tmp_path: Path, text: str, letter: str) -> None:
    path = tmp_path / "machine.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=letter) as caught:
        HardwareProfile.load(path)
    assert f"machine={path} was not written by `distaccum profile`, or is damaged" in str(
        caught.value
    )


def test_what_is_not_there_and_what_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.json cannot be read: No such file or directory"):
        HardwareProfile.load(tmp_path / "none.json")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        HardwareProfile.load(tmp_path)
    with pytest.raises(ConfigError, match="cannot be written: No such file or directory"):
        MACHINE.save(tmp_path / "none" / "machine.json")
