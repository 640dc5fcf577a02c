"""A small GRU learns to predict the next byte of Python source, in a loop of your own.

python examples/plain_loop.py
torchrun --nproc-per-node 2 examples/plain_loop.py
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

import distaccum as da

STEPS = 20


class NextByte(nn.Module):
    """The model. It knows nothing of losses, accumulation or ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, 32)
        self.gru = nn.GRU(32, 64, batch_first=True)
        self.head = nn.Linear(64, 256)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Byte ids [B, T] to the logits of the byte after each, [B, T, 256]."""
        return self.head(self.gru(self.embedding(input_ids))[0])


def lines_of_source() -> list[Tensor]:
    """Real text that every machine with Python has: the lines of two modules, as bytes. Their lengths differ."""
    text = b"".join(Path(module.__file__).read_bytes() for module in (argparse, json))
    return [torch.frombuffer(bytearray(line), dtype=torch.uint8).long() for line in text.splitlines(keepends=True)]


def pad(lines: list[Tensor]) -> dict[str, Tensor]:
    """A micro-batch. Padding does not count, and so each micro has a weight of its own: its tokens."""
    return {
        "input_ids": pad_sequence(lines, batch_first=True),
        "labels": pad_sequence(lines, batch_first=True, padding_value=-100),
    }


distributed = "WORLD_SIZE" in os.environ  # torchrun sets it
cuda = torch.cuda.is_available()
device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
if distributed:
    dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
rank, ranks = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)

torch.manual_seed(0)  # the same weights on every rank
model: nn.Module = NextByte().to(device)
if distributed:
    model = DistributedDataParallel(model)

# Each line belongs to one rank. Nothing is repeated to make ranks equal: one may have a micro more than another.
mine = lines_of_source()[rank::ranks]
loader = DataLoader(mine, batch_size=8, shuffle=True, collate_fn=pad, generator=torch.Generator().manual_seed(rank))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS)

accumulator = da.Accumulator(model, optimizer, da.CausalLM(), clip_norm=1.0, scheduler=scheduler)
for window in da.windows(loader, num_micros=8 // ranks):  # the same effective batch on one rank and on several
    record = accumulator.step(window)
    if rank == 0:  # the record is the same on every rank
        print(f"step {record.step} loss {record.loss:.4f} grad_norm {record.grad_norm:.3f} tokens {record.weight:.0f}")
    if record.step == STEPS:
        break

if distributed:
    dist.destroy_process_group()
