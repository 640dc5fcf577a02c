"""Trains under FSDP2 with two communications per window: one gather and one reduction.

Run it with: torchrun --nproc-per-node 2 examples/fsdp2.py
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import distaccum as da

STEPS = 12
ACCUMULATION_STEPS = 4  # micro-batches per rank and optimizer step
MICRO_BATCH_SIZE, LENGTH = 4, 64  # sequences per micro-batch, tokens per sequence


class Block(nn.Module):
    """Adds to each position a function of this position and of an earlier one."""

    def __init__(self, dilation: int) -> None:
        super().__init__()
        self.dilation = dilation
        self.norm = nn.LayerNorm(64)
        self.before, self.here = nn.Linear(64, 128), nn.Linear(64, 128)
        self.out = nn.Linear(128, 64)

    def forward(self, x: Tensor) -> Tensor:
        """Map hidden states [B, T, 64] to hidden states [B, T, 64]."""
        y = self.norm(x)
        earlier = nn.functional.pad(y, (0, 0, self.dilation, 0))[:, : y.shape[1]]
        return x + self.out(nn.functional.gelu(self.here(y) + self.before(earlier)))


cuda = torch.cuda.is_available()
local_rank = int(os.environ["LOCAL_RANK"])  # set by torchrun
device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
if cuda:
    torch.cuda.set_device(device)
dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)

torch.manual_seed(0)  # the same initial weights on every rank
blocks = [Block(dilation) for dilation in (1, 2, 4)]
embedding, head = nn.Embedding(256, 64), nn.Linear(64, 256, bias=False)
model = nn.Sequential(embedding, *blocks, head).to(device)
for block in blocks:
    fully_shard(block)  # the parameters of a block are gathered and reduced together
fully_shard(model)  # the embedding and the head

# Create the optimizer after fully_shard, which replaces the parameters.
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

text = torch.frombuffer(bytearray(Path(argparse.__file__).read_bytes()), dtype=torch.uint8).long()
generator = torch.Generator().manual_seed(dist.get_rank())  # each rank reads other sequences


def micro_batch() -> tuple[Tensor, Tensor]:
    """Draw inputs and labels, each [B, T], from the text."""
    starts = torch.randint(0, len(text) - LENGTH, (MICRO_BATCH_SIZE, 1), generator=generator)
    sequences = text[starts + torch.arange(LENGTH)]
    return sequences, sequences  # CausalLM shifts the labels by one position


# sync="gather_once" needs the memory of all gathered parameters and causes the least traffic.
# sync="boundary" gathers parameters for each micro-batch; sync="every" also reduces gradients for
# each. audit="first" counts the collectives of the first window and raises if their number or size
# differs from the forecast.
accumulator = da.Accumulator(
    model,
    optimizer,
    da.CausalLM(),
    sync="gather_once",
    clip_norm=1.0,
    audit="first",
)
micro_batches = (micro_batch() for _ in range(STEPS * ACCUMULATION_STEPS))
for window in da.windows(micro_batches, gradient_accumulation_steps=ACCUMULATION_STEPS):
    record = accumulator.step(window)
    if dist.get_rank() == 0:  # the record is the same on every rank
        line = f"step {record.step} loss {record.loss:.4f} grad_norm {record.grad_norm:.3f}"
        print(f"{line} tokens {record.denominator:.0f}")

if dist.get_rank() == 0:
    verdict = accumulator.verdict
    print(f"forecast {verdict.forecast}")
    print(f"counted  {verdict.counted}")
    print(f"verdict: {'they agree' if verdict.agrees else 'they differ'}")
dist.destroy_process_group()
