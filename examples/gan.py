"""Trains a GAN on the points of a ring, with two models and two independent accumulators.

Run it with one of:
    python examples/gan.py
    torchrun --nproc-per-node 2 examples/gan.py
"""

from __future__ import annotations

import math
import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import softplus
from torch.nn.parallel import DistributedDataParallel

import distaccum as da

STEPS, MICRO_BATCH_SIZE, NOISE = 150, 32, 4

distributed = "WORLD_SIZE" in os.environ  # set by torchrun
cuda = torch.cuda.is_available()
local_rank = int(os.environ.get("LOCAL_RANK", "0"))
device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
if distributed:
    dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
rank, ranks = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)


def mlp(num_in: int, num_out: int) -> nn.Module:
    """Build a network of three linear layers."""
    return nn.Sequential(
        nn.Linear(num_in, 64),
        nn.LeakyReLU(0.2),
        nn.Linear(64, 64),
        nn.LeakyReLU(0.2),
        nn.Linear(64, num_out),
    ).to(device)


torch.manual_seed(0)  # the same initial weights on every rank
generator, discriminator = mlp(NOISE, 2), mlp(2, 1)

MicroBatch = dict[str, Tensor]


def discriminator_loss(model: nn.Module, micro_batch: MicroBatch) -> dict[str, Tensor]:
    """Compute the loss sums of the discriminator for real and for generated points."""
    with torch.no_grad():
        # The plain module, because DDP would prepare for a backward that never comes.
        fake = generator(micro_batch["noise"])
    real = micro_batch["real"]
    return {"real": softplus(-model(real)).sum(), "fake": softplus(model(fake)).sum()}


def discriminator_counts(micro_batch: MicroBatch) -> dict[str, int]:
    """Return the denominators: the numbers of real and of generated points."""
    return {"real": len(micro_batch["real"]), "fake": len(micro_batch["noise"])}


def generator_loss(model: nn.Module, micro_batch: MicroBatch) -> Tensor:
    """Compute the loss sum of the generator, whose points shall look real to the discriminator."""
    # The gradients flow through the discriminator to the points. Its parameters are detached, so
    # that they get no gradients.
    frozen = {name: parameter.detach() for name, parameter in discriminator.named_parameters()}
    points = model(micro_batch["noise"])
    return softplus(-functional_call(discriminator, frozen, (points,))).sum()


def make_accumulator(model: nn.Module, objective: da.Objective) -> da.Accumulator:
    """Make an accumulator with an optimizer of its own, under DDP if there are several ranks."""
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3, betas=(0.5, 0.99))
    wrapped = DistributedDataParallel(model) if distributed else model
    return da.Accumulator(wrapped, optimizer, objective)


discriminator_objective = da.Objective(discriminator_loss, discriminator_counts)
generator_objective = da.Objective(generator_loss, lambda micro_batch: len(micro_batch["noise"]))
discriminator_accumulator = make_accumulator(discriminator, discriminator_objective)
generator_accumulator = make_accumulator(generator, generator_objective)

random = torch.Generator().manual_seed(rank)  # each rank draws other points


def draw() -> MicroBatch:
    """Draw a micro-batch of real points [B, 2] on the ring and of noise [B, NOISE]."""
    angle = 2 * math.pi * torch.rand(MICRO_BATCH_SIZE, generator=random)
    radius = 2 + 0.05 * torch.randn(MICRO_BATCH_SIZE, generator=random)
    real = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)
    return {"real": real, "noise": torch.randn(MICRO_BATCH_SIZE, NOISE, generator=random)}


@torch.no_grad()
def distance_from_ring() -> float:
    """Compute the mean distance of 2000 generated points from the ring of radius 2."""
    noise = torch.randn(2000, NOISE, generator=torch.Generator().manual_seed(1))
    return float((generator(noise.to(device)).norm(dim=1) - 2).abs().mean())


accumulation_steps = 4 // ranks  # the same effective batch size on one rank and on two
micro_batches = (draw() for _ in range(STEPS * accumulation_steps))
if rank == 0:
    print(f"distance from the ring {distance_from_ring():.3f} before")
for window in da.windows(micro_batches, gradient_accumulation_steps=accumulation_steps):
    d_record = discriminator_accumulator.step(window)
    g_record = generator_accumulator.step(window)  # a window can be used more than once
    if rank == 0 and d_record.step % 50 == 0:
        losses = " ".join(f"{name} {loss:.3f}" for name, loss in d_record.losses.items())
        print(f"step {d_record.step} discriminator: {losses}; generator: {g_record.loss:.3f}")
if rank == 0:
    d_steps, g_steps = discriminator_accumulator.steps, generator_accumulator.steps
    print(f"distance from the ring {distance_from_ring():.3f} after")
    print(f"updates: discriminator {d_steps}, generator {g_steps}")

if distributed:
    dist.destroy_process_group()
