"""Trains a small GRU to predict the next byte of Python source code, in a plain training loop.

Run it with one of:
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
    """Predicts the next byte. The model knows nothing of losses, accumulation or ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, 32)
        self.gru = nn.GRU(32, 64, batch_first=True)
        self.head = nn.Linear(64, 256)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Map byte ids [B, T] to the logits [B, T, 256] of the byte that follows each of them."""
        return self.head(self.gru(self.embedding(input_ids))[0])


def lines_of_source() -> list[Tensor]:
    """Return the lines of two modules of the standard library, each as its byte ids."""
    text = b"".join(Path(module.__file__).read_bytes() for module in (argparse, json))
    lines = text.splitlines(keepends=True)
    return [torch.frombuffer(bytearray(line), dtype=torch.uint8).long() for line in lines]


def pad(lines: list[Tensor]) -> dict[str, Tensor]:
    """Make a micro-batch [B, T] of lines of different lengths.

    Labels of -100 mark padding, which does not count. So the denominator of each micro-batch is the
    number of its own tokens.
    """
    return {
        "input_ids": pad_sequence(lines, batch_first=True),
        "labels": pad_sequence(lines, batch_first=True, padding_value=-100),
    }


distributed = "WORLD_SIZE" in os.environ  # set by torchrun
cuda = torch.cuda.is_available()
local_rank = int(os.environ.get("LOCAL_RANK", "0"))
device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
if distributed:
    dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
rank, ranks = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)

torch.manual_seed(0)  # the same initial weights on every rank
model: nn.Module = NextByte().to(device)
if distributed:
    model = DistributedDataParallel(model)

# Each line belongs to one rank. No line is repeated to give all ranks the same number of lines, so
# one rank may have a micro-batch more than another.
mine = lines_of_source()[rank::ranks]
order = torch.Generator().manual_seed(rank)
loader = DataLoader(mine, batch_size=8, shuffle=True, collate_fn=pad, generator=order)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS)

objective = da.CausalLM()
accumulator = da.Accumulator(model, optimizer, objective, clip_norm=1.0, scheduler=scheduler)
accumulation_steps = 8 // ranks  # the same effective batch size on one rank and on several
for window in da.windows(loader, gradient_accumulation_steps=accumulation_steps):
    record = accumulator.step(window)
    if rank == 0:  # the record is the same on every rank
        text = f"step {record.step} loss {record.loss:.4f} grad_norm {record.grad_norm:.3f}"
        print(f"{text} tokens {record.denominator:.0f}")
    if record.step == STEPS:
        break

if distributed:
    dist.destroy_process_group()
