"""Implements `distaccum export`."""

from __future__ import annotations

from pathlib import Path

import torch

from distaccum.app.config import typed
from distaccum.app.task import build_task
from distaccum.checkpoint.export import export_pretrained, export_safetensors
from distaccum.checkpoint.store import Checkpoint
from distaccum.errors import require
from distaccum.huggingface.models import HFConfig
from distaccum.parallel.world import World


def export(source: Path, target: Path) -> None:
    """Write the weights of a checkpoint for other programs.

    It runs on one process, however many ranks saved the checkpoint.

    Args:
        source: a run folder, whose newest good checkpoint is used, or a checkpoint.
        target: NAME.safetensors or, for a Hugging Face model, a folder that `from_pretrained` can
            read.

    Raises:
        ConfigError: if the source does not exist, or the model cannot be written as a folder.
        CheckpointError: if the checkpoint cannot be read, or the target already exists.
    """
    require(source.exists(), f"{source} does not exist. Give a run folder, or a checkpoint in it.")
    checkpoint = Checkpoint.open(source, World.of(torch.device("cpu")))
    if target.suffix == ".safetensors":
        export_safetensors(checkpoint, target)
    else:
        config = typed(checkpoint.facts["config"])
        require(
            isinstance(config.model, HFConfig),
            f"{target} does not end in .safetensors, so it is taken for a folder. Only Hugging "
            "Face models can be exported to a folder, and this model is "
            f"model={config.model.name}. Give a file: {target}.safetensors",
        )
        export_pretrained(checkpoint, target, build_task(config).make_model)
    print(f"Exported {checkpoint.path} (saved after step {checkpoint.step}) to {target}")
