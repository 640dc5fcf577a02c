"""Finds and reads images: scikit-learn's digits, or a folder with one sub-folder per class."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from distaccum.data.files import SourceFile, encoded, find_files
from distaccum.errors import ConfigError

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


class Pictures(Protocol):
    """Describes numbered images without labels, all of one shape."""

    shape: tuple[int, int, int]  # C, H, W
    mirrored: bool  # whether an image and its mirror image have the same class
    in_memory: bool  # whether reading takes almost no time

    def read(self, numbers: npt.NDArray[np.int64]) -> Tensor:
        """Read images as float32 [B, C, H, W] with values in [0, 1].

        Args:
            numbers: [B], numbers of the images.

        Raises:
            ConfigError: if a file cannot be read as an image.
        """
        ...


@dataclass(frozen=True)
class Collection:
    """Holds all images of a source, with their names and labels."""

    pictures: Pictures
    names: Sequence[str]  # one per image, the same on every machine
    labels: npt.NDArray[np.int64]  # [N]
    class_names: tuple[str, ...]  # in the order of the labels
    facts: dict[str, str | int | float]  # source, files, skipped_files, bytes, digest


class _Digits:
    shape = (1, 8, 8)
    mirrored = False
    in_memory = True

    def __init__(self, pixels: npt.NDArray[np.uint8]):  # [N, 8, 8], 0 to 16
        self._pixels = pixels

    def read(self, numbers: npt.NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(self._pixels[numbers, None]).float() / 16


def digits() -> Collection:
    """Load the 1,797 gray images of 8x8 pixels that are part of scikit-learn.

    Raises:
        ConfigError: if scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ConfigError(
            f"data=digits needs scikit-learn, which cannot be imported ({error}). Install it with: "
            f"pip install distaccum[images]"
        ) from error
    found = load_digits()
    pixels, labels = found.images.astype(np.uint8), found.target.astype(np.int64)
    facts: dict[str, str | int | float] = {
        "source": "scikit-learn's digits",
        "files": 1,
        "skipped_files": 0,
        "bytes": pixels.nbytes,
        "digest": hashlib.sha256(pixels.tobytes() + labels.astype("<i8").tobytes()).hexdigest()[:12],
    }
    names = [f"digits/{i}" for i in range(len(labels))]
    return Collection(_Digits(pixels), names, labels, tuple("0123456789"), facts)


class _Folder:
    mirrored = True
    in_memory = False

    def __init__(self, root: str, names: list[str], size_px: int):
        self.shape = (3, size_px, size_px)
        self._root = root
        self._names = names

    def read(self, numbers: npt.NDArray[np.int64]) -> Tensor:
        pixels = np.stack([_pixels(Path(self._root, self._names[i]), self.shape[1]) for i in numbers])
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


def folder(path: str, size_px: int) -> Collection:
    """Find the images of a folder by the endings of their names.

    An image is read only when it is needed.

    Args:
        path: a folder with one sub-folder per class.
        size_px: height and width to which images are resized.

    Raises:
        ConfigError: if there is no such folder, it has no classes or images outside of them, or
            Pillow is missing.
    """
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"data=images needs Pillow, which cannot be imported ({error}). Install it with: "
            f"pip install distaccum[images]"
        ) from error
    root = Path(path).expanduser().resolve()
    if not root.is_dir():
        raise ConfigError(
            f"data.path ({path}) is not a folder (looked for {root}). Give a folder with one sub-folder per class."
        )
    files = find_files(root, "", frozenset())
    images = [file for file in files if file.name.lower().endswith(SUFFIXES)]
    class_names = _classes(root, images)
    digest = hashlib.sha256()
    for file in images:
        digest.update(b"%s\0%d\0" % (encoded(file.name), file.size))
    facts: dict[str, str | int | float] = {
        "source": str(root),
        "files": len(images),
        "skipped_files": len(files) - len(images),
        "bytes": sum(file.size for file in images),
        "digest": digest.hexdigest()[:12],
    }
    names = [file.name for file in images]
    numbered = {name: i for i, name in enumerate(class_names)}
    labels = np.array([numbered[name.split("/")[0]] for name in names], dtype=np.int64)
    return Collection(_Folder(str(root), names, size_px), names, labels, class_names, facts)


def _classes(root: Path, images: list[SourceFile]) -> tuple[str, ...]:
    """Return the sorted names of all sub-folders that are not hidden; each must have images."""
    outside = [file.name for file in images if "/" not in file.name]
    if outside:
        raise ConfigError(f"{root}: the image {outside[0]} is in no class. Move images into one sub-folder per class.")
    found = {file.name.split("/")[0] for file in images}
    folders = {path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")}
    if folders - found:
        raise ConfigError(
            f"{root}: there is no image in the folder {min(folders - found)}. Every sub-folder is a class: remove it, "
            f"or put images into it ({', '.join(SUFFIXES)}; symbolic links to folders are not followed)."
        )
    if len(found) < 2:
        raise ConfigError(
            f"{root} has {len(found)} sub-folders with images. Make one sub-folder per class, and at least two classes."
        )
    return tuple(sorted(found))


def _pixels(path: Path, size_px: int) -> npt.NDArray[np.uint8]:
    """Read one image as [size_px, size_px, 3].

    Its shorter side is resized to size_px, and its longer side is cropped to the middle.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise ConfigError(
                    f"{path} has pixels of mode {image.mode}, with more than 8 bits. Convert the image to 8 bits."
                )
            fitted = ImageOps.fit(image.convert("RGB"), (size_px, size_px), Image.Resampling.BILINEAR)
            return np.asarray(fitted)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path} cannot be read as an image: {error}. Repair the file, or remove it.") from error
