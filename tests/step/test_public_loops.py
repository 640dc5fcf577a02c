"""Loops as they are written in public, moved over: each is the same loop by hand on one process
over the big batch.

Float64 and sums of fewer than 1,000 numbers of order 1: two orders of addition differ by less than
1e-12. What goes wrong elsewhere (an evaluation that shifts the data, a mean of means, statistics of
one micro-batch, a schedule that moves once a rank) is off by 1e-3 and more.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset
from worlds import World

import distaccum as da

NEAR = {"rtol": 1e-12, "atol": 1e-14}
RANKS = 2


def flat(model: nn.Module) -> list[float]:
    """All parameters and buffers as numbers."""
    return torch.cat(
        [value.detach().double().flatten() for value in model.state_dict().values()]
    ).tolist()


def near(found: Any, expected: Any) -> None:
    torch.testing.assert_close(
        torch.tensor(found, dtype=torch.float64),
        torch.tensor(expected, dtype=torch.float64),
        **NEAR,
    )


def falling(step: int) -> float:
    return 1 / (1 + step)


def update(
    model: nn.Module, loss: Tensor, optimizer: torch.optim.Optimizer, clip_norm: float | None = None
) -> None:
    """One update of the loop by hand."""
    optimizer.zero_grad()
    loss.backward()
    if clip_norm is not None:
        nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    optimizer.step()


# --- nanoGPT: training and evaluation draw from one generator; the first rank alone evaluates.

BLOCK, BATCH, ACCUMULATION, MAX_ITERS, EVAL_ITERS = 6, 3, 4, 5, 2


def characters() -> dict[str, Tensor]:
    """Two texts of 11 different characters."""
    text = torch.randint(0, 11, (400,), generator=torch.Generator().manual_seed(4))
    return {"train": text[:300], "val": text[300:]}


def get_batch(split: str, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Random crops; from torch's own generator where there is no other."""
    data = characters()[split]
    starts = torch.randint(len(data) - BLOCK, (BATCH,), generator=generator)
    x = torch.stack([data[i : i + BLOCK] for i in starts.tolist()])
    y = torch.stack([data[i + 1 : i + 1 + BLOCK] for i in starts.tolist()])
    return x, y


def make_language_model() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Embedding(11, 8), nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 11)
    ).double()


@torch.no_grad()
def estimate_loss(model: nn.Module, generator: torch.Generator | None = None) -> list[float]:
    model.eval()
    found = []
    for split in ("train", "val"):
        losses = torch.zeros(EVAL_ITERS, dtype=torch.float64)
        for k in range(EVAL_ITERS):
            x, y = get_batch(split, generator)
            losses[k] = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        found.append(float(losses.mean()))
    model.train()
    return found


def nano_gpt(seed: int | None) -> tuple[list[float], list[float], list[float]]:
    """Parameters, training losses and the first rank's estimates."""
    rank = dist.get_rank()
    raw = make_language_model()
    model = DistributedDataParallel(raw)
    torch.manual_seed(1337 + rank)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    scheduler = LambdaLR(optimizer, falling)

    def micro_batches() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield get_batch("train")

    objective = da.CausalLM(shift=False)
    accumulator = da.Accumulator(
        model, optimizer, objective, clip_norm=0.5, scheduler=scheduler, seed=seed
    )
    losses, estimates = [], []
    for window in da.windows(micro_batches(), ACCUMULATION):
        record = accumulator.step(window)
        losses.append(record.loss)
        if record.step % 2 == 0 and rank == 0:
            estimates += estimate_loss(raw)
        if record.step == MAX_ITERS:
            break
    return flat(raw), losses, estimates


def nano_gpt_by_hand() -> tuple[list[float], list[float], list[float]]:
    model = make_language_model()
    generators = [torch.Generator().manual_seed(1337 + rank) for rank in range(RANKS)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    scheduler = LambdaLR(optimizer, falling)
    losses, estimates = [], []
    for step in range(1, MAX_ITERS + 1):
        batch = [
            get_batch("train", generator) for generator in generators for _ in range(ACCUMULATION)
        ]
        x, y = (torch.cat(part) for part in zip(*batch, strict=True))
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        update(model, loss, optimizer, clip_norm=0.5)
        scheduler.step()
        losses.append(loss.item())
        if step % 2 == 0:
            estimates += estimate_loss(model, generators[0])
    return flat(model), losses, estimates


@pytest.mark.parametrize("seed", [None, 3])
def test_nano_gpt(two_ranks: World, seed: int | None) -> None:
    parameters, losses, estimates = nano_gpt_by_hand()
    for rank, found in enumerate(two_ranks.run(nano_gpt, seed)):
        near(found[0], parameters)
        near(found[1], losses)
        if rank == 0:
            near(found[2], estimates)


# --- Accelerate and Lightning Fabric: what their `prepare` and `setup` return is handed over as it
# is.

SAMPLES, MICRO_BATCH_SIZE = 24, 2  # 6 micro-batches a rank: windows of 4 and of 2


def samples() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(6)
    return tuple(torch.randn(SAMPLES, n, generator=generator, dtype=torch.float64) for n in (4, 3))  # type: ignore[return-value]


def make_regression() -> nn.Module:
    torch.manual_seed(8)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def one_batch_of(
    windows: list[slice], *, schedule: bool, clip_norm: float
) -> tuple[list[float], list[float]]:
    """The same by hand: each window is one batch, and the schedule moves once an update."""
    model, (x, y) = make_regression(), samples()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = LambdaLR(optimizer, falling)
    losses = []
    for part in windows:
        loss = F.mse_loss(model(x[part]), y[part])
        update(model, loss, optimizer, clip_norm)
        losses.append(loss.item())
        if schedule:
            scheduler.step()
    return flat(model), losses


@contextmanager
def launched_by_torchrun() -> Iterator[None]:
    """The environment in which a launcher starts its ranks; warnings of other people's packages are
    theirs."""
    found = {
        "RANK": dist.get_rank(),
        "LOCAL_RANK": dist.get_rank(),
        "WORLD_SIZE": dist.get_world_size(),
    }
    found |= {
        "LOCAL_WORLD_SIZE": dist.get_world_size(),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": 29500,
    }
    found |= {"TORCHELASTIC_RUN_ID": "tests", "GROUP_RANK": 0, "NODE_RANK": 0}
    before = dict(os.environ)
    os.environ.update({name: str(value) for name, value in found.items()})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def accelerate(prepares_scheduler: bool) -> tuple[list[float], list[float]] | str:
    """Two epochs; parameters and losses, or why it was refused."""
    with launched_by_torchrun():
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState

        try:
            accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
            raw = make_regression()
            optimizer = torch.optim.AdamW(raw.parameters(), lr=1e-2)
            scheduler = LambdaLR(optimizer, falling)
            loader = DataLoader(TensorDataset(*samples()), batch_size=MICRO_BATCH_SIZE)
            model, optimizer, loader = accelerator.prepare(raw, optimizer, loader)
            if prepares_scheduler:
                scheduler = accelerator.prepare(scheduler)
            accumulator = da.Accumulator(
                model, optimizer, da.Regression(), clip_norm=0.5, scheduler=scheduler
            )
            losses = []
            for _ in range(2):
                for window in da.windows(loader, accelerator.gradient_accumulation_steps):
                    losses.append(accumulator.step(window).loss)
            return flat(raw), losses
        except da.ConfigError as error:
            return str(error)
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)


def test_accelerate(two_ranks: World) -> None:
    parameters, losses = one_batch_of(
        [slice(0, 16), slice(16, 24)] * 2, schedule=True, clip_norm=0.5
    )
    for found in two_ranks.run(accelerate, False):
        assert not isinstance(found, str), found
        near(found[0], parameters)
        near(found[1], losses)


def test_accelerate_with_its_scheduler_is_exact_or_refused(two_ranks: World) -> None:
    """A prepared scheduler moves once for each rank: refused, or moved once an update."""
    parameters, losses = one_batch_of(
        [slice(0, 16), slice(16, 24)] * 2, schedule=True, clip_norm=0.5
    )
    for found in two_ranks.run(accelerate, True):
        if isinstance(found, str):
            assert "scheduler" in found
        else:
            near(found[0], parameters)
            near(found[1], losses)


def fabric(prepares_optimizer: bool) -> tuple[list[float], list[float]] | str:
    """Two epochs; parameters and losses, or why it was refused."""
    with launched_by_torchrun():
        from lightning.fabric import Fabric

        launcher = Fabric(accelerator="cpu", devices=dist.get_world_size(), strategy="ddp")
        launcher.launch()
        raw = make_regression()
        optimizer: Any = torch.optim.AdamW(raw.parameters(), lr=1e-2)
        scheduler = LambdaLR(optimizer, falling)
        if prepares_optimizer:
            model, optimizer = launcher.setup(raw, optimizer)
        else:
            model = launcher.setup_module(raw)
        loader = launcher.setup_dataloaders(
            DataLoader(TensorDataset(*samples()), batch_size=MICRO_BATCH_SIZE)
        )
        try:
            accumulator = da.Accumulator(
                model, optimizer, da.Regression(), clip_norm=0.5, scheduler=scheduler
            )
        except da.ConfigError as error:
            return str(error)
        losses = []
        for _ in range(2):
            for window in da.windows(loader, 4):
                losses.append(accumulator.step(window).loss)
        return flat(raw), losses


@pytest.mark.parametrize("prepares_optimizer", [True, False])
def test_fabric(two_ranks: World, prepares_optimizer: bool) -> None:
    pytest.importorskip("lightning")
    parameters, losses = one_batch_of(
        [slice(0, 16), slice(16, 24)] * 2, schedule=True, clip_norm=0.5
    )
    for found in two_ranks.run(fabric, prepares_optimizer):
        assert not isinstance(found, str), found
        near(found[0], parameters)
        near(found[1], losses)


# --- timm: BatchNorm, and an average of the weights that moves after each update.

IMAGES, DECAY, EPOCHS = 22, 0.9, 2


def pictures() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(9)
    images = torch.randn(IMAGES, 2, 5, 5, generator=generator, dtype=torch.float64)
    return images, torch.randint(0, 4, (IMAGES,), generator=generator)


def make_classifier() -> nn.Sequential:
    torch.manual_seed(3)
    layers = [nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 4)]
    return nn.Sequential(*layers).double()


def timm(mode: Any) -> tuple[list[float], list[float], list[float]] | str:
    """The model, its average and the losses, or why it was refused. Rank 1 has one micro-batch less
    than rank 0."""
    rank = dist.get_rank()
    try:
        raw = da.convert_batchnorm(make_classifier(), mode)
    except da.ConfigError as error:
        return str(error)
    model = DistributedDataParallel(raw)
    ema = AveragedModel(raw, multi_avg_fn=get_ema_multi_avg_fn(DECAY), use_buffers=True)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3
    )
    images, labels = pictures()
    mine = slice(0, 12) if rank == 0 else slice(12, IMAGES)
    loader = DataLoader(TensorDataset(images[mine], labels[mine]), batch_size=2)
    accumulator = da.Accumulator(model, optimizer, da.Classification(), clip_norm=1.0)
    losses = []
    for _ in range(EPOCHS):
        model.train()
        for window in da.windows(loader, 3):
            losses.append(accumulator.step(window).loss)
            ema.update_parameters(raw)
        ema.module.eval()
        with torch.no_grad():
            ema.module(images)
    return flat(raw), flat(ema.module), losses


def timm_by_hand() -> tuple[list[float], list[float], list[float]]:
    """Each micro-batch is normalised by itself; running statistics and the update are those of the
    whole window."""
    model = make_classifier()
    conv, norm, _, _, head = model
    ema = copy.deepcopy(model)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3
    )
    images, labels = pictures()
    losses, updates = [], 0
    for _ in range(EPOCHS):
        for parts in ([slice(0, 6), slice(12, 18)], [slice(6, 12), slice(18, IMAGES)]):
            window = [
                range(IMAGES)[part][i : i + 2]
                for part in parts
                for i in range(0, part.stop - part.start, 2)
            ]
            features = [conv(images[list(micro_batch)]) for micro_batch in window]
            total = torch.zeros((), dtype=torch.float64)
            for micro_batch, x in zip(window, features, strict=True):
                y = F.relu(
                    F.batch_norm(x, None, None, norm.weight, norm.bias, training=True)
                ).flatten(1)
                total = total + F.cross_entropy(head(y), labels[list(micro_batch)], reduction="sum")
            loss = total / sum(map(len, window))
            update(model, loss, optimizer, clip_norm=1.0)
            losses.append(loss.item())
            with torch.no_grad():
                everything = torch.cat(features).transpose(0, 1).flatten(1)
                norm.running_mean.lerp_(everything.mean(1), norm.momentum)
                norm.running_var.lerp_(everything.var(1), norm.momentum)
                norm.num_batches_tracked += 1
                for average, value in zip(
                    ema.state_dict().values(), model.state_dict().values(), strict=True
                ):
                    if updates == 0:
                        average.copy_(value)
                    # torch's average leaves counters as they were copied
                    elif value.is_floating_point():
                        average.lerp_(value, 1 - DECAY)
            updates += 1
    return flat(model), flat(ema), losses


@pytest.mark.parametrize("mode", [da.BatchNormMode.pooled, "pooled"])
def test_timm(two_ranks: World, mode: Any) -> None:
    parameters, averages, losses = timm_by_hand()
    for found in two_ranks.run(timm, mode):
        assert not isinstance(found, str), found
        near(found[0], parameters)
        near(found[1], averages)
        near(found[2], losses)


# --- detection: images of different sizes in a batch class of one's own, several terms with
# denominators of their own.


class ImageList:
    """Images [3, H, W] of different sizes, and for each the class of every place [H, W] (0 is
    background) and boxes."""

    def __init__(self, images: list[Tensor], classes: list[Tensor], boxes: list[Tensor]) -> None:
        self.images = images
        self.classes = classes
        self.boxes = boxes

    def to(self, device: Any, non_blocking: bool = False) -> ImageList:
        """A copy on a device."""
        parts = (self.images, self.classes, self.boxes)
        return ImageList(
            *([value.to(device, non_blocking=non_blocking) for value in part] for part in parts)
        )


def make_image_list(first: int, number: int) -> ImageList:
    images, classes, boxes = [], [], []
    for index in range(first, first + number):
        generator = torch.Generator().manual_seed(100 + index)
        height, width = 2 + index % 3, 3 + index % 2
        images.append(torch.randn(3, height, width, generator=generator, dtype=torch.float64))
        positive = torch.rand(height, width, generator=generator) < (0.0 if index == 4 else 0.4)
        classes.append(positive * torch.randint(1, 4, (height, width), generator=generator))
        boxes.append(torch.rand(4, height, width, generator=generator, dtype=torch.float64))
    return ImageList(images, classes, boxes)


class Detector(nn.Module):
    """A trunk, and heads for the class and the box of every place."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Conv2d(3, 6, 3, padding=1)
        self.classes = nn.Conv2d(6, 4, 1)
        self.boxes = nn.Conv2d(6, 4, 1)

    def forward(self, images: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Logits [H, W, 4] and boxes [4, H, W] of each image."""
        features = [torch.tanh(self.trunk(image)) for image in images]
        return [(self.classes(x).permute(1, 2, 0), self.boxes(x)) for x in features]


def make_detector() -> Detector:
    torch.manual_seed(12)
    return Detector().double()


def detection_sums(model: nn.Module, batch: ImageList) -> dict[str, Tensor]:
    class_sum, box_sum = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for (logits, boxes), classes, right in zip(
        model(batch.images), batch.classes, batch.boxes, strict=True
    ):
        class_sum = class_sum + F.cross_entropy(
            logits.flatten(0, 1), classes.flatten(), reduction="sum"
        )
        box_sum = box_sum + 2.0 * F.smooth_l1_loss(
            boxes[:, classes > 0], right[:, classes > 0], reduction="sum"
        )
    return {"classes": class_sum, "boxes": box_sum}


def detection_counts(batch: ImageList) -> dict[str, int]:
    """Class losses are a mean over places, box losses over places with an object."""
    places = sum(classes.numel() for classes in batch.classes)
    return {"classes": places, "boxes": sum(int((classes > 0).sum()) for classes in batch.classes)}


# The first image and the number of images of each micro-batch; rank 1 has fewer, and none in the
# last window.
DETECTION = [[(0, 2), (2, 1), (3, 1), (4, 1), (5, 2)], [(7, 1), (8, 3), (11, 1)]]


def detection() -> tuple[list[float], list[dict[str, float]]]:
    raw = make_detector()
    model = DistributedDataParallel(raw)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    loader = DataLoader(
        DETECTION[dist.get_rank()], batch_size=None, collate_fn=lambda part: make_image_list(*part)
    )
    accumulator = da.Accumulator(
        model, optimizer, da.Objective(detection_sums, detection_counts), clip_norm=1.0
    )
    losses = [dict(accumulator.step(window).losses) for window in da.windows(loader, 2)]
    return flat(raw), losses


def detection_by_hand() -> tuple[list[float], list[dict[str, float]]]:
    model = make_detector()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for start in (0, 2, 4):
        parts = [
            make_image_list(*part)
            for micro_batches in DETECTION
            for part in micro_batches[start : start + 2]
        ]
        images = [image for part in parts for image in part.images]
        logits, boxes = zip(*model(images), strict=True)
        classes = torch.cat([value.flatten() for part in parts for value in part.classes])
        right = torch.cat([value.flatten(1) for part in parts for value in part.boxes], dim=1)
        found = torch.cat([value.flatten(1) for value in boxes], dim=1)
        terms = {
            "classes": F.cross_entropy(
                torch.cat([value.flatten(0, 1) for value in logits]), classes
            ),
            "boxes": (
                2.0
                * F.smooth_l1_loss(found[:, classes > 0], right[:, classes > 0], reduction="none")
                .sum(0)
                .mean()
            ),
        }
        update(model, terms["classes"] + terms["boxes"], optimizer, clip_norm=1.0)
        losses.append({name: value.item() for name, value in terms.items()})
    return flat(model), losses


def test_detection(two_ranks: World) -> None:
    parameters, losses = detection_by_hand()
    for found in two_ranks.run(detection):
        near(found[0], parameters)
        assert [list(window) for window in found[1]] == [list(window) for window in losses]
        near(
            [list(window.values()) for window in found[1]],
            [list(window.values()) for window in losses],
        )
