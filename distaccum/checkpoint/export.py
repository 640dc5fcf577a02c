"""Exports weights from a checkpoint to other programs, and loads theirs, on one process."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from distaccum.errors import CheckpointError

from .reading import Checkpoint, opened
from .storage import some, write_file

_MODEL = "model."  # prefix of the names of a model's tensors in a checkpoint


def export_safetensors(checkpoint: Checkpoint, file: Path) -> None:
    """Write the model's parameters and buffers to one safetensors file.

    The names are those of the model's `state_dict()`. Only one tensor at a time is in memory.

    Args:
        checkpoint: a checkpoint that one process has opened: `Checkpoint.open(path,
            World.of(torch.device("cpu")))`.
        file: the file to write, which must not exist.

    Raises:
        CheckpointError: if the file already exists, or the checkpoint holds no model.
    """
    if file.exists():
        raise CheckpointError(f"{file} already exists. Give another file, or remove it.")
    saved = checkpoint.tensors
    weights = {n.removeprefix(_MODEL): saved[n] for n in saved if n.startswith(_MODEL)}
    if not weights:
        raise CheckpointError(
            f"{checkpoint.path} holds no model: no tensor has a name that begins with {_MODEL!r}."
        )

    def read(name: str) -> Tensor:
        tensor = torch.empty_like(weights[name], device="cpu")
        checkpoint.load({_MODEL + name: tensor})
        return tensor

    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(file.name + ".part")
    write_file(unfinished, weights, read)
    unfinished.rename(file)


def load_weights(model: nn.Module, file: Path) -> None:
    """Fill a model from a safetensors file on one process.

    Values are converted to the model's dtypes. Names and shapes must be those of
    `model.state_dict()`; for tied weights one of the names is enough.

    Raises:
        CheckpointError: if the file is a pickle or not a safetensors file, or if names or shapes
            differ. Nothing was filled then.
    """
    _refuse_pickle(file)
    with opened(file) as weights:
        wanted = _wanted(model, weights.keys(), str(file))
        for name, tensor in wanted.items():
            shape = list(weights.get_slice(name).get_shape())
            if shape != list(tensor.shape):
                raise CheckpointError(
                    f"{file} holds {name!r} with the shape {shape}, but in the model it has "
                    f"{list(tensor.shape)}."
                )
        for name, tensor in wanted.items():
            tensor.copy_(weights.get_tensor(name))


def export_pretrained(
    checkpoint: Checkpoint, folder: Path, make_model: Callable[[], nn.Module]
) -> None:
    """Write a folder that `from_pretrained` of Hugging Face can read.

    Args:
        checkpoint: a checkpoint that one process has opened.
        folder: a new or empty folder.
        make_model: makes the model on the CPU, with any weights; the model must have
            `save_pretrained`.

    Raises:
        CheckpointError: if the folder is not empty, or the checkpoint belongs to another model.
    """
    if folder.exists() and any(folder.iterdir()):
        raise CheckpointError(f"{folder} is not empty. Give another folder, or empty it.")
    model = make_model()
    names = [name.removeprefix(_MODEL) for name in checkpoint.tensors if name.startswith(_MODEL)]
    wanted = _wanted(model, names, str(checkpoint.path))
    checkpoint.load({_MODEL + name: tensor for name, tensor in wanted.items()})
    save = getattr(model, "save_pretrained", None)
    if save is None:
        raise CheckpointError(
            f"{type(model).__name__} has no method save_pretrained. Export to a safetensors file "
            "instead."
        )
    save(folder)


def _wanted(model: nn.Module, names: Iterable[str], where: str) -> dict[str, Tensor]:
    """Return the tensor of the model that each name fills.

    Raises:
        CheckpointError: if a tensor of the model would not be filled, or the model has no tensor of
            a name.
    """
    state = model.state_dict(keep_vars=True)
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    given = set(names)
    # tied weights are one object under two names
    filled = {id(tensors[name]) for name in given & set(tensors)}
    missing = [name for name, tensor in tensors.items() if id(tensor) not in filled]
    unknown = sorted(given - set(tensors))
    if missing or unknown:
        lacks = [f"it lacks {some(missing)}"] if missing else []
        has = [f"it holds {some(unknown)}, which the model does not have"] if unknown else []
        raise CheckpointError(
            f"{where} does not fit this model ({type(model).__name__}): {'; '.join(lacks + has)}."
        )
    return {name: tensors[name].detach() for name in sorted(given)}


def _refuse_pickle(file: Path) -> None:
    with file.open("rb") as opened:
        begin = opened.read(4)
    if file.suffix in (".bin", ".pt", ".pth", ".ckpt") or begin.startswith((b"PK", b"\x80")):
        raise CheckpointError(
            f"{file} is a PyTorch pickle. Reading it would run code of whoever wrote it, so it is "
            "refused. If you trust it, load it yourself and write it with "
            "safetensors.torch.save_file."
        )
