"""MNISTDataModule: what is trained on, chosen by and tested on; its source; few images; the augmentation."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from running import Numbered, labels_of, ready
from torch import Tensor

from mnist_lightning import data
from mnist_lightning.data import MNISTDataModule, affine, balanced, split
from mnist_lightning.errors import UserError
from mnist_lightning.sources import load_mnist

# ---- The split


def test_split_is_55000_and_5000_the_same_on_every_machine() -> None:
    train, val = split(60000, val_size=5000, seed=0)
    assert (len(train), len(val)) == (55000, 5000)
    assert sorted(train.tolist() + val.tolist()) == list(range(60000))
    # torch.randperm is Fisher and Yates's shuffle by MT19937: the first five were computed with NumPy's generator, too.
    assert val[:5].tolist() == [36044, 10678, 57327, 55074, 21567]
    indices = val.numpy().astype("<i4").tobytes()
    assert hashlib.md5(indices, usedforsecurity=False).hexdigest() == "b42190d31cbf0ef3f1ddf7aa501ade18"


def test_split_follows_its_own_seed_alone() -> None:
    _, first = split(600, 50, seed=1)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    _, again = split(600, 50, seed=1)
    _, other = split(600, 50, seed=2)
    assert first.tolist() == again.tolist() != other.tolist()
    assert torch.equal(torch.get_rng_state(), state)  # nor does it disturb another's


@pytest.mark.parametrize(("val_size", "kept"), [(0, 0), (1, 1), (100, 100), (799, 799), (0.1, 80), (0.25, 200)])
def test_val_size_is_a_number_of_images_or_a_share_below_1(val_size: float, kept: int) -> None:
    train, val = split(800, val_size, seed=0)
    assert (len(train), len(val)) == (800 - kept, kept)


@pytest.mark.parametrize("val_size", [-1, 1.5, 300, 301, 0.999])
def test_val_size_that_is_none_or_leaves_nothing_to_train_on_is_refused(val_size: float) -> None:
    with pytest.raises(UserError, match=rf"val_size from 0 to 299 images\ngot {val_size}\ngive --data.val_size 0.1"):
        ready(Numbered(val_size=val_size))


@pytest.mark.parametrize(("val_size", "kept"), [(5000, 120), (0, 0), (1, 1), (0.5, 718)])
def test_bundled_digits_keep_the_share_that_mnist_keeps(val_size: float, kept: int) -> None:
    datamodule = ready(MNISTDataModule(source="digits", val_size=val_size))
    assert (len(datamodule.train_set), len(datamodule.val_set)) == (1437 - kept, kept)
    assert (datamodule.val_dataloader() == []) == (kept == 0)


@pytest.mark.parametrize("split_seed", [0, 1])
def test_training_and_validation_images_are_those_of_the_split(split_seed: int) -> None:
    datamodule = ready(Numbered(val_size=60, split_seed=split_seed))
    train, val = split(300, 60, split_seed)
    assert labels_of(datamodule.val_dataloader()) == val.tolist()
    assert sorted(labels_of(datamodule.train_dataloader())) == sorted(train.tolist())


# ---- The batches


@pytest.mark.parametrize(("part", "size"), [("train", 64), ("val", 250), ("test", 200), ("predict", 200)])
def test_batches_are_uint8_images_and_int64_labels(part: str, size: int, mnist_dir: str) -> None:
    datamodule = ready(MNISTDataModule(source="mnist", data_dir=mnist_dir, val_size=320))
    images, labels = next(iter(getattr(datamodule, f"{part}_dataloader")()))
    assert (images.shape, images.dtype) == ((size, 1, 28, 28), torch.uint8)
    assert (labels.shape, labels.dtype) == ((size,), torch.int64)


def test_batch_of_the_few_bundled_digits_is_16() -> None:
    datamodule = ready(MNISTDataModule(source="digits"))
    assert len(next(iter(datamodule.train_dataloader()))[1]) == 16


# ---- The source


def test_auto_takes_mnist_where_it_is_and_reads_it_once(
    mnist_dir: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(data, "load_mnist", lambda *args: calls.append(args) or load_mnist(*args))
    datamodule = ready(MNISTDataModule(data_dir=mnist_dir, val_size=0.1))
    datamodule.setup("test")
    assert (datamodule.source, datamodule.hparams["source"], datamodule.fell_back) == ("mnist", "mnist", False)
    assert calls == [(mnist_dir, None)]
    assert capsys.readouterr().err == ""


def test_digits_ask_neither_disk_nor_network(tmp_path: Path, server: Any) -> None:
    ready(MNISTDataModule(source="digits", data_dir=str(tmp_path / "data"), mirrors=[server.url]))
    assert server.requests == []
    assert not (tmp_path / "data").exists()


# ---- Few images


def test_train_size_takes_as_many_of_each_class_as_there_are() -> None:
    labels = torch.randint(10, (600,), generator=torch.Generator().manual_seed(0))
    chosen = balanced(torch.arange(600), labels, 200)
    assert labels[chosen].bincount().tolist() == [20] * 10
    assert len(set(chosen.tolist())) == 200
    rare = torch.tensor([0] * 5 + [1] * 2)
    assert rare[balanced(torch.arange(7), rare, 6)].bincount().tolist() == [4, 2]


def test_train_size_leaves_validation_as_it_is_and_drops_the_rest() -> None:
    whole, few = ready(Numbered(val_size=60)), ready(Numbered(val_size=60, train_size=50))
    assert torch.equal(few.val_set.labels, whole.val_set.labels)
    assert set(few.train_set.labels.tolist()) < set(whole.train_set.labels.tolist())
    assert len(few.train_set) == 50
    with pytest.raises(UserError, match=r"expected a train_size up to 240\ngot 241"):
        ready(Numbered(val_size=60, train_size=241))


# ---- The augmentation


def blobs(x: float, y: float, strength: float) -> Tensor:
    """Where 1,000 random maps, the same at each call, take a blob at (x, y) from the image's centre: (1000, 2)."""
    pixels = torch.arange(28.0) - 13.5
    blob = 255 * torch.exp(-((pixels - x) ** 2 + (pixels.view(-1, 1) - y) ** 2) / 8)
    torch.manual_seed(0)
    moved = affine(blob.to(torch.uint8).expand(1000, 1, 28, 28), strength).float().squeeze(1)
    return torch.stack([moved.sum(1) @ pixels, moved.sum(2) @ pixels], dim=1) / moved.sum((1, 2)).unsqueeze(1)


@pytest.mark.parametrize("strength", [1, 0.5])
def test_each_image_has_a_map_of_its_own_within_what_the_help_says(strength: float) -> None:
    """Three blobs show an affine map, which is then taken apart into rotation, scales, shear and shift."""
    centre = blobs(0, 0, strength)
    forward = torch.stack([blobs(4, 0, strength) - centre, blobs(0, 4, strength) - centre], dim=2) / 4
    back = torch.linalg.inv(forward)  # from a place in the new image to its place in the old one
    angle = torch.atan2(back[:, 1, 0], back[:, 0, 0])
    width, height = back[:, :, 0].norm(dim=1), back[:, 1, 1] / angle.cos()
    shear = back[:, 0, 1] / height + angle.sin()
    shift = back @ centre.unsqueeze(2)
    found_and_limits = [
        (angle.rad2deg(), 12), (shift, 2.5), (width.log(), 0.12), (height.log(), 0.12), (shear, 0.15)
    ]  # fmt: skip
    for found, limit in found_and_limits:
        assert 0.9 < found.abs().max() / (strength * limit) < 1.15
        assert found.mean().abs() < 0.1 * strength * limit
    assert len(forward.flatten(1).unique(dim=0)) == 1000


def test_strength_0_is_the_image_itself() -> None:
    images = torch.randint(256, (4, 1, 28, 28), dtype=torch.uint8)
    assert torch.equal(affine(images, 0), images)
