"""Damaged checkpoints and those of strangers: named, passed over, left in place, and nobody's code
is run."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re

import pytest
import torch
from states import ALONE, CPU, full_of, load_alone, names, same_bits, save_alone, spread, whole
from worlds import World as Ranks

from distaccum.checkpoint.manifest import check_cover
from distaccum.checkpoint.store import Checkpoint, Checkpoints
from distaccum.errors import CheckpointError
from distaccum.parallel.world import World

SHARD = "shard-00000.safetensors"


class Malice:
    """Makes a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def flip(path):
    content = bytearray((path / SHARD).read_bytes())
    content[-5] ^= 1
    (path / SHARD).write_bytes(content)


def grow(path):
    with (path / SHARD).open("ab") as file:
        file.write(b"\0")


def cut(path):
    os.truncate(path / SHARD, (path / SHARD).stat().st_size - 1)


def link(path):
    (path / SHARD).rename(path / "other")
    (path / SHARD).symlink_to("other")


def pipe(path):
    (path / "manifest.json").unlink()
    os.mkfifo(path / "manifest.json")


def manifest(text):
    return lambda path: (path / "manifest.json").write_text(text)


def changed(*keys, to):
    """The manifest with one value replaced."""

    def do(path):
        told = json.loads((path / "manifest.json").read_text())
        place = told
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = to(place[keys[-1]]) if callable(to) else to
        (path / "manifest.json").write_text(json.dumps(told))

    return do


def lies_at(file):
    def do(path):
        changed("files", to=lambda files: {file: next(iter(files.values()))})(path)
        changed("tensors", to={})(path)

    return do


CHUNK = ("tensors", "model.a", "chunks")
DAMAGE = {
    "a flipped bit": (flip, f"{SHARD} is damaged: its checksum"),
    "a byte too many": (grow, f"{SHARD} has [0-9]+ bytes instead of"),
    "a byte missing": (cut, f"{SHARD} has [0-9]+ bytes instead of"),
    "no shard": (lambda path: (path / SHARD).unlink(), f"No such file.*{SHARD}"),
    "a shard that is a link": (link, f"{SHARD} is not a regular file"),
    "no manifest": (lambda path: (path / "manifest.json").unlink(), "manifest.json is missing"),
    "a manifest that is a pipe": (pipe, "manifest.json is not a regular file"),
    "an empty folder": (
        lambda path: [file.unlink() for file in path.iterdir()],
        "manifest.json is missing",
    ),
    "no JSON": (manifest('{"format": "distaccum checkpoint", "ver'), "is not JSON"),
    "not UTF-8": (
        lambda path: (path / "manifest.json").write_bytes(b"\xff\xfe\x00"),
        "is not JSON",
    ),
    "too deep": (manifest("[" * 100_000), "is not JSON"),
    "too long a number": (manifest("1" * 10_000), "is not JSON"),
    "another JSON": (manifest("[1, 2]"), "is not the manifest of a checkpoint"),
    "a newer version": (changed("version", to=2), "has version 2; only version 1 can be read"),
    "a step that is no number": (changed("step", to="2"), "step is '2', which is not a count"),
    "a step below zero": (changed("step", to=-2), "step is -2, which is not a count"),
    "facts that are a list": (
        changed("facts", to=[]),
        r"facts is \[\], which is not a JSON object",
    ),
    "another folder": (lies_at("../step-00000001/" + SHARD), r"names the file '\.\./step-00000001"),
    "an absolute path": (lies_at("/etc/passwd"), "names the file '/etc/passwd'"),
    "a newline in a name": (lies_at(SHARD + "\n"), "names the file"),
    "no checksum": (changed("files", SHARD, to={"bytes": 3}), f"{SHARD} has no sha256"),
    "an unknown dtype": (
        changed("tensors", "model.a", "dtype", to="Tensor"),
        "the unknown dtype 'Tensor'",
    ),
    "a true shape": (
        changed("tensors", "model.a", "shape", to=[True, 3]),
        "shape of model.a is True",
    ),
    "offsets outside": (
        changed(*CHUNK, 0, "offsets", to=[1, 0]),
        r"a chunk at \[1, 0\].*outside its shape \[1000, 3\]",
    ),
    "offsets below zero": (changed(*CHUNK, 0, "offsets", to=[-1, 0]), "offsets of model.a is -1"),
    "too few dimensions": (changed(*CHUNK, 0, "offsets", to=[0]), "outside"),
    "a chunk missing": (changed(*CHUNK, to=[]), "has 3000 elements, but its chunks hold 0"),
    "a chunk twice": (changed(*CHUNK, to=lambda chunks: chunks * 2), "its chunks hold 6000"),
    "a file that is not listed": (
        changed(*CHUNK, 0, "file", to="shard-00009.safetensors"),
        "which the manifest does not list",
    ),
    "another shape": (
        changed(
            "tensors",
            "model.b",
            to=lambda t: {
                **t,
                "shape": [1, 7],
                "chunks": [{"file": SHARD, "offsets": [0, 0], "sizes": [1, 7]}],
            },
        ),
        "holds 'model.b' as I64",
    ),
    "a tensor that is not there": (
        changed("tensors", to=lambda t: {**t, "model.c": t["model.b"]}),
        "not hold 'model.c'",
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_passes_over_damage_and_leaves_it(tmp_path, what):
    damage, words = DAMAGE[what]
    save_alone(tmp_path, 1, 2)
    bad = tmp_path / "step-00000002"
    damage(bad)
    before = names(bad)

    checkpoints = Checkpoints(tmp_path, ALONE, keep=1)
    found = checkpoints.newest()

    assert found.step == 1
    assert same_bits(load_alone(found), full_of(1)) == []
    assert len(checkpoints.passed_over) == 1
    assert re.match(re.escape(str(bad)), checkpoints.passed_over[0])
    assert re.search(words, checkpoints.passed_over[0])
    with pytest.raises(CheckpointError, match=words):
        Checkpoint.open(bad, ALONE)
    opened = Checkpoint.open(tmp_path, ALONE)
    assert (opened.step, list(opened.passed_over)) == (1, checkpoints.passed_over)

    checkpoints.save(3, full_of(3), {})  # and retention leaves alone what it cannot read
    assert names(bad) == before
    assert checkpoints.newest().step == 3
    assert checkpoints.passed_over == []


def test_boxes_that_overlap_though_their_volume_is_right():
    with pytest.raises(CheckpointError, match=r"overlap, at \[0, 0\] and \[1, 0\]"):
        check_cover("w", (4, 2), [((0, 0), (2, 2)), ((1, 0), (2, 2))])
    check_cover("w", (4, 4), [((i, j), (2, 2)) for i in (0, 2) for j in (0, 2)])
    check_cover("scalar", (), [((), ())])
    check_cover("nothing", (0, 3), [])


@pytest.mark.parametrize(
    "honest", [True, False], ids=["with the right checksum", "with the old checksum"]
)
def test_a_pickle_in_a_shards_place_is_not_read(tmp_path, honest):
    marker = tmp_path / "marker"
    folder = tmp_path / "checkpoints"
    save_alone(folder, 1, 2)
    bad = folder / "step-00000002"
    torch.save({"model.a": Malice(marker)}, bad / SHARD)
    if honest:
        content = (bad / SHARD).read_bytes()
        right = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        changed("files", SHARD, to=right)(bad)
    for name in (".metadata", "model.pt", "manifest.pkl"):
        (bad / name).write_bytes(pickle.dumps(Malice(marker)))

    checkpoints = Checkpoints(folder, ALONE, keep=1)
    assert checkpoints.newest().step == 1
    assert ("is not a safetensors file" if honest else "instead of") in checkpoints.passed_over[0]
    assert not marker.exists()
    pickle.loads(pickle.dumps(Malice(marker))).close()
    assert marker.exists()  # it would have been


def test_torchs_own_checkpoint_is_refused(tmp_path):
    marker = tmp_path / "marker"
    bad = tmp_path / "step-00000001"
    bad.mkdir()
    for name in (".metadata", "__0_0.distcp"):
        (bad / name).write_bytes(pickle.dumps(Malice(marker)))
    with pytest.raises(
        CheckpointError, match=r"manifest.json is missing; \.metadata is a PyTorch pickle"
    ):
        Checkpoint.open(bad, ALONE)
    with pytest.raises(CheckpointError, match="has no good checkpoint"):
        Checkpoint.open(tmp_path, ALONE)
    assert Checkpoints(tmp_path, ALONE, keep=1).newest() is None
    assert not marker.exists()


@pytest.mark.parametrize(
    "content", [None, "step-00000009", "../../step-00000002", "\xff\n", "x" * 1000, ""]
)
def test_latest_that_leads_nowhere(tmp_path, content):
    save_alone(tmp_path, 1, 2)
    (tmp_path / "latest").unlink()
    if content is not None:
        (tmp_path / "latest").write_bytes(content.encode("latin-1"))
    checkpoints = Checkpoints(tmp_path, ALONE, keep=1)
    assert checkpoints.newest().step == 2
    gone = [f"{tmp_path / 'latest'}: names step-00000009, which does not exist"]
    assert checkpoints.passed_over == (gone if content == "step-00000009" else [])


def test_latest_may_be_set_back_by_hand(tmp_path):
    checkpoints = save_alone(tmp_path, 1, 2, 3, keep=2)
    (tmp_path / "latest").write_text("step-00000002\n")
    assert checkpoints.newest().step == 2
    # the run goes on from there: what it saves now is the newer one
    checkpoints.save(3, full_of(5), {})
    assert names(tmp_path) == ["latest", "step-00000003", "step-00000003-2"]
    flip(tmp_path / "step-00000003-2")
    assert checkpoints.newest().path.name == "step-00000003"


def test_nothing_there(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", ALONE, keep=1)
    assert checkpoints.newest() is None
    assert checkpoints.clean() == []
    for path in (tmp_path, tmp_path / "checkpoints", tmp_path / "none"):
        with pytest.raises(CheckpointError, match=r"is not a checkpoint|manifest\.json is missing"):
            Checkpoint.open(path, ALONE)


def choose(folder):
    world = World.of(CPU)
    checkpoints = Checkpoints(folder, world, keep=9)
    if not folder.exists():
        for step in (1, 2):
            checkpoints.save(step, spread(whole(step), "sharded"), {})
    found = checkpoints.newest()
    held = spread(whole(3), "sharded")
    found.load(held)
    return found.step, checkpoints.passed_over, same_bits(held, whole(found.step))


def test_what_one_rank_finds_damaged_is_passed_over_by_all(two_ranks: Ranks, tmp_path):
    folder = tmp_path / "checkpoints"
    assert two_ranks.run(choose, folder) == [(2, [], [])] * 2
    shard = folder / "step-00000002" / "shard-00001.safetensors"  # which rank 1 alone looks at
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x5a")
    expected = (
        f"{shard.parent}: rank 1: {shard.name} is damaged: its checksum is not the one in the "
        "manifest"
    )
    assert two_ranks.run(choose, folder) == [(1, [expected], [])] * 2
