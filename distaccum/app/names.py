"""Translates configuration keys of other programs and of distaccum 0.1 to the current ones."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

# Keys of version 0.1, and their current names.
RENAMED = {
    "accum.effective_batch": "accum.effective_batch_size",
    "accum.effective_tokens": "accum.effective_batch_tokens",
    "accum.micro": "accum.micro_batch_size",
    "accum.num_micros": "accum.gradient_accumulation_steps",
    "accum.overlap_micros": "accum.overlap_micro_batches",
    "train.evaluate_every_steps": "train.validate_every_steps",
    "train.heldout_samples": "train.validation_samples",
    "data.heldout_fraction": "data.validation_fraction",
}

# Values of version 0.1, and their current names.
RENAMED_VALUES = {
    "accum.sync=keep": "accum.sync=gather_once",
    "accum.sync=shard": "accum.sync=reduce_scatter",
    "nn.batchnorm=micro": "nn.batchnorm=micro_batch",
}

# The last part of a key of another program, in any section: what to write here, and which programs
# use that name.
ELSEWHERE = {
    "accelerator": ("device", "Lightning"),
    "accumulate_grad_batches": ("accum.gradient_accumulation_steps", "Lightning"),
    "adam_beta1": ("optim.beta1", "the Hugging Face Trainer and Megatron"),
    "adam_beta2": ("optim.beta2", "the Hugging Face Trainer and Megatron"),
    "adam_epsilon": ("optim.eps", "the Hugging Face Trainer"),
    "batch_size": ("accum.micro_batch_size", "torch's DataLoader"),
    "bf16": ("precision=bf16", "the Hugging Face Trainer, DeepSpeed and Megatron"),
    "clip_grad": ("optim.clip_norm", "Megatron"),
    "data_parallel_replicate_degree": ("parallel.replicas", "torchtitan"),
    "data_parallel_shard_degree": ("parallel=fsdp", "torchtitan"),
    "dataloader_num_workers": ("loader.workers", "the Hugging Face Trainer"),
    "default_root_dir": ("run_dir", "Lightning"),
    "devices": ("launch.nproc_per_node", "Lightning"),
    "epochs": ("train.epochs", "many training scripts"),
    "eval_interval": ("train.validate_every_steps", "Megatron"),
    "eval_steps": ("train.validate_every_steps", "the Hugging Face Trainer"),
    "fp16": ("precision=fp16", "the Hugging Face Trainer, DeepSpeed and Megatron"),
    "fsdp": ("parallel=fsdp", "the Hugging Face Trainer"),
    "global_batch_size": ("accum.effective_batch_size", "Megatron and torchtitan"),
    "gradient_accumulation_steps": (
        "accum.gradient_accumulation_steps", "Accelerate, the Hugging Face Trainer and DeepSpeed",
    ),
    "gradient_checkpointing": ("nn.checkpoint", "the Hugging Face Trainer"),
    "gradient_clip_val": ("optim.clip_norm", "Lightning"),
    "gradient_clipping": ("optim.clip_norm", "DeepSpeed"),
    "hidden_size": ("model.width", "Megatron"),
    "learning_rate": ("optim.lr", "the Hugging Face Trainer"),
    "local_batch_size": ("accum.micro_batch_size", "torchtitan"),
    "log_every_n_steps": ("train.log_every_steps", "Lightning"),
    "log_freq": ("train.log_every_steps", "torchtitan"),
    "log_interval": ("train.log_every_steps", "Megatron"),
    "logging_steps": ("train.log_every_steps", "the Hugging Face Trainer"),
    "lr": ("optim.lr", "Megatron and torchtitan"),
    "lr_scheduler_type": ("optim.schedule.name", "the Hugging Face Trainer"),
    "lr_warmup_iters": ("optim.schedule.warmup", "Megatron"),
    "max_epochs": ("train.epochs", "Lightning"),
    "max_grad_norm": ("optim.clip_norm", "the Hugging Face Trainer"),
    "max_norm": ("optim.clip_norm", "torchtitan"),
    "max_steps": ("train.steps", "the Hugging Face Trainer and Lightning"),
    "max_time": ("train.max_minutes", "Lightning"),
    "micro_batch_size": ("accum.micro_batch_size", "Megatron"),
    "mixed_precision": ("precision", "Accelerate"),
    "nproc_per_node": ("launch.nproc_per_node", "torchrun"),
    "num_nodes": ("launch.nodes", "Lightning"),
    "num_train_epochs": ("train.epochs", "the Hugging Face Trainer"),
    "output_dir": ("run_dir", "the Hugging Face Trainer"),
    "per_device_train_batch_size": ("accum.micro_batch_size", "the Hugging Face Trainer"),
    "rampup_batch_size": ("accum.schedule", "Megatron"),
    "report_to": ("logger", "the Hugging Face Trainer"),
    "resume_from_checkpoint": ("resume", "the Hugging Face Trainer"),
    "save_interval": ("checkpoint.every.steps", "Megatron"),
    "save_steps": ("checkpoint.every.steps", "the Hugging Face Trainer"),
    "save_total_limit": ("checkpoint.keep", "the Hugging Face Trainer"),
    "seed": ("train.seed", "the Hugging Face Trainer and Megatron"),
    "seq_len": ("data.seq_len", "torchtitan"),
    "seq_length": ("data.seq_len", "Megatron"),
    "steps": ("train.steps", "torchtitan"),
    "strategy": ("parallel", "Lightning"),
    "sync_batchnorm": ("nn.batchnorm=sync", "Lightning"),
    "torch_compile": ("nn.compile", "the Hugging Face Trainer"),
    "train_batch_size": ("accum.effective_batch_size", "DeepSpeed"),
    "train_iters": ("train.steps", "Megatron"),
    "train_micro_batch_size_per_gpu": ("accum.micro_batch_size", "DeepSpeed"),
    "val_check_interval": ("train.validate_every_steps", "Lightning"),
    "warmup_steps": ("optim.schedule.warmup", "the Hugging Face Trainer and torchtitan"),
    "weight_decay": ("optim.weight_decay", "the Hugging Face Trainer and Megatron"),
    "zero_optimization": ("parallel=fsdp", "DeepSpeed"),
}  # fmt: skip


def key_here(key: str, value: str | None = None) -> str | None:
    """Return a sentence that translates a key of another program or of version 0.1.

    Args:
        key: the dotted key that was typed. Of another program's key only the last part matters, not
            its section.
        value: the value that was typed; None leaves it out of the sentence.

    Returns:
        The sentence, or None if the key has no translation.
    """
    if key in RENAMED:
        return f"It is now called {_written(RENAMED[key], value)}."
    here, whose = ELSEWHERE.get(key.rpartition(".")[2], ("", ""))
    return f"Write {_written(here, value)}; that name is from {whose}." if here else None


def no_key(key: str, known: Sequence[str], value: str | None = None) -> str:
    """Return what to say of a key that does not exist, with what to write instead.

    Args:
        key: the dotted key.
        known: the names that exist in its section.
        value: the value that was given; None if it is not to be repeated.
    """
    prefix = key[: key.rfind(".") + 1]
    near = difflib.get_close_matches(key.removeprefix(prefix), known, n=1)
    meant = f"Did you mean {prefix}{near[0]}?" if near else f"Known: {', '.join(known)}."
    return f"There is no key {key}. {key_here(key, value) or meant}"


def renamed(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts of a checkpoint with names of version 0.1 replaced by current ones."""
    config = {
        name: dict(part) if isinstance(part, Mapping) else part
        for name, part in facts["config"].items()
    }
    for then, now in RENAMED.items():
        section, _, name = then.partition(".")
        if isinstance(part := config.get(section), dict) and name in part:
            part[now.partition(".")[2]] = part.pop(name)
    identity = {RENAMED.get(name, name): value for name, value in facts["identity"].items()}
    progress = {
        "validation" if name == "heldout" else name: value
        for name, value in facts["progress"].items()
    }
    others = {
        "micro_batch_size" if name == "micro_size" else name: value for name, value in facts.items()
    }
    return {**others, "config": config, "identity": identity, "progress": progress}


def _written(here: str, value: str | None) -> str:
    return here if "=" in here or value is None else f"{here}={value}"
