"""FSDP2 that communicates once per window: parameters are gathered once, gradients are reduced once.

torchrun --nproc-per-node 2 examples/fsdp2.py
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

NUM_MICROS, MICRO, LENGTH, STEPS = 4, 4, 64, 12


class Block(nn.Module):
    """A residual layer that looks at each position and at one before it."""

    def __init__(self, dilation: int) -> None:
        super().__init__()
        self.dilation = dilation
        self.norm = nn.LayerNorm(64)
        self.before, self.here, self.out = nn.Linear(64, 128), nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, 64] -> [B, T, 64]."""
        y = self.norm(x)
        earlier = nn.functional.pad(y, (0, 0, self.dilation, 0))[:, : y.shape[1]]
        return x + self.out(nn.functional.gelu(self.here(y) + self.before(earlier)))


cuda = torch.cuda.is_available()
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
if cuda:
    torch.cuda.set_device(device)
dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)

torch.manual_seed(0)  # the same weights on every rank, before each keeps its shard
blocks = [Block(dilation) for dilation in (1, 2, 4)]
model = nn.Sequential(nn.Embedding(256, 64), *blocks, nn.Linear(64, 256, bias=False)).to(device)
for block in blocks:
    fully_shard(block)  # a group of its own, gathered and reduced in one piece
fully_shard(model)  # the root has what is left: embedding and head

text = torch.frombuffer(bytearray(Path(argparse.__file__).read_bytes()), dtype=torch.uint8).long()
generator = torch.Generator().manual_seed(dist.get_rank())  # each rank reads other places


def micro() -> tuple[Tensor, Tensor]:
    starts = torch.randint(0, len(text) - LENGTH, (MICRO, 1), generator=generator)
    sequences = text[starts + torch.arange(LENGTH)]
    return sequences, sequences  # CausalLM compares each position with the one before it


# After sharding, since fully_shard replaces the parameters.
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

# The ledger counts the first window's collectives, whoever issues them, and raises if they are not those that were
# forecast. `keep` trades memory for traffic: sync="boundary" gathers per micro, sync="every" reduces per micro, too.
accumulator = da.Accumulator(model, optimizer, da.CausalLM(), sync="keep", clip_norm=1.0, audit="first")
for window in da.windows((micro() for _ in range(STEPS * NUM_MICROS)), num_micros=NUM_MICROS):
    record = accumulator.step(window)
    if dist.get_rank() == 0:
        print(f"step {record.step} loss {record.loss:.4f} grad_norm {record.grad_norm:.3f} tokens {record.weight:.0f}")

if dist.get_rank() == 0:
    verdict = accumulator.verdict
    print(f"forecast {verdict.forecast}")
    print(f"counted  {verdict.counted}")
    print(f"verdict: {'they agree' if verdict.agrees else 'they differ'}")
dist.destroy_process_group()
