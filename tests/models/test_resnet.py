"""The ResNet against arithmetic: sizes, shapes, initialisation, each way in which it is built, and
real digits."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from worlds import World

from distaccum.data.images import ImagesConfig, ImageSource, frequency_loss, load_images
from distaccum.errors import ConfigError
from distaccum.models.resnet import ResNet, ResNetConfig
from distaccum.nn.batchnorm import BatchNormMode, convert_batchnorm, pooled_statistics

CONF = Path(__file__).parents[2] / "conf"
SMALL = ResNetConfig(
    "resnet", num_classes=5, in_channels=2, widths=[4, 6], blocks_per_stage=2, large_stem=False
)


def small(**changes: object) -> ResNetConfig:
    return dataclasses.replace(SMALL, **changes)


def build(config: ResNetConfig = SMALL, seed: int = 0) -> ResNet:
    torch.manual_seed(seed)
    return ResNet(config)


def composed(name: str) -> ResNetConfig:
    with initialize_config_dir(str(CONF / "model"), version_base="1.3"):
        raw = compose(name)
    config: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ResNetConfig), raw))
    return config


def count(config: ResNetConfig) -> int:
    """Parameters by arithmetic: convolutions in x out x kernel^2, two numbers a channel for each
    norm, a head."""
    channels = config.widths[0]
    total = config.in_channels * channels * (7 if config.large_stem else 3) ** 2 + 2 * channels
    for stage, width in enumerate(config.widths):
        for i in range(config.blocks_per_stage):
            total += 9 * channels * width + 9 * width**2 + 4 * width
            total += channels * width + 2 * width if stage and not i else 0
            channels = width
    return total + (channels + 1) * config.num_classes


# ResNet-18 has 11,689,512 parameters in torchvision.
@pytest.mark.parametrize(
    ("name", "sizes", "parameters"),
    [("resnet", (10, 1), 77_754), ("resnet18", (1000, 3), 11_689_512)],
)
def test_conf_has_the_parameters_that_it_says(
    name: str, sizes: tuple[int, int], parameters: int
) -> None:
    config = dataclasses.replace(composed(name), num_classes=sizes[0], in_channels=sizes[1])
    with torch.device("meta"):
        model = ResNet(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters == count(config)
    assert f"{parameters:,}" in (CONF / "model" / f"{name}.yaml").read_text()


@pytest.mark.parametrize(
    ("large_stem", "size_px", "last_px"),
    [(False, 8, 4), (False, 5, 3), (True, 64, 8), (True, 33, 5)],
)
def test_shapes(large_stem: bool, size_px: int, last_px: int) -> None:
    model = build(small(large_stem=large_stem))
    assert len(model.blocks) == 4
    seen: list[Tensor] = []
    model.blocks[-1].register_forward_hook(lambda _m, _a, out: seen.append(out))
    assert model(torch.randn(3, 2, size_px, size_px)).shape == (3, 5)
    assert seen[0].shape == (3, 6, last_px, last_px)


def test_float64_agrees_with_blocks_by_hand() -> None:
    model = build(small(blocks_per_stage=1)).double()
    x = torch.randn(3, 2, 8, 8, dtype=torch.float64)

    def norm(x: Tensor, layer: nn.BatchNorm2d) -> Tensor:
        mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
        return (x - mean) / (var + layer.eps).sqrt()  # weight 1 and bias 0 as initialised

    h = norm(F.conv2d(x, model.stem.weight, padding=1), model.norm).relu()
    first, second = model.blocks
    inner = norm(F.conv2d(h, first.conv1.weight, padding=1), first.norm1).relu()
    h = (norm(F.conv2d(inner, first.conv2.weight, padding=1), first.norm2) + h).relu()
    inner = norm(F.conv2d(h, second.conv1.weight, padding=1, stride=2), second.norm1).relu()
    shortcut = norm(
        h[:, :, ::2, ::2]
        .permute(0, 2, 3, 1)
        .matmul(second.shortcut[0].weight[:, :, 0, 0].T)
        .permute(0, 3, 1, 2),
        second.shortcut[1],
    )
    h = (norm(F.conv2d(inner, second.conv2.weight, padding=1), second.norm2) + shortcut).relu()
    expected = h.mean((2, 3)) @ model.head.weight.T
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)


def test_initialisation() -> None:
    model = build(small(widths=[64, 128]))
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            assert (parameter == (0 if name.endswith("bias") else 1)).all()
        else:
            fan_out = parameter.shape[0] * math.prod(parameter.shape[2:])
            std = math.sqrt(2 / fan_out) if parameter.ndim == 4 else 0.01
            # The deviation of n normal numbers is itself off by 1 / sqrt(2 n) of it; five of these.
            assert float(parameter.detach().std()) == pytest.approx(
                std, rel=5 / math.sqrt(2 * parameter.numel())
            )


def test_the_same_weights_however_it_is_built() -> None:
    model = build()
    model(torch.randn(4, 2, 8, 8))  # running statistics move
    with torch.device("meta"):
        other = ResNet(SMALL)
    assert all(tensor.is_meta for tensor in (*other.parameters(), *other.buffers()))
    with pytest.raises(ConfigError, match="on the meta device"):
        other.init_weights()
    other.to_empty(device="cpu")
    for again in (other, model):
        torch.manual_seed(0)
        again.init_weights()
        fresh = build().state_dict()
        assert all(torch.equal(value, fresh[name]) for name, value in again.state_dict().items())
    assert not torch.equal(build(seed=1).stem.weight, model.stem.weight)


def sharded() -> bool:
    """Blocks and root sharded while on meta, then filled: the same as built at once, in weights and
    outputs."""
    with torch.device("meta"):
        model = ResNet(SMALL)
    convert_batchnorm(model, BatchNormMode.pooled)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    model.init_weights()
    whole = build()
    equal = all(
        torch.equal(ours.full_tensor(), theirs)
        for ours, theirs in zip(model.parameters(), whole.parameters(), strict=True)
    )
    x = torch.randn(3, 2, 8, 8)
    return (
        equal
        and torch.equal(model(x), whole(x))
        and all(
            torch.equal(a, b)
            for a, b in zip(model.eval().buffers(), build().buffers(), strict=True)
        )
    )


def test_sharded_while_on_meta(two_ranks: World) -> None:
    assert two_ranks.run(sharded) == [True, True]


def test_it_learns_real_digits() -> None:
    """40 steps of 2 micro-batches of 32 digits: on images it never saw, far better than class
    frequencies (2.3 nats)."""
    train, validation = load_images(
        ImagesConfig("images", ImageSource.digits, None, None, True, 0.2)
    )
    config = dataclasses.replace(
        composed("resnet"), num_classes=train.num_classes, in_channels=train.shape[0]
    )
    model = convert_batchnorm(build(config), BatchNormMode.pooled)
    statistics = pooled_statistics(model)
    assert statistics is not None
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=40)
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        for _ in range(2):
            batch = train.batch(
                torch.randint(len(train), (32,), generator=generator).tolist(), generator
            )
            with statistics.observing():
                logits = model(batch["inputs"])
            (F.cross_entropy(logits, batch["labels"], reduction="sum") / 64).backward()
        statistics.send(None, torch.device("cpu"))
        statistics.commit()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    batch = validation.batch(range(len(validation)), generator)
    with torch.no_grad():
        logits = model.eval()(batch["inputs"])
    assert (
        logits.argmax(1) == batch["labels"]
    ).double().mean() > 0.7  # it was 0.78, and 0.97 after four times as many steps
    assert F.cross_entropy(logits, batch["labels"]) < 0.5 * frequency_loss(train, validation)


def test_what_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"model.num_classes=None, model.in_channels=2: both must be known"
    ):
        ResNet(small(num_classes=None))
    with pytest.raises(ConfigError, match=r"model.blocks_per_stage \(0\)"):
        ResNet(small(blocks_per_stage=0))
    with pytest.raises(ConfigError, match=r"model.widths \(\[\]\)"):
        ResNet(small(widths=[]))
    with pytest.raises(ConfigError, match=r"images of shape \[3, 1, 8, 8\], not \[B, 2, H, W\]"):
        build()(torch.randn(3, 1, 8, 8))
