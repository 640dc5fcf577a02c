"""Lists the training arguments of transformers, and what becomes of each one here."""

from __future__ import annotations

from typing import Any

# The arguments that are carried over, with their defaults in transformers for mappings that leave
# them out.
DEFAULTS: dict[str, Any] = {
    "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "max_grad_norm": 1.0,
    "num_train_epochs": 3.0, "max_steps": -1, "seed": 42, "data_seed": None,
    "full_determinism": False, "use_cpu": False, "learning_rate": 5e-5,
    "lr_scheduler_type": "linear", "lr_scheduler_kwargs": None, "warmup_steps": 0,
    "warmup_ratio": None, "optim": "adamw_torch", "optim_args": None, "weight_decay": 0.0,
    "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8, "bf16": False, "fp16": False,
    "torch_compile": False, "activation_checkpointing": None, "gradient_checkpointing": None,
    "logging_strategy": "steps", "logging_steps": 500, "eval_strategy": "no", "eval_steps": None,
    "report_to": "none", "run_name": None, "project": "huggingface", "dataloader_num_workers": 0,
    "dataloader_pin_memory": True, "ddp_find_unused_parameters": None, "ddp_bucket_cap_mb": None,
    "ddp_static_graph": None, "ddp_timeout": 1800, "fsdp": None, "fsdp_config": None,
}  # fmt: skip

# Arguments whose value is carried over unchanged, if there is one.
SAME = {
    "per_device_train_batch_size": "accum.micro_batch_size",
    "gradient_accumulation_steps": "accum.gradient_accumulation_steps",
    "seed": "train.seed",
    "learning_rate": "optim.lr",
    "weight_decay": "optim.weight_decay",
    "run_name": "logger.run_name",
    "dataloader_num_workers": "loader.workers",
    "ddp_timeout": "train.timeout_s",
    "ddp_find_unused_parameters": "parallel.find_unused_parameters",
    "ddp_static_graph": "parallel.static_graph",
    "ddp_bucket_cap_mb": "parallel.bucket_mb",
}
# Switches, and what is set where they are on.
SWITCHES: dict[str, tuple[str, Any]] = {
    "bf16": ("precision", "bf16"),
    "fp16": ("precision", "fp16"),
    "full_determinism": ("train.deterministic", True),
    "use_cpu": ("device", "cpu"),
    "activation_checkpointing": ("nn.checkpoint", True),
    "gradient_checkpointing": ("nn.checkpoint", True),
    "torch_compile": ("nn.compile", True),
}
# Remarks about arguments that are set.
REMARKS = {
    "optim_args": "set optim.momentum and optim.eps instead, if they are meant",
    "weight_decay": (
        "the number is carried over; here parameters of one dimension do not decay, while "
        "transformers excludes biases and norms by name"
    ),
    "torch_compile": "carried over; here each block is compiled, not the whole model",
}
# The curves that have a counterpart.
CURVES = {
    "linear": "linear",
    "cosine": "cosine",
    "constant": "constant",
    "constant_with_warmup": "constant",
    "cosine_with_min_lr": "cosine",
}

# Arguments that do not affect the training, or repeat another one.
SILENT = {
    "output_dir", "logging_dir", "disable_tqdm", "log_level", "log_level_replica", "local_rank",
    "do_train", "do_eval", "do_predict", "accelerator_config", "torch_compile_backend",
    "remove_unused_columns", "include_num_input_tokens_seen",
}  # fmt: skip

WHY = {
    "average_tokens_across_devices": (
        "not needed: the loss is always divided once, by the tokens of all ranks"
    ),
    "label_smoothing_factor": "not an option here; implement it in an Objective",
    "dataloader_drop_last": (
        "it drops a short micro-batch; here micro-batches may be uneven, and nothing is dropped. "
        "To drop a short window at the end of an epoch, set accum.last_window=drop"
    ),
    "per_device_eval_batch_size": "validation uses the micro-batch size of the training",
    "gradient_checkpointing_kwargs": (
        "nn.checkpoint recomputes each block with use_reentrant=False, without options"
    ),
    "activation_checkpointing_kwargs": (
        "nn.checkpoint recomputes each block with use_reentrant=False, without options"
    ),
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
