"""Images: real digits, and folders of PNG files that the tests write."""

from __future__ import annotations

import hashlib
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image

from distaccum.core.plan import Plan
from distaccum.data.images import (
    ImageDataset,
    ImagesConfig,
    ImageSource,
    frequency_loss,
    load_images,
)
from distaccum.data.loader import Loader
from distaccum.errors import ConfigError

CONF = Path(__file__).parents[2] / "conf"


def digits(
    augment: bool = False, validation_fraction: float = 0.2
) -> tuple[ImageDataset, ImageDataset]:
    return load_images(
        ImagesConfig("images", ImageSource.digits, None, None, augment, validation_fraction)
    )


def folder(
    path: Path, size_px: int | None = 6, augment: bool = False, validation_fraction: float = 0.3
) -> tuple[ImageDataset, ImageDataset]:
    return load_images(
        ImagesConfig("images", ImageSource.folder, str(path), size_px, augment, validation_fraction)
    )


def everything(dataset: ImageDataset) -> dict[str, torch.Tensor]:
    return dataset.batch(range(len(dataset)), torch.Generator())


@pytest.fixture(scope="module")
def pngs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of 12, 8 and 10 coloured noise images of 6x6, and two files that are none."""
    root = tmp_path_factory.mktemp("pngs")
    random = np.random.default_rng(0)
    for name, count in (("cat", 12), ("ant", 8), ("bee", 10)):
        (root / name / "more").mkdir(parents=True)
        for i in range(count):
            pixels = random.integers(0, 256, (6, 6, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / ("more" if i % 2 else ".") / f"{i}.png")
    (root / "README.txt").write_text("three animals")
    (root / "cat" / "notes.txt").write_text("they sleep")
    (root / ".hidden").mkdir()
    return root


@pytest.mark.parametrize("name", ["digits", "images"])
def test_conf_fits_the_dataclass(name: str) -> None:
    with initialize_config_dir(str(CONF / "data"), version_base="1.3"):
        raw = compose(name)
    config: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ImagesConfig), raw))
    assert config.source.value == {"digits": "digits", "images": "folder"}[name]
    if name == "digits":
        assert len(load_images(config)[0]) > 1000


def test_digits_are_all_there_and_normalised() -> None:
    train, validation = digits()
    assert len(train) + len(validation) == 1797
    assert abs(len(validation) / 1797 - 0.2) < 0.03  # three standard deviations of a fifth of 1,797
    assert (train.shape, train.num_classes, train.tokens_per_sample) == ((1, 8, 8), 10, None)
    batch, other = everything(train), everything(validation)
    assert batch["inputs"].shape == (len(train), 1, 8, 8)
    assert batch["inputs"].dtype == torch.float32
    assert batch["labels"].dtype == torch.int64
    assert sorted(set(batch["labels"].tolist())) == list(range(10))
    # 91,000 float32 numbers of order 1, rounded to 6e-8 each.
    torch.testing.assert_close(
        batch["inputs"].double().mean(), torch.tensor(0.0).double(), rtol=0, atol=1e-5
    )
    torch.testing.assert_close(
        batch["inputs"].double().std(correction=0), torch.tensor(1.0).double(), rtol=0, atol=1e-5
    )
    # The validation images are brought to the same scale, not to their own.
    assert other["inputs"].min() == batch["inputs"].min()
    assert other["inputs"].max() == batch["inputs"].max()
    assert train.num_targets([3, 1, 4]) == 3


def test_digits_are_the_ones_of_scikit_learn() -> None:
    from sklearn.datasets import load_digits

    train, validation = digits()
    raw = load_digits()
    found = {
        (picture.round().to(torch.int).flatten().tolist().__repr__(), int(label))
        for dataset in (train, validation)
        for picture, label in zip(*_raw(dataset), strict=True)
    }
    assert found == {
        (i.astype(int).flatten().tolist().__repr__(), int(t))
        for i, t in zip(raw.images, raw.target, strict=True)
    }


def _raw(dataset: ImageDataset) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels from 0 to 16, and labels."""
    batch = everything(dataset)
    mean, std = dataset._scale
    return (batch["inputs"] * std + mean) * 16, batch["labels"]


def test_the_split_depends_on_the_number_of_the_image_alone() -> None:
    small, large = (
        digits(validation_fraction=fraction)[1]._numbers.tolist() for fraction in (0.1, 0.3)
    )
    assert set(small) < set(large)  # more is held out, nothing returns
    hashes = [hashlib.sha256(f"digits/{i}".encode()).digest() for i in range(1797)]
    assert small == [
        i for i, digest in enumerate(hashes) if int.from_bytes(digest[:8], "big") < 0.1 * 2**64
    ]


def test_facts_and_pickle() -> None:
    train, validation = digits()
    assert train.facts["digest"] == validation.facts["digest"] == "65e5b4619795"
    assert (train.facts["samples"], train.facts["bytes"]) == (len(train), 1797 * 64)
    assert len(pickle.dumps(train)) < 200_000
    again = pickle.loads(pickle.dumps(train))
    assert torch.equal(everything(again)["inputs"], everything(train)["inputs"])


def test_frequency_loss_by_hand(pngs: Path) -> None:
    train, validation = folder(pngs)
    counts = torch.bincount(everything(train)["labels"], minlength=3).double()
    p = (counts + 1) / (len(train) + 3)
    expected = -p.log()[everything(validation)["labels"]]
    assert frequency_loss(train, validation) == pytest.approx(float(expected.mean()), abs=1e-12)
    assert frequency_loss(train, validation, [1]) == pytest.approx(float(expected[1]), abs=1e-12)
    # ten classes, about equally frequent
    assert frequency_loss(*digits()) == pytest.approx(np.log(10), abs=0.01)


def test_augmentation_is_a_function_of_the_generator(pngs: Path) -> None:
    for train, validation in (digits(augment=True), folder(pngs, augment=True)):
        torch.manual_seed(0)
        first, again, other = (
            train.batch(range(8), torch.Generator().manual_seed(seed))["inputs"]
            for seed in (1, 1, 2)
        )
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        one, two = (
            validation.batch([0, 1, 2], torch.Generator().manual_seed(seed))["inputs"]
            for seed in (1, 2)
        )
        assert torch.equal(one, two)  # validation images never vary
        torch.manual_seed(0)
        expected = torch.rand(3)
        torch.manual_seed(0)
        train.batch([0], torch.Generator())
        assert torch.equal(torch.rand(3), expected)  # torch's own generator is left alone


def test_digits_are_shifted_by_a_pixel_at_most_and_never_mirrored() -> None:
    plain, varied = digits()[0], digits(augment=True)[0]
    raw, _ = _raw(plain)
    generator = torch.Generator().manual_seed(0)
    framed = torch.nn.functional.pad(raw, (1, 1, 1, 1))
    mean, std = plain._scale
    seen = set()
    for _ in range(20):
        images = (varied.batch(range(5), generator)["inputs"] * std + mean) * 16
        for i, image in enumerate(images):
            ways = [
                (y, x)
                for y in range(3)
                for x in range(3)
                if torch.allclose(framed[i, :, y : y + 8, x : x + 8], image, atol=1e-3)
            ]
            assert ways
            seen.add(ways[0])
    assert len(seen) == 9


def test_a_folder_is_read_as_it_is(pngs: Path) -> None:
    train, validation = folder(pngs)
    assert train.class_names == ("ant", "bee", "cat")
    assert (train.shape, train.num_classes) == ((3, 6, 6), 3)
    assert len(train) + len(validation) == 30
    assert (train.facts["files"], train.facts["skipped_files"], train.facts["classes"]) == (
        30,
        2,
        3,
    )
    assert train.facts["bytes"] == sum(path.stat().st_size for path in pngs.rglob("*.png"))
    mean, std = train._scale
    pictures = train._collection
    for dataset in (train, validation):
        batch = everything(dataset)
        for image, label, number in zip(
            batch["inputs"], batch["labels"], dataset._numbers, strict=True
        ):
            name = pictures.names[number]
            assert name.split("/")[0] == train.class_names[int(label)]
            pixels = torch.from_numpy(np.array(Image.open(pngs / name))).permute(2, 0, 1)
            torch.testing.assert_close(
                (image * std + mean) * 255, pixels.float(), rtol=0, atol=1e-3
            )
    inputs = everything(train)["inputs"].double()
    # float32 pixels and statistics: 6e-8 each, of numbers below 4.
    torch.testing.assert_close(inputs.mean((0, 2, 3)), torch.zeros(3).double(), rtol=0, atol=1e-5)
    torch.testing.assert_close(
        inputs.std((0, 2, 3), correction=0), torch.ones(3).double(), rtol=0, atol=1e-5
    )
    assert len(pickle.dumps(train)) < 10_000  # paths, not pixels


def test_images_of_any_size_and_mode(tmp_path: Path) -> None:
    """A wide picture keeps its middle; gray, palette and transparent ones become RGB."""
    wide = np.zeros((4, 12, 3), dtype=np.uint8)
    wide[:, 4:8] = (10, 20, 30)
    wide[:, :4] = wide[:, 8:] = 255
    for name, image in (
        ("a/wide.png", Image.fromarray(wide)),
        ("a/gray.png", Image.new("L", (4, 4), 7)),
        ("b/alpha.png", Image.new("RGBA", (5, 5), (1, 2, 3, 0))),
        ("b/palette.gif", Image.new("P", (9, 4))),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        image.save(tmp_path / name)
    train, _ = folder(tmp_path, size_px=4, validation_fraction=0.5)
    pixels = train._collection.read(np.arange(4)) * 255
    names = train._collection.names
    assert pixels.shape == (4, 3, 4, 4)
    assert (pixels[names.index("a/wide.png")].amax((1, 2)) == torch.tensor([10, 20, 30])).all()
    assert (pixels[names.index("a/gray.png")] == 7).all()
    assert (pixels[names.index("b/alpha.png")].amax((1, 2)) == torch.tensor([1, 2, 3])).all()


def test_workers_read_the_same(pngs: Path) -> None:
    train, _ = folder(pngs, augment=True)
    plan = Plan(num_samples=len(train), effective_batch_size=8, micro_batch_size=4, seed=3)

    def micro_batches(workers: int, rank: int, size: int) -> list[torch.Tensor]:
        loader = Loader(train, plan, rank, size, workers=workers)
        found = [
            micro_batch["inputs"] for _, window in loader.windows(0, 0, 3) for micro_batch in window
        ]
        loader.close()
        return found

    alone = micro_batches(0, 0, 1)
    assert len(alone) == 6
    assert all(torch.equal(a, b) for a, b in zip(alone, micro_batches(1, 0, 1), strict=True))
    dealt = [micro_batches(0, rank, 2) for rank in (0, 1)]
    assert all(
        torch.equal(dealt[i % 2][i // 2], micro_batch) for i, micro_batch in enumerate(alone)
    )


def test_a_broken_file_is_named(pngs: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(8):
            Image.new("RGB", (4, 4)).save(tmp_path / name / f"{i}.png")
    train, validation = folder(tmp_path)
    (tmp_path / validation._collection.names[validation._numbers[0]]).write_bytes(b"no image")
    with pytest.raises(ConfigError, match=r"\d\.png cannot be read as an image"):
        everything(validation)
    Image.new("I;16", (4, 4)).save(tmp_path / validation._collection.names[validation._numbers[0]])
    with pytest.raises(ConfigError, match="more than 8 bits"):
        everything(validation)
    (tmp_path / train._collection.names[train._numbers[0]]).write_bytes(b"no image")
    with pytest.raises(ConfigError, match="cannot be read as an image"):
        folder(tmp_path)  # statistics of the training images read it at the start


def test_what_is_refused(pngs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"validation_fraction \(1\) must be"):
        digits(validation_fraction=1)
    with pytest.raises(
        ConfigError, match=r"None of the 1797 images of .* is in the validation split"
    ):
        digits(validation_fraction=1e-9)
    with pytest.raises(
        ConfigError, match="the digits come with scikit-learn and have their own size"
    ):
        load_images(ImagesConfig("images", ImageSource.digits, None, 16, False, 0.2))
    with pytest.raises(ConfigError, match=r"data.size_px=None: .* data.size_px=64"):
        folder(pngs, size_px=None)
    with pytest.raises(ConfigError, match="is not a folder"):
        folder(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="0 sub-folders with images"):
        folder(tmp_path)
    (tmp_path / "a").mkdir()
    with pytest.raises(ConfigError, match="no image in the folder a"):
        folder(tmp_path)
    Image.new("RGB", (4, 4)).save(tmp_path / "lonely.png")
    with pytest.raises(ConfigError, match=r"lonely\.png is in no class"):
        folder(tmp_path)
    with pytest.raises(IndexError, match="samples are numbered"):
        digits()[0].batch([5000], torch.Generator())
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ConfigError, match=r"pip install distaccum\[images\]"):
        digits()
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ConfigError, match=r"pip install distaccum\[images\]"):
        folder(pngs)
