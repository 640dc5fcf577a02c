"""The weights of a checkpoint for other programs, and other programs' weights for a model."""

from __future__ import annotations

import pickle

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from states import ALONE, CPU, names, same_bits
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from worlds import World as Ranks

from distaccum.checkpoint.export import export_pretrained, export_safetensors, load_weights
from distaccum.checkpoint.store import Checkpoint, Checkpoints
from distaccum.errors import CheckpointError
from distaccum.parallel.world import World


class Tied(nn.Module):
    """Weights of several dtypes, a buffer, and one weight under two names."""

    def __init__(self, seed=0, width=3):
        super().__init__()
        torch.manual_seed(seed)
        self.embedding, self.head = nn.Embedding(5, width), nn.Linear(width, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.half = nn.Linear(width, 2, dtype=torch.bfloat16)
        self.register_buffer("count", torch.tensor(seed))


def save_sharded(folder):
    model = Tied(seed=7)
    fully_shard(model, mesh=init_device_mesh("cpu", (torch.distributed.get_world_size(),)))
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    tensors["optim.half.bias.step"] = torch.tensor(3.0)
    Checkpoints(folder, World.of(CPU), keep=1).save(1, tensors, {})


@pytest.fixture(scope="module")
def checkpoint(two_ranks: Ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    two_ranks.run(save_sharded, folder)
    return Checkpoint.open(folder.parent, ALONE)


def test_one_file_from_the_shards_and_back_into_a_model(checkpoint, tmp_path):
    file = tmp_path / "new" / "weights.safetensors"
    export_safetensors(checkpoint, file)
    assert names(file.parent) == ["weights.safetensors"]
    assert same_bits(load_file(file), Tied(seed=7).state_dict()) == []
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    model = Tied(seed=1)
    load_weights(model, file)
    assert same_bits(model.state_dict(), Tied(seed=7).state_dict()) == []
    assert model.head.weight is model.embedding.weight
    with pytest.raises(CheckpointError, match="already exists"):
        export_safetensors(checkpoint, file)


def test_one_name_of_tied_weights_is_enough(tmp_path):
    state = {
        name: tensor.clone()
        for name, tensor in Tied(seed=7).state_dict().items()
        if name != "head.weight"
    }
    save_file(state, tmp_path / "weights.safetensors")
    model = Tied(seed=1)
    load_weights(model, tmp_path / "weights.safetensors")
    assert same_bits(model.state_dict(), Tied(seed=7).state_dict()) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda state: state.pop("half.bias"),
            r"does not fit this model \(Tied\): it lacks half\.bias\.$",
        ),
        (
            lambda state: state.update(other=torch.zeros(1)),
            r"it holds other, which the model does not have\.$",
        ),
        (
            lambda state: state.update(count=torch.zeros(2)),
            r"holds 'count' with the shape \[2\], but in the model it has \[\]",
        ),
    ],
    ids=["missing", "unknown", "shape"],
)
def test_another_models_weights_are_refused_and_nothing_is_filled(tmp_path, change, words):
    state = {name: tensor.clone() for name, tensor in Tied(seed=7).state_dict().items()}
    change(state)
    save_file(state, tmp_path / "weights.safetensors")
    model = Tied(seed=1)
    with pytest.raises(CheckpointError, match=words):
        load_weights(model, tmp_path / "weights.safetensors")
    assert same_bits(model.state_dict(), Tied(seed=1).state_dict()) == []


class Malice:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "renamed.safetensors"])
@pytest.mark.parametrize(
    "write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))]
)
def test_pickles_are_refused(tmp_path, name, write):
    write(Malice(tmp_path / "marker"), tmp_path / name)
    with pytest.raises(
        CheckpointError, match=r"is a PyTorch pickle. Reading it would run code of whoever wrote it"
    ):
        load_weights(Tied(), tmp_path / name)
    assert names(tmp_path) == [name]


def test_a_file_of_something_else(tmp_path):
    (tmp_path / "notes.txt").write_text("some words")
    with pytest.raises(CheckpointError, match="is not a safetensors file"):
        load_weights(Tied(), tmp_path / "notes.txt")


def test_from_pretrained_reads_it(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    def make_model(seed=1):
        torch.manual_seed(seed)
        return GPT2LMHeadModel(
            GPT2Config(vocab_size=11, n_positions=8, n_embd=4, n_layer=1, n_head=2)
        )

    trained = make_model(seed=7)
    tensors = {f"model.{name}": tensor for name, tensor in trained.state_dict().items()}
    Checkpoints(tmp_path / "checkpoints", ALONE, keep=1).save(1, tensors, {})
    checkpoint = Checkpoint.open(tmp_path, ALONE)
    export_pretrained(checkpoint, tmp_path / "exported", make_model)
    read = GPT2LMHeadModel.from_pretrained(tmp_path / "exported")
    assert same_bits(read.state_dict(), trained.state_dict()) == []
    with pytest.raises(CheckpointError, match="is not empty"):
        export_pretrained(checkpoint, tmp_path / "exported", make_model)
    with pytest.raises(
        CheckpointError,
        match=r"does not fit this model \(Tied\): it lacks count, .*; it holds lm_head\.weight",
    ):
        export_pretrained(checkpoint, tmp_path / "other", Tied)
