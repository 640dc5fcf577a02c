"""A GAN learns the points of a ring: two models, two optimizers, two accumulators that do not know of each other.

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

STEPS, MICRO, NOISE = 150, 32, 4

distributed = "WORLD_SIZE" in os.environ  # torchrun sets it
cuda = torch.cuda.is_available()
device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
if distributed:
    dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
rank, ranks = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)


def mlp(num_in: int, num_out: int) -> nn.Module:
    layers = [nn.Linear(num_in, 64), nn.LeakyReLU(0.2), nn.Linear(64, 64), nn.LeakyReLU(0.2), nn.Linear(64, num_out)]
    return nn.Sequential(*layers).to(device)


torch.manual_seed(0)  # the same weights on every rank
generator, discriminator = mlp(NOISE, 2), mlp(2, 1)

Micro = dict[str, Tensor]


def discriminator_loss(model: nn.Module, micro: Micro) -> dict[str, Tensor]:
    """Tell real points from fake ones: two terms, each with its own count."""
    with torch.no_grad():
        fake = generator(micro["noise"])  # the module itself: DDP would prepare for a backward that never comes
    return {"real": softplus(-model(micro["real"])).sum(), "fake": softplus(model(fake)).sum()}


def generator_loss(model: nn.Module, micro: Micro) -> Tensor:
    """Make points that the discriminator takes for real."""
    # Gradients flow through the discriminator to the points. Detached parameters keep them out of its own `.grad`.
    frozen = {name: parameter.detach() for name, parameter in discriminator.named_parameters()}
    return softplus(-functional_call(discriminator, frozen, (model(micro["noise"]),))).sum()


def wrapped(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model) if distributed else model


def accumulate(model: nn.Module, objective: da.Objective) -> da.Accumulator:
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3, betas=(0.5, 0.99))
    return da.Accumulator(wrapped(model), optimizer, objective)


count_both = da.Objective(discriminator_loss, lambda micro: {"real": len(micro["real"]), "fake": len(micro["noise"])})
count_fake = da.Objective(generator_loss, lambda micro: len(micro["noise"]))
train_discriminator, train_generator = accumulate(discriminator, count_both), accumulate(generator, count_fake)

random = torch.Generator().manual_seed(rank)  # each rank draws points of its own


def draw() -> Micro:
    angle = 2 * math.pi * torch.rand(MICRO, generator=random)
    radius = 2 + 0.05 * torch.randn(MICRO, generator=random)
    real = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)
    return {"real": real, "noise": torch.randn(MICRO, NOISE, generator=random)}


@torch.no_grad()
def distance_from_ring() -> float:
    noise = torch.randn(2000, NOISE, generator=torch.Generator().manual_seed(1))
    return float((generator(noise.to(device)).norm(dim=1) - 2).abs().mean())


num_micros = 4 // ranks  # the same effective batch on one rank and on two
if rank == 0:
    print(f"distance from the ring {distance_from_ring():.3f} before")
for window in da.windows((draw() for _ in range(STEPS * num_micros)), num_micros=num_micros):
    d_record = train_discriminator.step(window)
    g_record = train_generator.step(window)  # a window may be used twice: it is a list of micro-batches
    if rank == 0 and d_record.step % 50 == 0:
        losses = " ".join(f"{name} {loss:.3f}" for name, loss in d_record.losses.items())
        print(f"step {d_record.step} discriminator: {losses}; generator: {g_record.loss:.3f}")
if rank == 0:
    print(f"distance from the ring {distance_from_ring():.3f} after")
    print(f"updates: discriminator {train_discriminator.steps}, generator {train_generator.steps}")

if distributed:
    dist.destroy_process_group()
