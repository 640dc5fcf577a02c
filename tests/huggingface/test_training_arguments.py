"""Training arguments in our words: a real object, a mapping, and every override composed against
conf/."""

from __future__ import annotations

import shlex
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from distaccum.app.config import config_dir, typed
from distaccum.errors import ConfigError
from distaccum.huggingface.training_arguments import ConvertedArguments, from_training_arguments


def compose(carried: ConvertedArguments) -> Any:
    """What Hydra makes of the overrides; it refuses keys that do not exist."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from omegaconf import OmegaConf

    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        composed = OmegaConf.to_container(
            hydra_compose("config", overrides=carried.overrides), resolve=False
        )
    assert isinstance(composed, dict)
    return typed({str(key): value for key, value in composed.items() if key != "hydra"})


def training_arguments(**options: Any) -> Any:
    from transformers import TrainingArguments

    return TrainingArguments(output_dir="unused", use_cpu=True, **options)


def test_defaults_are_carried_over_whole() -> None:
    carried = from_training_arguments(training_arguments())
    assert carried.not_carried == {}
    config = compose(carried)
    assert (
        config.accum.micro_batch_size,
        config.accum.gradient_accumulation_steps,
        config.train.epochs,
        config.train.steps,
    ) == (
        8,
        1,
        3,
        None,
    )
    assert (config.optim.lr, config.optim.beta1, config.optim.beta2, config.optim.eps) == (
        5e-5,
        0.9,
        0.999,
        1e-8,
    )
    assert (config.optim.weight_decay, config.optim.clip_norm, config.train.seed) == (0.0, 1.0, 42)
    schedule = config.optim.schedule
    assert (schedule.name.value, schedule.unit.value, schedule.warmup, schedule.final_ratio) == (
        "linear",
        "steps",
        0,
        0.0,
    )
    assert (config.precision.name.value, config.device.value, config.loader.workers) == (
        "fp32",
        "cpu",
        0,
    )


def test_a_real_object() -> None:
    carried = from_training_arguments(
        training_arguments(
            per_device_train_batch_size=4, gradient_accumulation_steps=16, max_steps=1000,
            learning_rate=3e-4, lr_scheduler_type="cosine_with_min_lr",
            lr_scheduler_kwargs={"min_lr": 3e-5}, warmup_steps=0.05, weight_decay=0.1,
            adam_beta2=0.95, max_grad_norm=0.0, bf16=True, activation_checkpointing=True,
            torch_compile=True, report_to=["wandb"], run_name="it's one", logging_steps=10,
            eval_strategy="steps", eval_steps=50, dataloader_num_workers=2, seed=7,
            ddp_find_unused_parameters=True, ddp_bucket_cap_mb=50, label_smoothing_factor=0.1,
            average_tokens_across_devices=False, save_steps=100, data_seed=8,
        )
    )  # fmt: skip
    config = compose(carried)
    assert (
        config.accum.micro_batch_size,
        config.accum.gradient_accumulation_steps,
        config.train.steps,
        config.train.epochs,
    ) == (
        4,
        16,
        1000,
        None,
    )
    assert (config.optim.lr, config.optim.weight_decay, config.optim.beta2) == (3e-4, 0.1, 0.95)
    assert config.optim.clip_norm is None
    schedule = config.optim.schedule
    assert (schedule.name.value, schedule.warmup) == ("cosine", 50)  # 0.05 x 1000 steps
    assert schedule.final_ratio == pytest.approx(0.1, rel=1e-15)
    assert config.precision.name.value == "bf16"
    assert (config.nn.checkpoint, config.nn.compile) == (True, True)
    assert (config.logger.name.value, config.logger.run_name) == ("wandb", "it's one")
    assert (config.train.log_every_steps, config.train.validate_every_steps, config.train.seed) == (
        10,
        50,
        7,
    )
    assert (config.parallel.find_unused_parameters, config.parallel.bucket_mb) == (True, 50)
    assert config.loader.workers == 2
    assert sorted(carried.not_carried) == [
        "average_tokens_across_devices", "data_seed", "label_smoothing_factor", "report_to",
        "save_steps", "torch_compile", "warmup_steps", "weight_decay",
    ]  # fmt: skip
    assert carried.not_carried["save_steps"] == "there is no counterpart here"
    assert shlex.split(carried.command) == [
        "python",
        "-m",
        "distaccum",
        "train",
        *carried.overrides,
    ]


def test_a_mapping_says_what_it_sets() -> None:
    carried = from_training_arguments(
        {
            "learning_rate": 1e-3,
            "optim": "sgd",
            "fsdp": "shard_grad_op offload",
            "num_train_epochs": 1.5,
            "warmup_ratio": 0.1,
            "gradient_checkpointing": True,
            "strange": 3,
            "unset": None,
        }
    )
    assert {
        "optim=sgd",
        "parallel=fsdp",
        "parallel.reshard_after_forward=false",
        "nn.checkpoint=true",
    } <= set(carried.overrides)
    assert sorted(carried.not_carried) == ["fsdp", "num_train_epochs", "strange", "warmup_ratio"]
    assert "optim.schedule.warmup" in carried.not_carried["warmup_ratio"]
    assert not any(
        override.startswith(("train.epochs", "optim.schedule.warmup"))
        for override in carried.overrides
    )
    config = compose(carried)
    assert (config.optim.name.value, config.optim.lr, config.optim.momentum) == ("sgd", 1e-3, 0.0)
    assert from_training_arguments(SimpleNamespace(learning_rate=1e-3, optim="sgd")).overrides == (
        from_training_arguments({"learning_rate": 1e-3, "optim": "sgd"}).overrides
    )


def test_groups_come_before_their_keys() -> None:
    names = [
        o.partition("=")[0]
        for o in from_training_arguments({"fsdp": "full_shard", "fp16": True}).overrides
    ]
    for group in ("parallel", "optim", "precision"):
        assert all(
            names.index(group) < i for i, name in enumerate(names) if name.startswith(f"{group}.")
        )


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"optim": "adafactor"}, "optim"),
        ({"lr_scheduler_type": "inverse_sqrt"}, "lr_scheduler_type"),
        (
            {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": 2}},
            "lr_scheduler_kwargs",
        ),
        ({"eval_strategy": "epoch"}, "eval_strategy"),
        ({"report_to": ["tensorboard"]}, "report_to"),
        ({"logging_steps": 0.1}, "logging_steps"),
        ({"fsdp": True, "fsdp_config": {"min_num_params": 100}}, "fsdp_config"),
    ],
)
def test_what_has_no_counterpart_is_told(arguments: dict[str, Any], named: str) -> None:
    carried = from_training_arguments(arguments)
    assert list(carried.not_carried) == [named]
    compose(carried)


def test_contradictions_are_refused() -> None:
    with pytest.raises(ConfigError, match="bf16 and fp16"):
        from_training_arguments({"bf16": True, "fp16": True})


def test_a_mapping_needs_no_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)  # every import of it fails
    assert "optim.lr=0.01" in from_training_arguments({"learning_rate": 0.01}).overrides
