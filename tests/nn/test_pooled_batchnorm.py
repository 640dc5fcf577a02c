"""BatchNorm's running statistics do not depend on the number of ranks, also where it changes during
a training."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from worlds import World

import distaccum as da
from distaccum.data.images import ImageDataset, ImagesConfig, ImageSource, load_images
from distaccum.data.loader import Loader
from distaccum.models.resnet import ResNet, ResNetConfig

WINDOWS = 3  # on each number of ranks
SMALL = ResNetConfig(
    "resnet", num_classes=10, in_channels=1, widths=[4, 8], blocks_per_stage=1, large_stem=False
)
State = dict[str, Tensor]


def continue_training(
    images: ImageDataset,
    state: State | None,
    optimizer_state: Any,
    step: int,
    start: int,
    windows: int,
) -> Any:
    """Three more windows of 26 digits in micro-batches of 4, on however many ranks there are, in
    float64."""
    import torch.distributed as dist

    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(1)
    model = da.convert_batchnorm(ResNet(SMALL).double(), da.BatchNormMode.pooled)
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.05, momentum=0.9)
    if state is not None:
        model.load_state_dict(state)
        # what arrives is memory that all ranks share
        optimizer.load_state_dict(copy.deepcopy(optimizer_state))
    objective = da.Objective(
        lambda m, micro_batch: torch.nn.functional.cross_entropy(
            m(micro_batch["inputs"].double()), micro_batch["labels"], reduction="sum"
        ),
        lambda micro_batch: len(micro_batch["labels"]),
    )
    accumulator = da.Accumulator(wrapped, optimizer, objective, seed=0, audit="always")
    plan = da.Plan(num_samples=len(images), effective_batch_size=26, micro_batch_size=4)
    for window, micro_batches in Loader(images, plan, rank, size).windows(
        step, start, step + windows
    ):
        accumulator.step(micro_batches)
        start = window.next_start
    return model.state_dict(), optimizer.state_dict(), start


def test_two_then_one_then_four_ranks(one_rank: World, two_ranks: World, four_ranks: World) -> None:
    # 7 micro-batches a window: on 2 and 4 ranks some rank has one less, and pads.
    images, _ = load_images(ImagesConfig("images", ImageSource.digits, None, None, True, 0.2))
    state, optimizer, start = two_ranks.run(continue_training, images, None, None, 0, 0, WINDOWS)[0]
    state, optimizer, start = one_rank.run(
        continue_training, images, state, optimizer, WINDOWS, start, WINDOWS
    )[0]
    moved = four_ranks.run(continue_training, images, state, optimizer, 2 * WINDOWS, start, WINDOWS)
    stayed, _, _ = one_rank.run(continue_training, images, None, None, 0, 0, 3 * WINDOWS)[0]
    running = [name for name in stayed if "running" in name]
    assert len(running) == 2 * 6  # six layers of BatchNorm
    for other, _, _ in moved:
        for name in running:
            error = float((other[name] - stayed[name]).abs().max() / stayed[name].abs().max())
            assert error <= 1e-12, (name, error)
        assert all(
            int(other[name]) == 3 * WINDOWS
            for name in stayed
            if name.endswith("num_batches_tracked")
        )
