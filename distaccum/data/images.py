"""Real images with one label each: scikit-learn's digits, or a folder with a sub-folder for each class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from distaccum.data.files import is_heldout
from distaccum.data.pictures import Collection, Pictures, digits, folder
from distaccum.errors import ConfigError

# A pass over a large folder at each start would take minutes; so many images tell mean and deviation to a percent.
_STATISTICS_IMAGES = 512


class ImageSource(Enum):
    """Whose images are read."""

    digits = "digits"
    folder = "folder"


@dataclass
class ImagesConfig:
    """What images and how they are split; defaults are in conf/data/digits.yaml and images.yaml.

    Attributes:
        name: "images": which kind of data this is.
        source: scikit-learn's digits, or `folder`.
        path: with source=folder a folder with one sub-folder for each class, which bears its name. Otherwise null.
        size_px: with source=folder height and width of what the model reads. Otherwise null.
        augment: whether training images vary from epoch to epoch, see `ImageDataset`.
        heldout_fraction: the part that is held out, more than 0 and less than 1, approximately.
    """

    name: str
    source: ImageSource
    path: str | None
    size_px: int | None
    augment: bool
    heldout_fraction: float


class ImageDataset:
    """One split of a collection of images. Implements `distaccum.data.base.Dataset`; made by `load_images`.

    Channels have mean 0 and standard deviation 1 over the training images; of a folder, over 512 of them.
    With augmentation each training image is shifted by up to an eighth of its size (at least a pixel) in both
    directions, black coming in, and an image of a folder is mirrored half of the time.

    Attributes:
        num_classes: labels are 0 to num_classes - 1.
        class_names: in the order of the labels.
        shape: (C, H, W) of an image.
        tokens_per_sample: None, there are no tokens.
        facts: for a start block: source, files, skipped_files, bytes, digest, split, classes, and this split's samples.
            The digest is over pixels and labels; of a folder over relative paths and sizes, as its content is read
            only when it is needed.

    What is pickled are the digits themselves (some 100 KB), or the paths of a folder's images.
    """

    def __init__(
        self,
        collection: Collection,
        numbers: npt.NDArray[np.int64],  # [N] of the images of this split
        scale: tuple[Tensor, Tensor],  # mean and standard deviation [C, 1, 1] of training images
        augment: bool,
    ):
        self.num_classes = len(collection.class_names)
        self.class_names = collection.class_names
        self.shape = collection.pictures.shape
        self.tokens_per_sample = None
        self.facts: dict[str, str | int | float] = {
            **collection.facts,
            "split": "by image",
            "classes": self.num_classes,
            "samples": len(numbers),
        }
        self._pictures = collection.pictures
        self._numbers = numbers
        self._labels = collection.labels[numbers]
        self._scale = scale
        self._augment = augment

    def __len__(self) -> int:
        """The number of images, the same on every rank."""
        return len(self._labels)

    def batch(self, indices: Sequence[int], generator: torch.Generator) -> dict[str, Tensor]:
        """Read the images.

        Args:
            indices: B sample numbers in [0, len), at least one, in the order of the rows.
            generator: of the augmentation; nothing else is random.

        Returns:
            `inputs` float32 [B, C, H, W] and `labels` int64 [B], on the CPU.

        Raises:
            ConfigError: for a file that cannot be read as an image.
        """
        samples = np.asarray(indices, dtype=np.int64)
        if samples.ndim != 1 or not len(samples) or samples.min() < 0 or samples.max() >= len(self):
            raise IndexError(f"samples are numbered 0 to {len(self) - 1}, and at least one is read; got {indices}")
        images = self._pictures.read(self._numbers[samples])
        if self._augment:
            images = _varied(images, self._pictures.mirrored, generator)
        mean, std = self._scale
        return {"inputs": (images - mean) / std, "labels": torch.from_numpy(self._labels[samples])}

    def counted(self, indices: Sequence[int]) -> int:
        """The number of labels in `batch(indices)`: each image has one."""
        return len(indices)

    def longest(self, count: int) -> list[int]:
        """Images have one size: the first ones, at most `len`."""
        return list(range(count))


def load_images(config: ImagesConfig) -> tuple[ImageDataset, ImageDataset]:
    """The training and the held-out images, the same on every rank, without communication.

    Raises:
        ConfigError: a value out of range, a missing library, a folder without images in classes, an empty split.
    """
    if not 0 < config.heldout_fraction < 1:
        raise ConfigError(
            f"data.heldout_fraction ({config.heldout_fraction}) must be more than 0 and less than 1, as there are "
            "training and held-out images: write 0.05 to hold out a twentieth"
        )
    collection = _collected(config)
    held = np.array([is_heldout(name, config.heldout_fraction) for name in collection.names])
    train, heldout = np.flatnonzero(~held), np.flatnonzero(held)
    for which, numbers in (("training", train), ("held-out", heldout)):
        if not len(numbers):
            raise ConfigError(
                f"{collection.facts['source']}: none of its {len(held)} images is a {which} one with "
                f"data.heldout_fraction={config.heldout_fraction}. Give another fraction, or more images"
            )
    scale = _channel_statistics(collection.pictures, train)
    return ImageDataset(collection, train, scale, config.augment), ImageDataset(collection, heldout, scale, False)


def frequency_loss(train: ImageDataset, heldout: ImageDataset, samples: Sequence[int] | None = None) -> float:
    """What a model must beat: nats per image on the labels of `heldout`, told by the frequency of each class alone.

    The probability of a class is (its count among the labels of `train` + 1) / (all of them + number of classes). With
    `samples`, over the labels of these only. The same number on every rank.
    """
    counts = np.bincount(train._labels, minlength=train.num_classes)
    logp = np.log(counts + 1) - np.log(counts.sum() + train.num_classes)
    labels = heldout._labels if samples is None else heldout._labels[np.asarray(samples)]
    return float(-logp[labels].mean())


def _collected(config: ImagesConfig) -> Collection:
    if config.source is ImageSource.digits:
        if config.path is not None or config.size_px is not None:
            raise ConfigError(
                f"data.path={config.path}, data.size_px={config.size_px}: the digits come with scikit-learn and have "
                "their own size. Leave both null, or write data=images for images of your own"
            )
        return digits()
    if config.path is None or config.size_px is None or config.size_px < 1:
        raise ConfigError(
            f"data.path={config.path}, data.size_px={config.size_px}: images of your own need a folder with one "
            "sub-folder for each class, and the size they are brought to. Write data=images data.path=FOLDER "
            "data.size_px=64"
        )
    return folder(config.path, config.size_px)


def _channel_statistics(pictures: Pictures, train: npt.NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [C, 1, 1] of training images: of all, or of 512 spread evenly over a folder's."""
    if not pictures.in_memory and len(train) > _STATISTICS_IMAGES:
        train = train[np.linspace(0, len(train) - 1, _STATISTICS_IMAGES).astype(np.int64)]
    sums = torch.zeros(2, pictures.shape[0], dtype=torch.float64)
    for begin in range(0, len(train), 64):
        images = pictures.read(train[begin : begin + 64]).double()
        sums += torch.stack([images.mean((2, 3)).sum(0), images.square().mean((2, 3)).sum(0)])
    mean, square = sums / len(train)
    # A channel of one colour stays as it is: half a step of 8 bits is no deviation.
    std = (square - mean.square()).clamp(min=(0.5 / 255) ** 2).sqrt()
    return mean.float().view(-1, 1, 1), std.float().view(-1, 1, 1)


def _varied(images: Tensor, mirrored: bool, generator: torch.Generator) -> Tensor:
    """Shift each image [B, C, H, W] in a frame of black, and mirror half of them where that keeps the class."""
    height, width = images.shape[2:]
    reach = max(1, height // 8)
    framed = F.pad(images, (reach,) * 4)
    offsets = torch.randint(2 * reach + 1, (len(images), 2), generator=generator).tolist()
    shifted = torch.stack(
        [image[:, y : y + height, x : x + width] for image, (y, x) in zip(framed, offsets, strict=True)]
    )
    if mirrored:
        flips = torch.rand(len(images), generator=generator) < 0.5
        shifted = torch.where(flips.view(-1, 1, 1, 1), shifted.flip(3), shifted)
    return shifted
