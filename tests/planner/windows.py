"""Real windows on real tensors, counted from before the model is made; and what is predicted of
them."""

from __future__ import annotations

import functools
import gc
from dataclasses import dataclass
from typing import Any

import torch
from spread import setup, spread
from torch import Tensor, nn

import distaccum as da
from distaccum.core.objectives import Classification, autocast
from distaccum.models.gpt import GPT, GPTConfig
from distaccum.models.resnet import ResNet, ResNetConfig
from distaccum.nn.blocks import blocks_of, checkpoint_blocks
from distaccum.planner.meter import Tracker
from distaccum.planner.peak import peak
from distaccum.planner.segments import MicroBatchTrace, Update
from distaccum.planner.shapes import ModelShape, Setup, describe
from distaccum.planner.timeline import Peak
from distaccum.planner.trace import trace, update

BF16 = torch.bfloat16
TOKENS, VOCABULARY = 16, 1000


@dataclass(frozen=True)
class Case:
    """One way to train."""

    strategy: str = "single"
    sync: str = "boundary"
    precision: str = "fp32"  # bf16: autocast, or gathered so; bf16-pure: parameters too
    micro_batches: int = 2
    checkpoint: bool = False
    optimizer: str = "foreach"
    overlap: int = 1
    model: str = "gpt"
    samples: int = 4

    def __str__(self) -> str:
        parts = [
            self.strategy,
            self.sync,
            self.precision,
            f"{self.micro_batches}micro_batches",
            self.optimizer,
            self.model,
        ]
        return "-".join(
            [*parts, *["checkpoint"] * self.checkpoint, *[f"T{self.overlap}"] * (self.overlap > 1)]
        )

    def setup(self, world_size: int) -> Setup:
        sharded = self.strategy in ("fsdp", "hsdp")
        return setup(
            self.strategy,
            self.sync,
            world_size,
            compute=BF16 if sharded and self.precision == "bf16" else None,
        )

    def make_model(self) -> nn.Module:
        torch.manual_seed(3)
        if self.model == "resnet":
            model: nn.Module = ResNet(ResNetConfig("resnet", 10, 3, [32, 64, 128], 2, False))
            da.convert_batchnorm(model, "micro_batch")
        elif self.model == "llama":
            from transformers import LlamaConfig, LlamaForCausalLM

            model = LlamaForCausalLM(
                LlamaConfig(
                    vocab_size=VOCABULARY, hidden_size=128, intermediate_size=320,
                    num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                    max_position_embeddings=64,
                )
            )  # fmt: skip
        else:
            model = GPT(GPTConfig("gpt", VOCABULARY, TOKENS, 3, 4, 128, 0.1, True))
        if self.precision == "bf16-pure":
            model.to(BF16)
        if self.checkpoint:
            checkpoint_blocks(blocks_of(model))
        return model.train()

    @property
    def objective(self) -> Any:
        objective = Classification() if self.model == "resnet" else da.CausalLM(shift=False)
        if self.precision == "bf16" and self.strategy in ("single", "ddp"):
            return autocast(objective, BF16)
        return objective

    def micro_batch(self, samples: int) -> dict[str, Tensor]:
        if self.model == "resnet":
            dtype = torch.float32 if self.precision != "bf16-pure" else BF16
            return {
                "inputs": torch.zeros(samples, 3, 16, 16, dtype=dtype),
                "labels": torch.zeros(samples, dtype=torch.long),
            }
        ids = torch.arange(samples * TOKENS).reshape(samples, TOKENS) % VOCABULARY
        return {"input_ids": ids, "labels": ids}

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        trained = [p for p in model.parameters() if p.requires_grad]
        if self.optimizer == "sgd":
            return torch.optim.SGD(trained, lr=0.1, momentum=0.9, foreach=True)
        fused = self.optimizer == "fused"
        return torch.optim.AdamW(trained, fused=fused, foreach=self.optimizer == "foreach")


class Counted(Tracker):
    """Real tensors only: DTensor asks weightless ones of its own for shapes."""

    def _add(self, tensor: Tensor) -> None:
        if tensor.untyped_storage().device.type != "meta":
            super()._add(tensor)


def measured(case: Case, world_size: int) -> int:
    """The most bytes of tensors on this rank in a window after the first.

    Under FSDP2 the least of three: gloo scatters a copy of each message, and frees it on another
        thread, at times late.
    """
    gc.collect()
    with Counted() as tracker:
        model = case.make_model()
        blocks = blocks_of(model)
        wrapped = spread(model, case.setup(world_size))
        optimizer = case.make_optimizer(wrapped)
        accumulator = da.Accumulator(
            wrapped,
            optimizer,
            case.objective,
            sync=case.sync,
            overlap_micro_batches=case.overlap,
            blocks=blocks,
            clip_norm=1.0,
        )
        micro_batches = [case.micro_batch(case.samples) for _ in range(min(2, case.micro_batches))]
        window = [micro_batches[index % 2] for index in range(case.micro_batches)]
        accumulator.step(window)
        peaks = []
        for _ in range(3 if case.setup(world_size).sharded else 1):
            tracker.reset_peak()
            accumulator.step(window)
            peaks.append(tracker.peak)
        return min(peaks)


@functools.cache
def traced(
    model: str, precision: str, sharded: bool, checkpoint: bool, samples: int
) -> MicroBatchTrace:
    case = Case(
        "fsdp" if sharded else "single", precision=precision, model=model, checkpoint=checkpoint
    )
    with torch.device("meta"):
        shapes = case.make_model()
    compute = BF16 if sharded and precision == "bf16" else None

    def loss_sum(model: nn.Module, micro_batch: dict[str, Tensor]) -> Any:
        if compute is not None:
            micro_batch = {
                name: t.to(compute) if t.is_floating_point() else t
                for name, t in micro_batch.items()
            }
        return case.objective.loss_sum(model, micro_batch)

    return trace(shapes, blocks_of, loss_sum, case.micro_batch(samples), samples, compute=compute)


def predicted(case: Case, world_size: int) -> Peak:
    """The same, from shapes and two traced micro-batches of other sizes."""
    chosen = case.setup(world_size)
    with torch.device("meta"):
        shapes = case.make_model()
    shape = describe(shapes, blocks_of(shapes))
    micro_batch = MicroBatchTrace.between(
        *(
            traced(case.model, case.precision, chosen.sharded, case.checkpoint, samples)
            for samples in (2, 8)
        ),
        case.samples,
    )
    return peak(
        shape,
        chosen,
        updated(case, shape, chosen.shards),
        micro_batch,
        case.micro_batches,
        case.overlap,
    )


def updated(case: Case, shape: ModelShape, shards: int) -> Update:
    return update(case.make_optimizer, [(p.local(shards), p.dtype) for p in shape.trained])
