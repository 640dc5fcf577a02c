"""`distaccum export`."""

from __future__ import annotations

from pathlib import Path

import torch

from distaccum.app.config import typed
from distaccum.app.task import make_problem
from distaccum.checkpoint.export import export_pretrained, export_safetensors
from distaccum.checkpoint.store import Checkpoint
from distaccum.errors import ConfigError
from distaccum.huggingface.models import HFConfig
from distaccum.parallel.world import World


def export(source: Path, target: Path) -> None:
    """Write a checkpoint's weights for other programs; on one process, whatever ranks saved it.

    Args:
        source: a run folder (its newest good checkpoint) or a checkpoint.
        target: NAME.safetensors, or for a Hugging Face model a folder that `from_pretrained` reads.

    Raises:
        ConfigError: for a target that does not fit.
        CheckpointError: for a checkpoint that cannot be read, and a target that is there already.
    """
    if not source.exists():
        raise ConfigError(f"{source} is not there. Give a run folder, or a checkpoint in it.")
    checkpoint = Checkpoint.open(source, World.of(torch.device("cpu")))
    if target.suffix == ".safetensors":
        export_safetensors(checkpoint, target)
    else:
        config = typed(checkpoint.facts["config"])
        if not isinstance(config.model, HFConfig):
            raise ConfigError(
                f"{target} is a folder, which is for Hugging Face models, and this one is model={config.model.name}. "
                f"Give a file: {target}.safetensors"
            )
        export_pretrained(checkpoint, target, make_problem(config).make_model)
    print(f"{checkpoint.path}, after step {checkpoint.step} -> {target}")
