"""Translates transformers.TrainingArguments into options of distaccum.

It also explains which arguments are not carried over.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from enum import Enum
from typing import Any

from distaccum.errors import ConfigError


@dataclass(frozen=True)
class ConvertedArguments:
    """Holds a set of training arguments as overrides of conf/."""

    overrides: list[str] = field(default_factory=list)  # for the command line, such as accum.micro_batch_size=8
    # Reasons by argument: for each one that is not at its default and has no counterpart, or a
    # counterpart with a slightly different meaning.
    not_carried: dict[str, str] = field(default_factory=dict)

    @property
    def command(self) -> str:
        """Return the command line of the training, quoted for a shell."""
        return shlex.join(["python", "-m", "distaccum", "train", *self.overrides])


# The arguments that are carried over, with their defaults in transformers for mappings that leave
# them out.
_DEFAULTS: dict[str, Any] = {
    "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "max_grad_norm": 1.0,
    "num_train_epochs": 3.0, "max_steps": -1, "seed": 42, "data_seed": None, "full_determinism": False,
    "use_cpu": False,
    "learning_rate": 5e-5, "lr_scheduler_type": "linear", "lr_scheduler_kwargs": None, "warmup_steps": 0,
    "warmup_ratio": None, "optim": "adamw_torch", "optim_args": None, "weight_decay": 0.0, "adam_beta1": 0.9,
    "adam_beta2": 0.999, "adam_epsilon": 1e-8, "bf16": False, "fp16": False, "torch_compile": False,
    "activation_checkpointing": None, "gradient_checkpointing": None, "logging_strategy": "steps", "logging_steps": 500,
    "eval_strategy": "no", "eval_steps": None, "report_to": "none", "run_name": None, "project": "huggingface",
    "dataloader_num_workers": 0, "dataloader_pin_memory": True, "ddp_find_unused_parameters": None,
    "ddp_bucket_cap_mb": None, "ddp_static_graph": None, "ddp_timeout": 1800, "fsdp": None, "fsdp_config": None,
}  # fmt: skip

# Arguments that do not affect the training, or repeat another one.
_SILENT = {
    "output_dir", "logging_dir", "disable_tqdm", "log_level", "log_level_replica", "local_rank", "do_train", "do_eval",
    "do_predict", "accelerator_config", "torch_compile_backend", "remove_unused_columns",
    "include_num_input_tokens_seen",
}  # fmt: skip

_WHY = {
    "average_tokens_across_devices": "not needed: the loss is always divided once, by the tokens of all ranks",
    "label_smoothing_factor": "not an option here; implement it in an Objective",
    "dataloader_drop_last": "it drops a short micro-batch; here micro-batches may be uneven, and nothing is dropped. "
    "To drop a short window at the end of an epoch, set accum.last_window=drop",
    "per_device_eval_batch_size": "validation uses the micro-batch size of the training",
    "gradient_checkpointing_kwargs": "nn.checkpoint recomputes each block with use_reentrant=False, without options",
    "activation_checkpointing_kwargs": "nn.checkpoint recomputes each block with use_reentrant=False, without options",
    "torch_compile_mode": "nn.compile compiles each block with torch's default mode",
    "deepspeed": "use parallel=fsdp or parallel=hsdp",
    "auto_find_batch_size": "the micro-batch size is part of the plan: set accum.micro_batch_size",
    "ignore_data_skip": "a resumed run continues after the last sample that was used",
    "ddp_backend": "the backend is nccl on GPUs and gloo on CPUs",
    "ddp_broadcast_buffers": "DDP's own default is used",
    "use_liger_kernel": "not an option here; apply the kernels to your model",
    "train_sampling_strategy": "samples are always shuffled",
    "group_by_length": "samples are always shuffled",
    "adafactor": "the optimizers are adamw and sgd",
}


def from_training_arguments(args: Any) -> ConvertedArguments:
    """Translate training arguments, including their defaults, as far as the meaning is the same.

    Args:
        args: a transformers.TrainingArguments, or any mapping or object with its attributes.
            transformers is not imported. What a mapping leaves out has its default in transformers;
            what it contains counts as set, unless it is empty.

    Returns:
        Overrides, in an order in which groups come before their keys. Also the reason for each
        argument that was set to something other than its default and is not, or not exactly,
        carried over.

    Raises:
        ConfigError: if arguments contradict each other.
    """
    given = _plain(args)
    values = {**_DEFAULTS, **{name: given[name] for name in _DEFAULTS if name in given}}
    if values["bf16"] and values["fp16"]:
        raise ConfigError("bf16 and fp16 are both set. Set one of them to False.")
    carried = ConvertedArguments()
    for translate in (_groups, _length, _optimizer, _schedule, _intervals, _rest):
        translate(values, carried)
    defaults = _defaults_of(args)
    for name, value in given.items():
        if (
            name in _DEFAULTS
            or name in _SILENT
            or name.startswith("_")
            or value in (defaults.get(name), None, "", [], {})
        ):
            continue
        if name in _WHY or defaults.get(name, False) != value:
            carried.not_carried[name] = _WHY.get(name, "there is no counterpart here")
    return carried


def _groups(values: dict[str, Any], carried: ConvertedArguments) -> None:
    _set(carried, "precision", "bf16" if values["bf16"] else "fp16" if values["fp16"] else "fp32")
    fsdp = values["fsdp"] or ""
    if fsdp:
        words = set(fsdp.replace(",", " ").split()) if isinstance(fsdp, str) else set(_words(fsdp))
        options = values["fsdp_config"] if isinstance(values["fsdp_config"], Mapping) else {}
        _set(carried, "parallel", "hsdp" if {"hybrid_shard", "hybrid_shard_zero2"} & words else "fsdp")
        if "shard_grad_op" in words or str(options.get("reshard_after_forward", True)).lower() == "false":
            _set(carried, "parallel.reshard_after_forward", False)
        if "offload" in words or options.get("cpu_offload"):
            carried.not_carried["fsdp"] = "offloading to the CPU is not supported; the rest is carried over"
        if options:
            carried.not_carried["fsdp_config"] = (
                "only reshard_after_forward is carried over: each block is an FSDP2 group, and the rest is another"
            )
    if "wandb" in _words(values["report_to"]):
        _set(carried, "logger", "wandb")
        _set(carried, "logger.project", values["project"])
        carried.not_carried["report_to"] = (
            "wandb is carried over; it writes into the run folder unless logger.mode=online"
        )
    if values["run_name"]:
        _set(carried, "logger.run_name", values["run_name"])
    others = [name for name in _words(values["report_to"]) if name not in ("wandb", "none")]
    if others:
        carried.not_carried["report_to"] = (
            f"{', '.join(others)}: the loggers are wandb, and metrics.jsonl in every run folder"
        )


def _length(values: dict[str, Any], carried: ConvertedArguments) -> None:
    _set(carried, "accum.micro_batch_size", values["per_device_train_batch_size"])
    _set(carried, "accum.gradient_accumulation_steps", values["gradient_accumulation_steps"])
    epochs = values["num_train_epochs"]
    if values["max_steps"] > 0:
        _set(carried, "train.steps", values["max_steps"])
        _set(carried, "train.epochs", None)
    elif epochs == int(epochs):
        _set(carried, "train.steps", None)
        _set(carried, "train.epochs", int(epochs))
    else:
        carried.not_carried["num_train_epochs"] = (
            f"{epochs} is not a whole number of epochs: set train.steps to the same number of optimizer steps"
        )
    _set(carried, "train.seed", values["seed"])
    if values["data_seed"] not in (None, values["seed"]):
        carried.not_carried["data_seed"] = "weights, sample order and dropout use one seed, train.seed"


def _optimizer(values: dict[str, Any], carried: ConvertedArguments) -> None:
    name = str(values["optim"])
    if name in ("adamw_torch", "adamw_torch_fused"):
        _set(carried, "optim", "adamw")
        for key, argument in (("beta1", "adam_beta1"), ("beta2", "adam_beta2"), ("eps", "adam_epsilon")):
            _set(carried, f"optim.{key}", values[argument])
    elif name == "sgd":
        _set(carried, "optim", "sgd")
        _set(carried, "optim.momentum", 0.0)
    else:
        carried.not_carried["optim"] = f"{name}: the optimizers are adamw and sgd; da.Accumulator works with any other"
    if values["optim_args"]:
        carried.not_carried["optim_args"] = "set optim.momentum and optim.eps instead, if they are meant"
    _set(carried, "optim.lr", values["learning_rate"])
    _set(carried, "optim.clip_norm", values["max_grad_norm"] or None)
    _set(carried, "optim.weight_decay", values["weight_decay"])
    if values["weight_decay"]:
        carried.not_carried["weight_decay"] = (
            "the number is carried over; here parameters of one dimension do not decay, while transformers excludes "
            "biases and norms by name"
        )


_CURVES = {"linear": "linear", "cosine": "cosine", "constant": "constant", "constant_with_warmup": "constant",
           "cosine_with_min_lr": "cosine"}  # fmt: skip


def _schedule(values: dict[str, Any], carried: ConvertedArguments) -> None:
    name = str(values["lr_scheduler_type"])
    options = dict(values["lr_scheduler_kwargs"] or {})
    if name not in _CURVES:
        carried.not_carried["lr_scheduler_type"] = f"{name}: the curves are constant, linear, cosine and wsd"
        return
    _set(carried, "optim.schedule.name", _CURVES[name])
    _set(carried, "optim.schedule.unit", "steps")
    if _CURVES[name] != "constant":
        ratio = options.pop("min_lr_rate", None)
        lowest = options.pop("min_lr", None)
        if lowest is not None:
            ratio = lowest / values["learning_rate"]
        _set(carried, "optim.schedule.final_ratio", float(ratio or 0.0))
    if options:
        carried.not_carried["lr_scheduler_kwargs"] = (
            f"{', '.join(options)}: the curve of {name} has no such option here"
        )
    argument = "warmup_ratio" if values["warmup_ratio"] and not values["warmup_steps"] else "warmup_steps"
    warmup = values[argument] if name != "constant" else 0
    if argument == "warmup_ratio" or 0 < warmup < 1:
        if values["max_steps"] <= 0:
            carried.not_carried[argument] = (
                f"it is a fraction ({warmup}) of the steps, whose number depends on the data: set "
                "optim.schedule.warmup to a number of steps"
            )
            return
        warmup = math.ceil(warmup * values["max_steps"])
    _set(carried, "optim.schedule.warmup", int(warmup))
    if warmup:
        carried.not_carried[argument] = (
            "carried over; the first step has 1 / warmup of the peak here, 0 in transformers"
        )


def _intervals(values: dict[str, Any], carried: ConvertedArguments) -> None:
    for every, strategy, key in (
        ("logging_steps", "logging_strategy", "train.log_every_steps"),
        ("eval_steps", "eval_strategy", "train.validate_every_steps"),
    ):
        steps = values[every] if values[every] or every == "logging_steps" else values["logging_steps"]
        if values[strategy] == "steps" and steps < 1 and values["max_steps"] > 0:
            steps = math.ceil(steps * values["max_steps"])
        if values[strategy] == "steps" and steps >= 1:
            _set(carried, key, int(steps))
        elif values[strategy] == "steps":
            carried.not_carried[every] = (
                f"it is a fraction ({steps}) of the steps, whose number depends on the data: set {key}"
            )
        elif values[strategy] != _DEFAULTS[strategy]:
            carried.not_carried[strategy] = f"{values[strategy]}: the interval here is in optimizer steps, {key}"


def _rest(values: dict[str, Any], carried: ConvertedArguments) -> None:
    _set(carried, "loader.workers", values["dataloader_num_workers"])
    _set(carried, "loader.pin_memory", None if values["dataloader_pin_memory"] else False)  # null: if there is a GPU
    _set(carried, "train.timeout_s", values["ddp_timeout"])
    for argument, key in (
        ("ddp_find_unused_parameters", "parallel.find_unused_parameters"),
        ("ddp_static_graph", "parallel.static_graph"),
        ("ddp_bucket_cap_mb", "parallel.bucket_mb"),
    ):
        if values[argument] is not None:
            _set(carried, key, values[argument])
    if values["full_determinism"]:
        _set(carried, "train.deterministic", True)
    if values["use_cpu"]:
        _set(carried, "device", "cpu")
    if values["activation_checkpointing"] or values["gradient_checkpointing"]:
        _set(carried, "nn.checkpoint", True)
    if values["torch_compile"]:
        _set(carried, "nn.compile", True)
        carried.not_carried["torch_compile"] = "carried over; here each block is compiled, not the whole model"


def _plain(args: Any) -> dict[str, Any]:
    """Return arguments by name, with Enums replaced by their values."""
    if isinstance(args, Mapping):
        pairs = dict(args)
    elif is_dataclass(args):
        pairs = {f.name: getattr(args, f.name) for f in fields(args)}
    else:
        pairs = dict(vars(args))
    return {name: value.value if isinstance(value, Enum) else value for name, value in pairs.items()}


def _defaults_of(args: Any) -> dict[str, Any]:
    """Return the defaults that a dataclass of arguments declares; other objects have none."""
    known = {}
    for each in fields(args) if is_dataclass(args) else ():
        default = each.default if each.default is not MISSING else None
        known[each.name] = default.value if isinstance(default, Enum) else default
    return known


def _set(carried: ConvertedArguments, key: str, value: Any) -> None:
    """Override one key, in Hydra's grammar."""
    if isinstance(value, bool) or value is None:
        text = {True: "true", False: "false", None: "null"}[value]
    elif isinstance(value, str) and not value.replace("-", "").isalnum():
        text = "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
    else:
        text = str(value)
    carried.overrides.append(f"{key}={text}")


def _words(value: Any) -> list[str]:
    items = value if isinstance(value, list | tuple) else [value] if isinstance(value, str) else []
    return [str(item.value if isinstance(item, Enum) else item) for item in items]
