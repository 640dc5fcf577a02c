"""Saved on 4 ranks, loaded on 1 to 4, under any sharding: the same bits."""

from __future__ import annotations

import contextlib
import gc
import json
from unittest import mock

import pytest
import torch
from states import ALONE, CPU, full_of, load_alone, same_bits, spread, whole
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from worlds import World as Ranks
from worlds import world as ranks_of

from distaccum.checkpoint.storage import LocalChunk, write_file
from distaccum.checkpoint.store import Checkpoint, Checkpoints
from distaccum.errors import CheckpointError
from distaccum.parallel.world import World

KINDS = ["plain", "sharded", "hybrid"]
SAVED_AND_LOADED = [
    ("plain", "hybrid"),
    ("sharded", "sharded"),
    ("sharded", "plain"),
    ("hybrid", "sharded"),
]


def save(folder, kind, asynchronous=False):
    checkpoints = Checkpoints(folder, World.of(CPU), keep=9, asynchronous=asynchronous)
    held = spread(whole(), kind)
    facts = {"kind": [kind]}
    checkpoints.save(3, held, facts)
    facts["kind"][0] = "changed"
    for tensor in held.values():  # what was saved is what was there when save returned
        tensor.detach().zero_()
    checkpoints.wait()
    return [(saved.path.name, saved.step) for saved in checkpoints.saved()]


def load(root):
    differ = {}
    for kind, into in SAVED_AND_LOADED:
        checkpoint = Checkpoint.open(root / kind, World.of(CPU))
        held = spread({name: torch.zeros_like(tensor) for name, tensor in whole().items()}, into)
        checkpoint.load(held)
        differ[checkpoint.facts["kind"][0], into] = same_bits(held, whole())
    return differ


def pieces_heard_of(folder):
    """Save, and count the descriptions of pieces that this rank receives, and holds as it
    writes."""
    checkpoints, received, alive = Checkpoints(folder, World.of(CPU), keep=9), [], []

    def unpickled(piece, state):
        vars(piece).update(state)
        received.append(piece.name)

    def counting(*args):
        gc.collect()
        alive.append(sum(type(thing) is LocalChunk for thing in gc.get_objects()))
        return write_file(*args)

    with (
        mock.patch.object(LocalChunk, "__setstate__", unpickled, create=True),
        mock.patch("distaccum.checkpoint.store.write_file", counting),
    ):
        checkpoints.save(3, spread(whole(), "plain"), {})
    return len(received), alive


def test_only_rank_0_hears_of_all_pieces(four_ranks: Ranks, tmp_path):
    """Rank 0 gets one list of each rank, the others none; what they write they hear of by name."""
    number = len(whole())
    first, *others = four_ranks.run(pieces_heard_of, tmp_path)
    assert first[0] == 4 * number
    assert [received for received, _ in others] == [0] * 3
    assert all(count <= 2 * number for _, alive in others for count in alive), (number, others)


@pytest.fixture(scope="module")
def saved(four_ranks: Ranks, tmp_path_factory):
    """By how it was held when it was saved."""
    root = tmp_path_factory.mktemp("saved")
    for kind in KINDS:
        assert four_ranks.run(save, root / kind, kind) == [[("step-00000003", 3)]] * 4
        four_ranks.run(save, root / f"{kind} aside", kind, True)
    return root


@pytest.fixture(params=[1, 2, 3, 4])
def ranks(request, two_ranks, four_ranks):
    """Worlds of one to four ranks; those of two and four are there already."""
    with contextlib.ExitStack() as stack:
        yield {2: two_ranks, 4: four_ranks}.get(request.param) or stack.enter_context(
            ranks_of(request.param)
        )


def test_loads_on_any_number_of_ranks(ranks: Ranks, saved):
    for differ in ranks.run(load, saved):
        assert differ == {pair: [] for pair in SAVED_AND_LOADED}


@pytest.mark.parametrize("kind", KINDS)
def test_asynchronous_writes_the_same_bytes(saved, kind):
    files = [saved / folder / "step-00000003" for folder in (kind, f"{kind} aside")]
    shards = sorted(path.name for path in files[0].glob("shard-*"))
    assert len(shards) == 4
    for name in ["manifest.json", *shards]:
        assert (files[0] / name).read_bytes() == (files[1] / name).read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_everything_is_written_once_and_shared_out(saved, kind):
    manifest = json.loads((saved / kind / "step-00000003" / "manifest.json").read_text())
    stored = sum(
        tensor.numel() * tensor.itemsize
        for tensor in load_alone(Checkpoint.open(saved / kind, ALONE)).values()
    )
    payload = [
        file["bytes"]
        - 8
        - int.from_bytes((saved / kind / "step-00000003" / name).read_bytes()[:8], "little")
        for name, file in manifest["files"].items()
    ]
    assert sum(payload) == stored
    # The largest piece has 96 bytes, and each goes to the least loaded: no rank is further ahead
    # than one piece.
    if kind == "plain":
        assert max(payload) - min(payload) <= 96


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.first, self.second = nn.Linear(5, 3), nn.Linear(3, 5, dtype=torch.float64)
        self.second.weight = nn.Parameter(self.second.weight.to(torch.float64))
        self.register_buffer("count", torch.tensor(7))


def fsdp_net(replicas):
    size = torch.distributed.get_world_size()
    shape = (size,) if replicas == 1 else (replicas, size // replicas)
    names = ("shard",) if replicas == 1 else ("replicate", "shard")
    mesh, net = init_device_mesh("cpu", shape, mesh_dim_names=names), Net()
    for module in (net.first, net.second, net):
        fully_shard(module, mesh=mesh)
    return net


def save_fsdp(folder, replicas):
    Checkpoints(folder, World.of(CPU), keep=1).save(1, fsdp_net(replicas).state_dict(), {})


def load_fsdp(folder, replicas):
    net = fsdp_net(replicas)
    state = net.state_dict()
    with torch.no_grad():
        for tensor in state.values():
            tensor.zero_()
    Checkpoint.open(folder, World.of(CPU)).load(state)
    return same_bits(dict(net.state_dict()), Net().state_dict())


@pytest.mark.parametrize("replicas", [1, 2], ids=["fsdp", "hsdp"])
def test_fsdp_modules(four_ranks: Ranks, two_ranks: Ranks, tmp_path, replicas):
    four_ranks.run(save_fsdp, tmp_path, replicas)
    assert two_ranks.run(load_fsdp, tmp_path, 1) == [[]] * 2
    assert four_ranks.run(load_fsdp, tmp_path, 3 - replicas) == [[]] * 4
    assert same_bits(load_alone(Checkpoint.open(tmp_path, ALONE)), Net().state_dict()) == []


def save_by_halves(root):
    halves = [torch.distributed.new_group([0, 1]), torch.distributed.new_group([2, 3])]
    half = torch.distributed.get_rank() // 2
    checkpoints = Checkpoints(root / str(half), World.of(CPU, halves[half]), keep=1)
    for step in (1, 2 + half):
        checkpoints.save(step, full_of(step), {})
    found = checkpoints.newest()
    into = full_of(0)
    found.load(into)
    return found.step, same_bits(into, full_of(2 + half))


def test_two_runs_beside_each_other_in_one_job(four_ranks: Ranks, tmp_path):
    assert four_ranks.run(save_by_halves, tmp_path) == [(2, []), (2, []), (3, []), (3, [])]


def disagree(folder, what):
    world = World.of(CPU)
    checkpoints = Checkpoints(folder, world, keep=1)
    tensors, facts = full_of(2), {}
    if what == "value":
        tensors["plain"] = 3
    if what == "facts":
        facts = {"a": {"b": (1, 2)}}
    if what == "dtype" and world.rank == 1:
        tensors["model.a"] = tensors["model.a"].double()
    if what == "sparse":
        tensors["model.a"] = tensors["model.a"].to_sparse()
    if what == "late shape":
        checkpoints.save(1, tensors, facts)
        into = {"model.a": torch.zeros(1000 + world.rank, 3)}
        with pytest.raises(CheckpointError) as error:
            Checkpoint.open(folder, world).load(into)
        return str(error.value)
    if what == "load dtype":
        checkpoints.save(1, tensors, facts)
        with pytest.raises(CheckpointError) as error:
            Checkpoint.open(folder, world).load({"model.b": torch.zeros(7)})
        return str(error.value)
    if what == "load name":
        checkpoints.save(1, tensors, facts)
        with pytest.raises(CheckpointError) as error:
            Checkpoint.open(folder, world).load(
                {"model.a": torch.zeros(1000, 3), "model.c": torch.zeros(7)}
            )
        return str(error.value)
    with pytest.raises(CheckpointError) as error:
        checkpoints.save(2, tensors, facts)
    assert world.rank != 0 or not any(folder.glob("step-*"))
    checkpoints.save(3, full_of(3), {})
    return str(error.value)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("value", ["'plain' is of type int", "facts"]),
        ("facts", ["rank 0", "facts.a.b is of type tuple"]),
        ("dtype", ["'model.a'", "float64", "float32", "rank 1"]),
        ("sparse", ["'model.a'", "sparse"]),
        ("late shape", ["rank 1", "'model.a'", "[1000, 3]", "[1001, 3]"]),
        ("load dtype", ["'model.b'", "int64", "float32"]),
        ("load name", ["'model.c'", "model.a, model.b"]),
    ],
)
def test_refused_on_all_ranks_alike(two_ranks: Ranks, tmp_path, what, words):
    told = two_ranks.run(disagree, tmp_path / "checkpoints", what)
    assert told[0] == told[1]
    for word in words:
        assert word in told[0]
