"""Finds and reads images: scikit-learn's digits, or a folder with one sub-folder per class."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from distaccum.data.files import find_files
from distaccum.errors import ConfigError

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class Collection:
    """Holds all images of a source, their names and their labels.

    Attributes:
        shape: (C, H, W) of every image.
        names: one per image, the same on every machine; for a folder, paths relative to it.
        labels: [N] class numbers.
        class_names: names of the classes, in the order of the labels.
        facts: source, files, skipped_files, bytes and digest.
        pixels: [N, C, H, W] uint8 from 0 to 16, if the images are in memory; None: they are read
            from the folder `facts["source"]` when they are needed.
    """

    shape: tuple[int, int, int]
    names: Sequence[str]
    labels: npt.NDArray[np.int64]
    class_names: tuple[str, ...]
    facts: dict[str, str | int | float]
    pixels: Tensor | None = None

    def read(self, numbers: npt.NDArray[np.int64]) -> Tensor:
        """Read images as float32 [B, C, H, W] with values in [0, 1].

        Args:
            numbers: [B], numbers of the images.

        Raises:
            ConfigError: if a file cannot be read as an image.
        """
        if self.pixels is not None:
            return self.pixels[numbers].float() / 16
        paths = [Path(str(self.facts["source"]), self.names[i]) for i in numbers]
        pixels = np.stack([_pixels(path, self.shape[1]) for path in paths])
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


def digits() -> Collection:
    """Load the 1,797 gray images of 8x8 pixels that are part of scikit-learn."""
    found = _imported("sklearn.datasets", "data=digits", "scikit-learn").load_digits()
    pixels, labels = found.images.astype(np.uint8), found.target.astype(np.int64)
    facts: dict[str, str | int | float] = {
        "source": "scikit-learn's digits",
        "files": 1,
        "skipped_files": 0,
        "bytes": pixels.nbytes,
        "digest": (
            hashlib.sha256(pixels.tobytes() + labels.astype("<i8").tobytes()).hexdigest()[:12]
        ),
    }
    names = [f"digits/{i}" for i in range(len(labels))]
    in_memory = torch.from_numpy(pixels)[:, None]
    return Collection((1, 8, 8), names, labels, tuple("0123456789"), facts, in_memory)


def folder(path: str, size_px: int) -> Collection:
    """Find the images of a folder by the endings of their names, without reading them.

    Args:
        path: a folder with one sub-folder per class.
        size_px: height and width to which images are resized.
    """
    _imported("PIL", "data=images", "Pillow")
    root = Path(path).expanduser().resolve()
    if not root.is_dir():
        raise ConfigError(
            f"data.path ({path}) is not a folder (looked for {root}). Give a folder with one "
            "sub-folder per class."
        )
    files = find_files(root)
    images = [file for file in files if file.name.lower().endswith(SUFFIXES)]
    digest = hashlib.sha256()
    for file in images:
        digest.update(b"%s\0%d\0" % (os.fsencode(file.name), file.size))
    facts: dict[str, str | int | float] = {
        "source": str(root),
        "files": len(images),
        "skipped_files": len(files) - len(images),
        "bytes": sum(file.size for file in images),
        "digest": digest.hexdigest()[:12],
    }
    names = [file.name for file in images]
    folders = [path.name for path in root.iterdir() if path.is_dir() and path.name[0] != "."]
    _check_classes(root, names, folders)
    class_of_each = np.array([name.split("/")[0] for name in names])
    class_names, labels = np.unique(class_of_each, return_inverse=True)
    return Collection((3, size_px, size_px), names, labels, tuple(class_names.tolist()), facts)


def _check_classes(root: Path, names: list[str], folders: list[str]) -> None:
    """Refuse images outside of classes, and folders at the top that have no images."""
    outside = [name for name in names if "/" not in name]
    empty = set(folders) - {name.split("/")[0] for name in names}
    if outside:
        problem = (
            f"the image {outside[0]} is in no class. Move images into one sub-folder per class."
        )
    elif empty:
        problem = (
            f"there is no image in the folder {min(empty)}. Every sub-folder is a class: remove "
            f"it, or put images into it ({', '.join(SUFFIXES)}; symbolic links to folders are not "
            "followed)."
        )
    elif len(folders) < 2:
        problem = (
            f"it has {len(folders)} sub-folders with images. Make one sub-folder per class, and at "
            "least two classes."
        )
    else:
        return
    raise ConfigError(f"{root}: {problem}")


def _imported(module: str, option: str, package: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{option} needs {package}, which cannot be imported ({error}). Install it with: "
            "pip install distaccum[images]"
        ) from error


def _pixels(path: Path, size_px: int) -> npt.NDArray[np.uint8]:
    """Read one image as [size_px, size_px, 3].

    Its shorter side is resized to size_px, and its longer side is cropped to the middle.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"its pixels of mode {image.mode} have more than 8 bits")
            whole, size = image.convert("RGB"), (size_px, size_px)
            return np.asarray(ImageOps.fit(whole, size, Image.Resampling.BILINEAR))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ConfigError(
            f"{path} cannot be read as an image: {error}. Repair the file, convert it to 8 bits, "
            "or remove it."
        ) from error
