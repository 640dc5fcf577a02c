"""Reads labeled images: scikit-learn's digits, or a folder with one sub-folder per class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from distaccum.data.base import numbered
from distaccum.data.files import check_validation_fraction, in_validation
from distaccum.data.pictures import Collection, digits, folder
from distaccum.errors import ConfigError

# Reading a large folder at each start would take minutes; this many images determine mean and
# deviation to about a percent.
_STATISTICS_IMAGES = 512


class ImageSource(Enum):
    """Names the source of the images."""

    digits = "digits"
    folder = "folder"


@dataclass
class ImagesConfig:
    """Configures which images are read and how they are split.

    Defaults are in conf/data/digits.yaml and conf/data/images.yaml.

    Attributes:
        name: "images", the kind of data.
        source: `digits` for scikit-learn's digits, or `folder`.
        path: with source=folder, a folder with one sub-folder per class, named after the class.
            Otherwise null.
        size_px: with source=folder, height and width of the model's input. Otherwise null.
        augment: whether training images vary from epoch to epoch, see `ImageDataset`.
        validation_fraction: approximate part of the images that is used for validation, more than 0
            and less than 1.
    """

    name: str
    source: ImageSource
    path: str | None
    size_px: int | None
    augment: bool
    validation_fraction: float


class ImageDataset:
    """Holds one split of a collection of images, and implements `distaccum.data.base.Dataset`.

    `load_images` builds it. Channels are normalized to mean 0 and standard deviation 1 over the
    training images; for a folder, over 512 of them. With augmentation, each training image is
    shifted by up to an eighth of its size (at least one pixel) in both directions, with black at
    the edges, and each image of a folder is mirrored with probability 1/2.

    Attributes:
        num_classes: labels are 0 to num_classes - 1.
        class_names: names of the classes, in the order of the labels.
        shape: (C, H, W) of an image.
        tokens_per_sample: None, because images have no tokens.
        facts: metadata for the start of a run: source, files, skipped_files, bytes, digest, split,
            classes, and the number of samples of this split. The digest is over pixels and labels.
            For a folder it is over relative paths and sizes, because the images are read only when
            they are needed.

    Pickling stores the digits themselves (about 100 KB), or the paths of a folder's images.
    """

    def __init__(
        self,
        collection: Collection,
        numbers: npt.NDArray[np.int64],  # [N], numbers of the images of this split
        scale: tuple[Tensor, Tensor],  # mean and standard deviation of training images, [C, 1, 1]
        augment: bool,
    ):
        self.class_names = collection.class_names
        self.num_classes = len(self.class_names)
        self.shape = collection.shape
        self.tokens_per_sample = None
        self.facts = {
            **collection.facts,
            "split": "by image",
            "classes": self.num_classes,
            "samples": len(numbers),
        }
        self._collection = collection
        self._numbers = numbers
        self._scale = scale
        self._augment = augment

    def __len__(self) -> int:
        """Return the number of images, which is the same on every rank."""
        return len(self._numbers)

    def batch(self, indices: Sequence[int], generator: torch.Generator) -> dict[str, Tensor]:
        """Read the images of one micro-batch and their labels.

        Args:
            indices: B sample numbers in [0, len), at least one, in the order of the rows.
            generator: source of randomness for the augmentation. Nothing else is random.

        Returns:
            `inputs` float32 [B, C, H, W] and `labels` int64 [B], on the CPU.

        Raises:
            ConfigError: if a file cannot be read as an image.
            IndexError: if there are no indices, or one of them is out of range.
        """
        numbers = self._numbers[numbered(indices, len(self))]
        images = self._collection.read(numbers)
        if self._augment:
            # Only the digits are in memory; they have another meaning when they are mirrored.
            images = _varied(images, self._collection.pixels is None, generator)
        mean, std = self._scale
        labels = torch.from_numpy(self._collection.labels[numbers])
        return {"inputs": (images - mean) / std, "labels": labels}

    def num_targets(self, indices: Sequence[int]) -> int:
        """Return the number of labels in `batch(indices)`, which is one per image."""
        return len(indices)

    def longest_samples(self, count: int) -> list[int]:
        """Return the first `count` sample numbers, because all images have one size."""
        return list(range(count))

    def labels(self) -> npt.NDArray[np.int64]:
        """Return the labels of all samples, [N]."""
        return self._collection.labels[self._numbers]


def load_images(config: ImagesConfig) -> tuple[ImageDataset, ImageDataset]:
    """Load the training and the validation images.

    Every rank gets the same images, without communication.

    Raises:
        ConfigError: if a value is out of range, a library is missing, the folder does not hold
            images in classes, or a split is empty.
    """
    check_validation_fraction(config.validation_fraction, "images")
    given = f"data.path={config.path}, data.size_px={config.size_px}"
    if config.source is ImageSource.digits:
        if config.path is not None or config.size_px is not None:
            raise ConfigError(
                f"{given}: the digits come with scikit-learn and have their own size. Leave both "
                "null, or write data=images to use your own images."
            )
        collection = digits()
    else:
        if config.path is None or config.size_px is None or config.size_px < 1:
            raise ConfigError(
                f"{given}: your own images need a folder with one sub-folder per class, and the "
                "size to which they are resized. Write data=images data.path=FOLDER "
                "data.size_px=64"
            )
        collection = folder(config.path, config.size_px)
    held = np.array([in_validation(n, config.validation_fraction) for n in collection.names])
    train, validation = np.flatnonzero(~held), np.flatnonzero(held)
    for which, numbers in (("training", train), ("validation", validation)):
        if not len(numbers):
            raise ConfigError(
                f"None of the {len(held)} images of {collection.facts['source']} is in the {which} "
                f"split with data.validation_fraction={config.validation_fraction}. Give another "
                "fraction, or more images."
            )
    scale = _channel_statistics(collection, train)
    return (
        ImageDataset(collection, train, scale, config.augment),
        ImageDataset(collection, validation, scale, False),
    )


def frequency_loss(
    train: ImageDataset, validation: ImageDataset, samples: Sequence[int] | None = None
) -> float:
    """Compute the validation loss of a prediction from class frequencies alone, in nats per image.

    A useful model has a lower loss. The probability of a class is (its count among the labels of
    `train` + 1) / (number of labels of `train` + number of classes). The result is the same on
    every rank.

    Args:
        train: images whose labels are counted.
        validation: images whose labels are predicted.
        samples: sample numbers of `validation` to which the loss is restricted; None: all.
    """
    counts = np.bincount(train.labels(), minlength=train.num_classes)
    logp = np.log(counts + 1) - np.log(counts.sum() + train.num_classes)
    labels = validation.labels() if samples is None else validation.labels()[np.asarray(samples)]
    return float(-logp[labels].mean())


def _channel_statistics(
    collection: Collection, train: npt.NDArray[np.int64]
) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of the training images, [C, 1, 1] each.

    They are computed over all images in memory, or over 512 spread evenly over a folder's.
    """
    if collection.pixels is None and len(train) > _STATISTICS_IMAGES:
        train = train[np.linspace(0, len(train) - 1, _STATISTICS_IMAGES).astype(np.int64)]
    images = (collection.read(train[i : i + 1])[0].double() for i in range(len(train)))
    powers = [torch.stack([image, image.square()]).mean((2, 3)) for image in images]
    mean, square = torch.stack(powers).mean(0)[..., None, None]
    # At least half a step of 8 bits, so that a channel of one color is not divided by 0.
    std = (square - mean.square()).clamp(min=(0.5 / 255) ** 2).sqrt()
    return mean.float(), std.float()


def _varied(images: Tensor, mirrored: bool, generator: torch.Generator) -> Tensor:
    """Shift each image [B, C, H, W] in a frame of black, and mirror half of them if `mirrored`."""
    height, width = images.shape[2:]
    reach = max(1, height // 8)
    framed = F.pad(images, (reach,) * 4)
    offsets = torch.randint(2 * reach + 1, (len(images), 2), generator=generator).tolist()
    shifted = torch.stack(
        [
            image[:, y : y + height, x : x + width]
            for image, (y, x) in zip(framed, offsets, strict=True)
        ]
    )
    if mirrored:
        flips = torch.rand(len(images), generator=generator) < 0.5
        shifted = torch.where(flips.view(-1, 1, 1, 1), shifted.flip(3), shifted)
    return shifted
