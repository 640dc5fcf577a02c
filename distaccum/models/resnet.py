"""Defines a residual network with BatchNorm that maps images to logits.

It knows nothing about losses, accumulation or ranks. Architecture: He et al., "Deep Residual
Learning for Image Recognition" (2016), with basic blocks, and projection shortcuts where the shape
changes (option B). Weights of convolutions are normal with variance 2 / fan_out (He et al., 2015).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distaccum.errors import ConfigError
from distaccum.models.weights import checked_sizes, draw


@dataclass
class ResNetConfig:
    """Configures a ResNet; conf/model contains the values, so nothing has a default here.

    Attributes:
        name: "resnet", by which the application finds this class.
        num_classes: number of logits. None: the caller fills it in from the data before the model
            is built.
        in_channels: channels of the images. None: the caller fills it in from the data before the
            model is built.
        widths: channels of each stage; every stage but the first halves height and width.
        blocks_per_stage: number of residual blocks, of two 3x3 convolutions each.
        large_stem: whether the stem is made for large images: a 7x7 convolution and a max-pool,
            with stride 2 each. Otherwise it is a 3x3 convolution with stride 1.
    """

    name: str
    num_classes: int | None
    in_channels: int | None
    widths: list[int]
    blocks_per_stage: int
    large_stem: bool


@final
class ResNet(nn.Module):
    """Implements a stem, residual blocks, a mean over the image and a linear head.

    Built inside `torch.device("meta")`, it uses no memory; then call `to_empty(device=...)` (after
    sharding, if any) and `init_weights()`. Built elsewhere, it is initialized at once, with the
    same values for the same seed.

    Its norms are plain nn.BatchNorm2d; `distaccum.convert_batchnorm` chooses over which samples
    they normalize.

    Raises:
        ConfigError: if no model can have these sizes.
    """

    blocks: nn.ModuleList  # in the order of computation, each [B, C, H, W] -> [B, C', H', W']

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__()
        from_data = ("num_classes", "in_channels")
        num_classes, self.in_channels = checked_sizes(config, from_data, ["blocks_per_stage"])
        if not config.widths or min(config.widths) < 1:
            raise ConfigError(
                f"model.widths ({config.widths}) must list the channels of each stage, at least 1 "
                "each: write [16,32,64]"
            )
        device = torch.get_default_device()
        # On meta first: torch's own initialization would be discarded, and its random draws would
        # make the weights depend on how the model was built.
        with torch.device("meta"):
            kernel, stride = (7, 2) if config.large_stem else (3, 1)
            self.stem = _convolution(self.in_channels, config.widths[0], kernel, stride)
            self.norm = nn.BatchNorm2d(config.widths[0])
            self.pool = nn.MaxPool2d(3, stride=2, padding=1) if config.large_stem else nn.Identity()
            self.blocks = nn.ModuleList()
            channels = config.widths[0]
            for stage, width in enumerate(config.widths):
                for i in range(config.blocks_per_stage):
                    self.blocks.append(_Block(channels, width, stride=2 if stage and not i else 1))
                    channels = width
            self.head = nn.Linear(channels, num_classes)
        if device.type != "meta":
            self.to_empty(device=device).init_weights()

    def init_weights(self) -> None:
        """Initialize all parameters by `distaccum.models.weights.draw`, and all buffers.

        Convolutions have variance 2 / fan_out. The head has std 0.01, as in Goyal et al.,
        "Accurate, Large Minibatch SGD" (2017), section 5.1.

        Raises:
            ConfigError: if a parameter is on the meta device.
        """
        draw(self, _std)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.reset_running_stats()

    def forward(self, images: Tensor) -> Tensor:
        """Compute the logits of each image.

        Args:
            images: [B, in_channels, H, W], floating point.

        Returns:
            [B, num_classes] in the dtype of the parameters, or of autocast if it is on.

        Raises:
            ConfigError: if the shape is different.
        """
        if images.ndim != 4 or images.shape[1] != self.in_channels:
            raise ConfigError(
                f"ResNet got images of shape {list(images.shape)}, not [B, {self.in_channels}, H, "
                f"W]. Pass a batch of images with {self.in_channels} channel(s)."
            )
        x: Tensor = self.pool(F.relu(self.norm(self.stem(images))))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x.mean(dim=(2, 3)))
        return logits


class _Block(nn.Module):
    """Applies a basic block: two convolutions beside a shortcut."""

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _convolution(in_channels, width, 3, stride)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = _convolution(width, width, 3, 1)
        self.norm2 = nn.BatchNorm2d(width)
        changes = stride > 1 or in_channels != width
        self.shortcut = (
            nn.Sequential(_convolution(in_channels, width, 1, stride), nn.BatchNorm2d(width))
            if changes
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        residual = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(residual + self.shortcut(x))


def _convolution(in_channels: int, width: int, kernel: int, stride: int) -> nn.Conv2d:
    """Build a convolution without a bias, because the norm after it has one."""
    return nn.Conv2d(in_channels, width, kernel, stride=stride, padding=kernel // 2, bias=False)


def _std(_: str, parameter: Tensor) -> float:
    fan_out = parameter.shape[0] * math.prod(parameter.shape[2:])
    return math.sqrt(2 / fan_out) if parameter.ndim == 4 else 0.01
