"""The weights of a checkpoint for other programs, and weights of other programs for a model. One process."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from distaccum.errors import CheckpointError

from .reading import Checkpoint
from .storage import Opened, some, write_file

_MODEL = "model."  # before the names of a model's tensors in a checkpoint


def export_safetensors(checkpoint: Checkpoint, file: Path) -> None:
    """Write the model's parameters and buffers to one safetensors file, under the names of its `state_dict()`.

    One tensor at a time is in memory.

    Args:
        checkpoint: opened by one process, `Checkpoint.open(path, World.of(torch.device("cpu")))`.
        file: a new file.

    Raises:
        CheckpointError: the file is there already, or the checkpoint holds no model.
    """
    if file.exists():
        raise CheckpointError(f"{file} is there already; name another file, or remove it")
    infos = {name: info for name, info in checkpoint.tensors.items() if name.startswith(_MODEL)}
    if not infos:
        raise CheckpointError(f"{checkpoint.path} holds no tensor whose name begins with {_MODEL!r}")

    def read(name: str) -> Tensor:
        info = infos[_MODEL + name]
        tensor = torch.empty(info.shape, dtype=info.dtype)
        checkpoint.load({_MODEL + name: tensor})
        return tensor

    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(file.name + ".part")
    unfinished.unlink(missing_ok=True)
    entries = [(n.removeprefix(_MODEL), str(i.dtype).removeprefix("torch."), i.shape) for n, i in infos.items()]
    write_file(unfinished, entries, read)
    unfinished.rename(file)


def load_weights(model: nn.Module, file: Path) -> None:
    """Fill a model from a safetensors file, on one process; numbers are converted to the model's dtypes.

    Names and shapes must be those of `model.state_dict()`; of tied weights one name is enough.

    Raises:
        CheckpointError: the file is a pickle or no safetensors file, or names or shapes differ (nothing was filled).
    """
    _refuse_pickle(file)
    with Opened(file) as weights:
        wanted = _wanted(model, weights.names, str(file))
        for name, tensor in wanted.items():
            shape = list(weights.slice(name).get_shape())
            if shape != list(tensor.shape):
                raise CheckpointError(f"{file} holds {name!r} as {shape}, and the model's is {list(tensor.shape)}")
        for name, tensor in wanted.items():
            tensor.copy_(weights.whole(name))


def export_pretrained(checkpoint: Checkpoint, folder: Path, make_model: Callable[[], nn.Module]) -> None:
    """Write a folder that `from_pretrained` of Hugging Face reads.

    Args:
        checkpoint: opened by one process.
        folder: a new or empty folder.
        make_model: makes the model on the CPU, its weights whatever they are; it has `save_pretrained`.

    Raises:
        CheckpointError: the folder has files, or the checkpoint is another model's.
    """
    if folder.exists() and any(folder.iterdir()):
        raise CheckpointError(f"{folder} has files already; name another folder, or empty it")
    model = make_model()
    names = [name.removeprefix(_MODEL) for name in checkpoint.tensors if name.startswith(_MODEL)]
    wanted = _wanted(model, names, str(checkpoint.path))
    checkpoint.load({_MODEL + name: tensor for name, tensor in wanted.items()})
    save = getattr(model, "save_pretrained", None)
    if save is None:
        raise CheckpointError(f"{type(model).__name__} has no save_pretrained; write a safetensors file instead")
    save(folder)


def _wanted(model: nn.Module, names: Iterable[str], where: str) -> dict[str, Tensor]:
    """Which tensor of the model each name fills; every tensor is filled, and every name is used."""
    state = model.state_dict(keep_vars=True)
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    given = set(names)
    filled = {id(tensors[name]) for name in given & set(tensors)}  # tied weights are one object under two names
    missing = [name for name, tensor in tensors.items() if id(tensor) not in filled]
    unknown = sorted(given - set(tensors))
    if missing or unknown:
        lacks = [f"it lacks {some(missing)}"] if missing else []
        has = [f"it holds {some(unknown)}, which the model has not"] if unknown else []
        raise CheckpointError(f"{where} is not of this model ({type(model).__name__}): {'; '.join(lacks + has)}")
    return {name: tensors[name].detach() for name in sorted(given)}


def _refuse_pickle(file: Path) -> None:
    with file.open("rb") as opened:
        begin = opened.read(4)
    if file.suffix in (".bin", ".pt", ".pth", ".ckpt") or begin.startswith((b"PK", b"\x80")):
        raise CheckpointError(
            f"{file} is a pickle of torch: to read it is to run code of whoever wrote it, so it is not read. "
            "Where you trust it, write it anew with safetensors.torch.save_file."
        )
