"""The program that measures slow links runs, counts what the links sent, and leaves no host behind.

Needs root and iproute2. Where they are missing the program must say so in a sentence; with CI set
they must be there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SMOKE = [sys.executable, str(BENCHMARKS / "links.py"), "--smoke"]


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=100)


@pytest.mark.nightly
def test_every_way_sends_what_it_should(tmp_path: Path) -> None:
    found_file, picture = tmp_path / "found.json", tmp_path / "found.png"
    process = subprocess.Popen(
        [*SMOKE, "--out", str(found_file), "--plot", str(picture)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    out, err = process.communicate(timeout=110)
    if process.returncode == 2 and os.environ.get("CI") != "true":
        assert len(err.splitlines()) == 1
        assert err.startswith("links.py: hosts ")
        return
    assert process.returncode == 0, err
    assert f"distaccum-{process.pid}-" not in run("ip", "netns", "list").stdout
    assert not list(Path("/etc/netns").glob(f"distaccum-{process.pid}-*"))
    assert "bitwise equal" in out
    assert "DIFFERENT" not in out
    assert picture.read_bytes().startswith(b"\x89PNG")

    found = json.loads(found_file.read_text())
    world = found["worlds"]["2"]
    samples = world["rates"]["400"]["samples"]
    assert {len(taken) for taken in samples.values()} == {2}  # rounds
    assert all(
        len(sample["seconds"]) == len(sample["bytes"]) == 2
        for taken in samples.values()
        for sample in taken
    )
    assert set(world["agreement"]) == set(samples) - {"compute alone"}
    assert set(world["missing"]) <= {"Accelerate", "Fabric"}

    # The least of the rounds: a segment that the full queue of a link has dropped is sent, and
    # counted, once more.
    sent = {name: min(max(one["bytes"]) for one in taken) for name, taken in samples.items()}
    gradients = 4 * found["parameters"]
    micro_batches = found["settings"]["num_micro_batches"]
    # On two ranks an all-reduce sends each host's gradients once. Headers, acknowledgements and the
    # messages in which ranks meet come on top: some 40 bytes for each segment of up to 64 KiB, and
    # as many for each that is received.
    assert gradients < sent["DDP no_sync"] < 1.05 * gradients
    assert sent["compute alone"] < 0.01 * gradients
    assert sent["ours DDP"] == pytest.approx(sent["DDP no_sync"], rel=0.01)
    assert sent["DDP naive"] == pytest.approx(micro_batches * sent["DDP no_sync"], rel=0.02)
    for peer in {"Accelerate", "Fabric"} - set(world["missing"]):
        assert sent[peer] == pytest.approx(sent["DDP no_sync"], rel=0.01)
    # An all-gather sends the half of the parameters that this host has; gloo's reduce-scatter as
    # much as an all-reduce.
    assert sent["ours FSDP2 gather_once"] < 1.55 * gradients
    assert sent["ours FSDP2 gather_once"] < sent["ours FSDP2 boundary"] / 4
    assert sent["ours FSDP2 boundary"] <= 1.01 * sent["FSDP2 last micro-batch"]
    assert (
        sent["FSDP2 last micro-batch"]
        < sent["FSDP2 each micro-batch"] - (micro_batches - 1) * gradients / 2
    )


def test_without_root_it_says_what_it_needs(monkeypatch, capsys) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import links

    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(links.signal, "signal", lambda *unused: None)
    assert links.main(["--smoke"]) == 2
    assert "only root may make them" in capsys.readouterr().err
