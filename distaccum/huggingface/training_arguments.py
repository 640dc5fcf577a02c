"""Translates transformers.TrainingArguments into options of distaccum.

It also explains which arguments are not carried over.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from typing import Any

from distaccum.errors import ConfigError
from distaccum.huggingface.argument_tables import (
    CURVES,
    DEFAULTS,
    REMARKS,
    SAME,
    SILENT,
    SWITCHES,
    WHY,
)


@dataclass(frozen=True)
class ConvertedArguments:
    """Holds a set of training arguments as overrides of conf/."""

    # for the command line, such as accum.micro_batch_size=8
    overrides: list[str] = field(default_factory=list)
    # Reasons by argument: for each one that is not at its default and has no counterpart, or a
    # counterpart with a slightly different meaning.
    not_carried: dict[str, str] = field(default_factory=dict)

    @property
    def command(self) -> str:
        """Return the command line of the training, quoted for a shell."""
        return shlex.join(["python", "-m", "distaccum", "train", *self.overrides])


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
    values = {**DEFAULTS, **{name: given[name] for name in DEFAULTS if name in given}}
    if values["bf16"] and values["fp16"]:
        raise ConfigError("bf16 and fp16 are both set. Set one of them to False.")
    overrides: dict[str, Any] = {
        "precision": "fp32",
        **{key: values[name] for name, key in SAME.items() if values[name] not in (None, "")},
        **{key: value for name, (key, value) in SWITCHES.items() if values[name]},
        "optim.clip_norm": values["max_grad_norm"] or None,
        # null: if there is a GPU
        "loader.pin_memory": (None if values["dataloader_pin_memory"] else False),
    }
    why = {name: remark for name, remark in REMARKS.items() if values[name]}
    for translate in (_sharding, _logger, _length, _optimizer, _schedule, _intervals):
        translate(values, overrides, why)
    defaults = {f.name: _plain_value(f.default) for f in fields(args)} if is_dataclass(args) else {}
    for name, value in given.items():
        known = name in DEFAULTS or name in SILENT or name.startswith("_")
        default = defaults.get(name, None if name in WHY else False)
        if not known and value not in (default, None, "", [], {}):
            why[name] = WHY.get(name, "there is no counterpart here")
    groups_first = sorted(overrides, key=lambda key: "." in key)
    return ConvertedArguments([f"{key}={_in_hydra(overrides[key])}" for key in groups_first], why)


def _sharding(values: dict[str, Any], overrides: dict[str, Any], why: dict[str, str]) -> None:
    if not values["fsdp"]:
        return
    words = set(" ".join(_words(values["fsdp"])).replace(",", " ").split())
    options = values["fsdp_config"] if isinstance(values["fsdp_config"], Mapping) else {}
    overrides["parallel"] = "hsdp" if {"hybrid_shard", "hybrid_shard_zero2"} & words else "fsdp"
    reshard = str(options.get("reshard_after_forward", True)).lower()
    if "shard_grad_op" in words or reshard == "false":
        overrides["parallel.reshard_after_forward"] = False
    if "offload" in words or options.get("cpu_offload"):
        why["fsdp"] = "offloading to the CPU is not supported; the rest is carried over"
    if options:
        why["fsdp_config"] = (
            "only reshard_after_forward is carried over: each block is an FSDP2 group, and the "
            "rest is another"
        )


def _logger(values: dict[str, Any], overrides: dict[str, Any], why: dict[str, str]) -> None:
    names = _words(values["report_to"])
    if "wandb" in names:
        overrides |= {"logger": "wandb", "logger.project": values["project"]}
        why["report_to"] = (
            "wandb is carried over; it writes into the run folder unless logger.mode=online"
        )
    others = ", ".join(name for name in names if name not in ("wandb", "none"))
    if others:
        why["report_to"] = f"{others}: the loggers are wandb, and metrics.jsonl in every run folder"


def _length(values: dict[str, Any], overrides: dict[str, Any], why: dict[str, str]) -> None:
    epochs = values["num_train_epochs"]
    if values["max_steps"] > 0:
        overrides |= {"train.steps": values["max_steps"], "train.epochs": None}
    elif epochs == int(epochs):
        overrides |= {"train.steps": None, "train.epochs": int(epochs)}
    else:
        why["num_train_epochs"] = (
            f"{epochs} is not a whole number of epochs: set train.steps to the same number of "
            "optimizer steps"
        )
    if values["data_seed"] not in (None, values["seed"]):
        why["data_seed"] = "weights, sample order and dropout use one seed, train.seed"


def _optimizer(values: dict[str, Any], overrides: dict[str, Any], why: dict[str, str]) -> None:
    name = str(values["optim"])
    if name in ("adamw_torch", "adamw_torch_fused"):
        overrides |= {
            "optim": "adamw",
            "optim.beta1": values["adam_beta1"],
            "optim.beta2": values["adam_beta2"],
            "optim.eps": values["adam_epsilon"],
        }
    elif name == "sgd":
        overrides |= {"optim": "sgd", "optim.momentum": 0.0}
    else:
        why["optim"] = (
            f"{name}: the optimizers are adamw and sgd; da.Accumulator works with any other"
        )


def _schedule(values: dict[str, Any], overrides: dict[str, Any], why: dict[str, str]) -> None:
    name = str(values["lr_scheduler_type"])
    if name not in CURVES:
        why["lr_scheduler_type"] = f"{name}: the curves are constant, linear, cosine and wsd"
        return
    overrides |= {"optim.schedule.name": CURVES[name], "optim.schedule.unit": "steps"}
    options = dict(values["lr_scheduler_kwargs"] or {})
    if CURVES[name] != "constant":
        ratio, lowest = options.pop("min_lr_rate", None), options.pop("min_lr", None)
        ratio = ratio if lowest is None else lowest / values["learning_rate"]
        overrides["optim.schedule.final_ratio"] = float(ratio or 0.0)
    if options:
        why["lr_scheduler_kwargs"] = (
            f"{', '.join(options)}: the curve of {name} has no such option here"
        )
    by_ratio = bool(values["warmup_ratio"]) and not values["warmup_steps"]
    argument = "warmup_ratio" if by_ratio else "warmup_steps"
    warmup = values[argument] if name != "constant" else 0
    if warmup:
        why[argument] = (
            "carried over; the first step has 1 / warmup of the peak here, 0 in transformers"
        )
    key, is_fraction = "optim.schedule.warmup", by_ratio or 0 < warmup < 1
    _set_steps(key, argument, warmup, is_fraction, values["max_steps"], overrides, why)


def _intervals(values: dict[str, Any], overrides: dict[str, Any], why: dict[str, str]) -> None:
    for argument, strategy, key in (
        ("logging_steps", "logging_strategy", "train.log_every_steps"),
        ("eval_steps", "eval_strategy", "train.validate_every_steps"),
    ):
        steps = values[argument] or values["logging_steps"]
        if values[strategy] == "steps":
            _set_steps(key, argument, steps, steps < 1, values["max_steps"], overrides, why)
        elif values[strategy] != DEFAULTS[strategy]:
            why[strategy] = f"{values[strategy]}: the interval here is in optimizer steps, {key}"


def _set_steps(
    key: str,
    argument: str,
    number: float,
    is_fraction: bool,
    max_steps: int,
    overrides: dict[str, Any],
    why: dict[str, str],
) -> None:
    """Carry over a number of steps, or a fraction of all steps if their number is known."""
    if is_fraction and max_steps <= 0:
        why[argument] = (
            f"it is a fraction ({number}) of the steps, whose number depends on the data: set "
            f"{key} to a number of steps"
        )
    else:
        overrides[key] = math.ceil(number * max_steps) if is_fraction else int(number)


def _plain(args: Any) -> dict[str, Any]:
    """Return arguments by name, with Enums replaced by their values."""
    if is_dataclass(args):
        pairs = {f.name: getattr(args, f.name) for f in fields(args)}
    else:
        pairs = dict(args if isinstance(args, Mapping) else vars(args))
    return {name: _plain_value(value) for name, value in pairs.items()}


def _plain_value(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else value


def _in_hydra(value: Any) -> str:
    """Write a value in the grammar of Hydra's overrides."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, str) and not value.replace("-", "").isalnum():
        return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
    return str(value)


def _words(value: Any) -> list[str]:
    items = value if isinstance(value, list | tuple) else [value] if isinstance(value, str) else []
    return [str(_plain_value(item)) for item in items]
