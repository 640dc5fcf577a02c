"""Defines the arms of overhead.py that train with peers, as their documentation recommends.

An arm is built once, in a process of its own (or one per rank), and then trains on blocks of
micro-batches. All have the same model, tensors and optimizer. They differ in what they do besides
forward, backward and update, and this is what is measured.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import torch
from overhead_arms import Data, MicroBatch, Setting, Train, by_hand, ours
from torch import Tensor, nn


def accelerate(setting: Setting) -> tuple[Train, nn.Module]:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=setting.num_micro_batches)
    inner, optimizer = setting.make()
    model, optimizer = accelerator.prepare(inner, optimizer)

    def train(data: Data) -> None:
        for micro_batch in data:
            with accelerator.accumulate(model):
                accelerator.backward(setting.loss(model, micro_batch))
                if setting.clip_norm is not None and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), setting.clip_norm)
                optimizer.step()
                optimizer.zero_grad()

    return train, inner


def _lightning_ranks() -> dict[str, Any]:
    from lightning.fabric.plugins.environments import TorchElasticEnvironment

    ranks = int(os.environ["WORLD_SIZE"])
    spread = {"strategy": "ddp", "plugins": [TorchElasticEnvironment()]} if ranks > 1 else {}
    return {"accelerator": "cpu", "devices": ranks, **spread}


def fabric(setting: Setting) -> tuple[Train, nn.Module]:
    from lightning.fabric import Fabric

    launcher = Fabric(**_lightning_ranks())
    launcher.launch()
    inner, optimizer = setting.make()
    model, optimizer = launcher.setup(inner, optimizer)

    def train(data: Data) -> None:
        for micro_batch, synced in zip(data, itertools.cycle(setting.synced), strict=False):
            with launcher.no_backward_sync(model, enabled=not synced):
                launcher.backward(setting.loss(model, micro_batch) / setting.num_micro_batches)
            if synced:
                if setting.clip_norm is not None:
                    launcher.clip_gradients(model, optimizer, max_norm=setting.clip_norm)
                optimizer.step()
                optimizer.zero_grad()

    return train, inner


def lightning(setting: Setting) -> tuple[Train, nn.Module]:
    """Train with Lightning and `barebones`, which its documentation recommends for overhead."""
    import lightning

    inner, _ = setting.make()

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def training_step(self, micro_batch: MicroBatch, index: int) -> Tensor:
            return setting.loss(self.inner, micro_batch)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return setting.optimizer(self)

    module = Module()

    def train(data: Data) -> None:
        trainer = lightning.Trainer(
            **_lightning_ranks(), barebones=True, max_epochs=1,
            accumulate_grad_batches=setting.num_micro_batches, gradient_clip_val=setting.clip_norm,
            use_distributed_sampler=False,
        )  # fmt: skip
        trainer.fit(module, data)

    return train, inner


def hf_trainer(setting: Setting) -> tuple[Train, nn.Module]:
    from transformers import Trainer, TrainingArguments

    inner, optimizer = setting.make()

    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
            return {"loss": setting.loss(self.inner, (inputs, labels))}

    module = WithLoss()
    # Without a scheduler, Trainer makes one that decays.
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)

    def train(data: Data) -> None:
        arguments = TrainingArguments(
            output_dir=os.environ["OVERHEAD_FOLDER"], use_cpu=True, report_to="none",
            disable_tqdm=True, save_strategy="no", logging_strategy="no",
            max_grad_norm=setting.clip_norm or 0.0,
            gradient_accumulation_steps=setting.num_micro_batches,
            max_steps=len(data.micro_batches) // setting.num_micro_batches,
        )  # fmt: skip
        optimizers = (optimizer, constant)
        trainer = Trainer(
            model=module, args=arguments, train_dataset=data.micro_batches, optimizers=optimizers
        )
        named = _Named(data)
        trainer.get_train_dataloader = lambda: named
        trainer.train()

    return train, inner


class _Named:
    """Yields the micro-batches as mappings of names to tensors."""

    def __init__(self, data: Data) -> None:
        self._data = data

    def __len__(self) -> int:
        return len(self._data.micro_batches)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return ({"inputs": inputs, "labels": labels} for inputs, labels in self._data)


def deepspeed(setting: Setting) -> tuple[Train, nn.Module]:
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    inner, optimizer = setting.make()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": setting.num_micro_batches, "zero_optimization": {"stage": 0},
        "gradient_clipping": setting.clip_norm or 0.0,
    }  # fmt: skip
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    engine, *_ = deepspeed.initialize(model=inner, optimizer=optimizer, config=config)

    def train(data: Data) -> None:
        for micro_batch in data:
            engine.backward(setting.loss(engine, micro_batch))
            engine.step()

    return train, inner


REFERENCE = "hand loop"
Arm = Callable[[Setting], tuple[Train, nn.Module]]  # how to train, and the model inside
ARMS: dict[str, tuple[Arm, str | None]] = {  # how to build it, and the package that it needs
    REFERENCE: (by_hand, None),
    "hand loop, lists": (lambda setting: by_hand(setting, listed=True), None),
    "hand loop with loss and norm": (lambda setting: by_hand(setting, measured=True), None),
    "ours": (ours, None),
    "ours, lists": (lambda setting: ours(setting, listed=True), None),
    "ours, keyed randomness": (lambda setting: ours(setting, seed=0), None),
    "Accelerate": (accelerate, "accelerate"),
    "Lightning Fabric": (fabric, "lightning"),
    "Lightning Trainer": (lightning, "lightning"),
    "HF Trainer": (hf_trainer, "transformers"),
    "DeepSpeed": (deepspeed, "deepspeed"),
}


HEAVY = [
    "accelerate",
    "lightning",
    "lightning.fabric",
    "transformers.trainer",
    "transformers.training_args",
]


def missing(arm: str) -> str | None:
    """Return the package that an arm needs, if it is not installed on this machine."""
    package = ARMS[arm][1]
    return None if package is None or find_spec(package) is not None else package
