"""Defines the training loops that gpu.py and gpu_speed.py measure: hand-written, distaccum, peers.

All train the same GPT-2 on the same micro-batches in the same order, with the same AdamW, the same
clipping and float32 weights under bf16 autocast. Each accumulates as its documentation says and
reads the loss once per window, to show it. Only the model's forward is compiled, not the loss. If a
peer waits for the GPU in each micro-batch by default, and its documentation has an option against
it (`non_blocking`, `logging_nan_inf_filter`), the option is set.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

import distaccum as da
from distaccum.models.gpt import GPT, GPTConfig

CLIP_NORM = 1.0

MicroBatch = dict[str, Tensor]  # input_ids and labels int64 [B, T]; labels are the next tokens


@dataclass(frozen=True)
class Sizes:
    """Holds the sizes of the model and of its micro-batches."""

    layers: int
    heads: int
    width: int
    vocab: int
    length: int
    micro_batch_size: int  # samples

    def model(self) -> GPT:
        """Build the model on torch's default device, with the same weights in every process."""
        torch.manual_seed(0)
        return GPT(
            GPTConfig(
                "gpt", self.vocab, self.length, num_layers=self.layers, num_heads=self.heads,
                width=self.width, dropout=0.0, bias=True,
            )
        )  # fmt: skip

    def flops(self) -> int:
        """Count the FLOPs of forward and backward of one micro-batch, for MFU (PaLM, appendix B).

        Recomputation is not counted. torch's counter on the meta device counts 2 m n k for each
        product of matrices, and attention as two products over all positions, as if it were not
        causal. That is 6 N T + 12 layers T^2 width for a sample of T tokens, where N is the number
        of weights in all matrices, with the head and without the embedding of positions.
        """
        with torch.device("meta"):
            model = self.model()
            tokens = torch.zeros(self.micro_batch_size, self.length, dtype=torch.int64)
        # SDPBackend.MATH, because the fused kernels compute the scores again in the backward.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model(tokens).sum().backward()
        return int(counter.get_total_flops())


GPT2_124M = Sizes(layers=12, heads=12, width=768, vocab=50304, length=1024, micro_batch_size=16)
TINY = Sizes(layers=2, heads=2, width=32, vocab=256, length=32, micro_batch_size=2)


class MicroBatchSet(Sequence[MicroBatch]):
    """Holds micro-batches of random tokens on the host, pinned for a GPU, that repeat periodically.

    Small token ids are far more frequent than large ones, so that there is something to learn.
    """

    def __init__(
        self, sizes: Sizes, num_distinct: int, num_micro_batches: int, device: torch.device
    ) -> None:
        generator = torch.Generator().manual_seed(5)
        self._length = num_micro_batches
        self._distinct: list[MicroBatch] = []
        for _ in range(num_distinct):
            uniform = torch.rand(sizes.micro_batch_size, sizes.length + 1, generator=generator)
            tokens = (uniform**4 * sizes.vocab).long()
            micro_batch = {
                "input_ids": tokens[:, :-1].contiguous(),
                "labels": tokens[:, 1:].contiguous(),
            }
            pinned = device.type == "cuda"
            self._distinct.append(
                {key: part.pin_memory() if pinned else part for key, part in micro_batch.items()}
            )

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> Any:
        if index >= self._length:
            raise IndexError(index)
        return self._distinct[index % len(self._distinct)]


@dataclass(frozen=True)
class Training:
    """Holds what every arm is given."""

    model: nn.Module  # on the device, in float32
    optimizer: torch.optim.Optimizer
    device: torch.device
    micro_batches: Sequence[MicroBatch]
    num_micro_batches: int  # per window
    # Called after each update with the window's loss and its gradient norm before clipping.
    report: Callable[[float, float], None]
    backend: str | None = None  # of torch.compile; None: do not compile

    def compiled(self) -> nn.Module:
        """Return the model, compiled if there is a backend."""
        return (
            self.model if self.backend is None else torch.compile(self.model, backend=self.backend)
        )  # type: ignore[return-value]


def adamw(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """Make the optimizer of all arms."""
    return torch.optim.AdamW(
        model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )


def mean_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross entropy [] of a micro-batch, in float32."""
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


def by_hand(training: Training) -> None:
    """Train with the loop that one writes for one process and windows of equal size."""
    model, optimizer, device = training.compiled(), training.optimizer, training.device
    num_micro_batches = training.num_micro_batches
    for start in range(0, len(training.micro_batches), num_micro_batches):
        total = torch.zeros((), device=device)
        for index in range(start, start + num_micro_batches):
            micro_batch = training.micro_batches[index]
            inputs, labels = (
                micro_batch[key].to(device, non_blocking=True) for key in ("input_ids", "labels")
            )
            with torch.autocast(device.type, torch.bfloat16):
                loss = mean_loss(model(inputs), labels) / num_micro_batches
            loss.backward()
            total += loss.detach()
        norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        # one host sync per window, as distaccum
        training.report(*torch.stack([total, norm]).tolist())


def ours(training: Training) -> None:
    """Train with an Accumulator of distaccum."""
    objective = da.autocast(da.CausalLM(shift=False), torch.bfloat16)
    accumulator = da.Accumulator(
        training.compiled(), training.optimizer, objective, clip_norm=CLIP_NORM
    )
    for window in da.windows(
        training.micro_batches, gradient_accumulation_steps=training.num_micro_batches
    ):
        record = accumulator.step(window)
        training.report(record.loss, record.grad_norm)


def accelerate(training: Training) -> None:
    """Train with Accelerate: `accelerator.accumulate`, and compiled by its own option."""
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration

    accelerator = Accelerator(
        mixed_precision="bf16", cpu=training.device.type == "cpu",
        gradient_accumulation_steps=training.num_micro_batches,
        dataloader_config=DataLoaderConfiguration(non_blocking=True),
        dynamo_backend=training.backend or "no",
    )  # fmt: skip
    model, optimizer, loader = accelerator.prepare(
        training.model, training.optimizer, _loader(training)
    )
    total = torch.zeros((), device=training.device)
    norm = total
    for micro_batch in loader:
        with accelerator.accumulate(model):
            loss = mean_loss(model(micro_batch["input_ids"]), micro_batch["labels"])
            accelerator.backward(loss)
            total += loss.detach()
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(model.parameters(), CLIP_NORM)
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            training.report(*torch.stack([total / training.num_micro_batches, norm]).tolist())
            total.zero_()


def fabric(training: Training) -> None:
    """Train with Lightning Fabric: `no_backward_sync` in all micro-batches but the last."""
    from lightning.fabric import Fabric

    made = Fabric(accelerator=_kind(training), devices=1, precision="bf16-mixed")
    model, optimizer = made.setup(training.compiled(), training.optimizer)
    loader = made.setup_dataloaders(_loader(training))
    total = torch.zeros((), device=training.device)
    for index, micro_batch in enumerate(loader, 1):
        last = index % training.num_micro_batches == 0
        with made.no_backward_sync(model, enabled=not last):
            loss = (
                mean_loss(model(micro_batch["input_ids"]), micro_batch["labels"])
                / training.num_micro_batches
            )
            made.backward(loss)
        total += loss.detach()
        if last:
            norm = made.clip_gradients(
                model, optimizer, max_norm=CLIP_NORM, error_if_nonfinite=False
            )
            optimizer.step()
            optimizer.zero_grad()
            training.report(*torch.stack([total, norm]).tolist())
            total.zero_()


def lightning(training: Training) -> None:
    """Train with Lightning's Trainer, whose hook clips, since it does not for a fused AdamW."""
    from lightning.pytorch import LightningModule, Trainer

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = training.compiled()
            self.total = self.norm = torch.zeros((), device=training.device)

        def training_step(self, micro_batch: MicroBatch, _: int) -> Tensor:
            loss = mean_loss(self.model(micro_batch["input_ids"]), micro_batch["labels"])
            self.total = self.total + loss.detach()
            return loss

        def configure_gradient_clipping(self, *_: Any, **__: Any) -> None:
            self.norm = nn.utils.clip_grad_norm_(self.parameters(), CLIP_NORM)

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if (batch_idx + 1) % training.num_micro_batches == 0:
                training.report(
                    *torch.stack([self.total / training.num_micro_batches, self.norm]).tolist()
                )
                self.total = torch.zeros_like(self.total)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return training.optimizer

    with tempfile.TemporaryDirectory() as folder:
        Trainer(
            accelerator=_kind(training), devices=1, precision="bf16-mixed", max_epochs=1,
            default_root_dir=folder, accumulate_grad_batches=training.num_micro_batches,
            logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(Module(), _loader(training))  # fmt: skip


def hf_trainer(training: Training) -> None:
    """Train with the Trainer of transformers and a loss that divides by its own denominator."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class ReportLogs(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "grad_norm" in logs:
                training.report(float(logs["loss"]), float(logs["grad_norm"]))

    def share(logits: Tensor, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        return mean_loss(logits, labels) / training.num_micro_batches

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, bf16=True, use_cpu=training.device.type == "cpu",
            max_grad_norm=CLIP_NORM,
            # An item of the data set is a complete micro-batch.
            per_device_train_batch_size=1, gradient_accumulation_steps=training.num_micro_batches,
            max_steps=len(training.micro_batches) // training.num_micro_batches,
            train_sampling_strategy="sequential", remove_unused_columns=False, logging_steps=1,
            logging_nan_inf_filter=False, report_to=[], save_strategy="no", disable_tqdm=True,
            accelerator_config={"non_blocking": True},
            dataloader_pin_memory=training.device.type == "cuda",
            torch_compile=training.backend is not None, torch_compile_backend=training.backend,
        )  # fmt: skip
        Trainer(
            training.model, arguments, data_collator=_only, train_dataset=training.micro_batches,
            compute_loss_func=share,
            optimizers=(training.optimizer, torch.optim.lr_scheduler.LambdaLR(training.optimizer,
            lambda _: 1.0)), callbacks=[ReportLogs()],
        ).train()  # fmt: skip


# The arms by their names in the table, and the modules that they need.
ARMS: dict[str, Callable[[Training], None]] = {
    "by hand": by_hand,
    "distaccum": ours,
    "Accelerate": accelerate,
    "HF Trainer": hf_trainer,
    "Lightning Fabric": fabric,
    "Lightning Trainer": lightning,
}
NEEDS = {
    "Accelerate": ["accelerate"], "HF Trainer": ["transformers.trainer", "accelerate"],
    "Lightning Fabric": ["lightning.fabric"], "Lightning Trainer": ["lightning.pytorch"],
}  # fmt: skip


def missing(arm: str) -> list[str]:
    """Return the packages that an arm needs and that are not installed."""
    packages = [module.split(".")[0] for module in NEEDS.get(arm, [])]
    return [package for package in packages if find_spec(package) is None]


def _loader(training: Training) -> DataLoader[Any]:
    return DataLoader(training.micro_batches, batch_size=None)  # type: ignore[arg-type]


def _kind(training: Training) -> str:
    return "cpu" if training.device.type == "cpu" else "gpu"


def _only(items: list[MicroBatch]) -> MicroBatch:
    return items[0]
