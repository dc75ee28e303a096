"""The datamodule: what is trained on, chosen by and tested on, on any number of processes."""

import hashlib
import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, seed_everything
from torch import Tensor
from torch.utils.data import DataLoader

from mnist_lightning import data
from mnist_lightning.data import MNISTDataModule, affine, balanced, split
from mnist_lightning.errors import UserError
from mnist_lightning.sources import Digits, Split, load_mnist


class Numbered(MNISTDataModule):
    """Images that can be told apart: label i for image i, and i modulo 251 as its only pixel."""

    def __init__(self, train: int = 300, test: int = 300, val_size: int = 0, **kwargs: Any) -> None:
        super().__init__(val_size=val_size, **{"batch_size": 64, **kwargs})
        self.counts = train, test

    def load(self) -> Digits:
        labels = [torch.arange(count) for count in self.counts]
        return Digits(*(Split((label % 251).to(torch.uint8).view(-1, 1, 1, 1), label) for label in labels))


def ready(datamodule: MNISTDataModule) -> MNISTDataModule:
    """The datamodule as `fit` has it."""
    datamodule.setup("fit")
    return datamodule


def labels_of(loader: DataLoader) -> list[int]:
    """The labels that a loader of `Numbered` gives, in order, each with the image that it belongs to."""
    batches = list(loader)
    assert all(torch.equal(images.flatten().long(), labels % 251) for images, labels in batches)
    return torch.cat([labels for _, labels in batches]).tolist()


def on_rank(datamodule: MNISTDataModule, rank: int, world_size: int) -> MNISTDataModule:
    """`datamodule` as process `rank` of `world_size` sees it."""
    datamodule.trainer = SimpleNamespace(world_size=world_size, global_rank=rank)
    return datamodule


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


def test_a_position_gives_one_image_and_its_label() -> None:
    datamodule = ready(Numbered())
    image, label = datamodule.test_set[7]
    assert (image.shape, image.item(), label.item()) == ((1, 1, 1), 7, 7)
    plain = DataLoader(datamodule.test_set, batch_size=100)  # torch's own, without our loader
    assert [len(images) for images, _ in plain] == [100] * 3
    assert labels_of(plain) == list(range(300))


@pytest.mark.parametrize("part", ["train", "val", "test"])
def test_features_take_the_place_of_the_images_until_they_are_taken_back(part: str) -> None:
    datamodule = ready(Numbered(val_size=100))
    loader = getattr(datamodule, f"{part}_dataloader")()  # made before there are any
    labels = getattr(datamodule, f"{part}_set").labels
    datamodule.use_features(part, labels.float() / 2)
    for features, answers in loader:
        assert torch.equal(2 * features, answers.float())
    datamodule.use_features(part, None)
    assert all(isinstance(images, Tensor) and images.dtype == torch.uint8 for images, _ in loader)


def test_each_pass_has_every_training_image_once_in_another_order() -> None:
    loader = ready(Numbered(587)).train_dataloader()  # 587 is not a multiple of 64
    orders = [labels_of(loader) for _ in range(3)]
    assert all(sorted(labels) == list(range(587)) for labels in orders)
    assert all(one != other for one, other in itertools.combinations([*orders, list(range(587))], 2))


def test_order_follows_the_seed_and_the_epoch_alone() -> None:
    orders = []
    for seed in (1, 1, 2):
        seed_everything(seed, verbose=False)
        loader = ready(Numbered()).train_dataloader()
        torch.rand(len(orders))  # whatever else draws random numbers in between
        loader.sampler.set_epoch(3)
        orders.append(labels_of(loader))
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize("batch_size", [64, 100, 600])
def test_loader_goes_on_with_the_batch_after_those_it_has_given(batch_size: int) -> None:
    datamodule = ready(Numbered(587, batch_size=batch_size))
    loader = datamodule.train_dataloader()
    loader.sampler.set_epoch(1)
    whole = [labels.tolist() for _, labels in loader]
    assert [len(batch) for batch in whole] == [batch_size] * (587 // batch_size) + [587 % batch_size]
    for given in range(len(whole)):
        first, second = datamodule.train_dataloader(), datamodule.train_dataloader()
        first.sampler.set_epoch(1)
        list(zip(range(given), first, strict=False))
        second.load_state_dict(first.state_dict())
        second.sampler.set_epoch(1)
        assert [labels.tolist() for _, labels in second] == whole[given:]
        second.load_state_dict(first.state_dict())  # an epoch that had ended: the next one is whole
        assert len(labels_of(second)) == 587


@pytest.mark.parametrize("count", [1, 249, 250, 251, 777])
def test_evaluation_sees_every_image_in_order(count: int) -> None:
    datamodule = ready(Numbered(count + 10, count, val_size=count))
    assert labels_of(datamodule.val_dataloader()) == split(count + 10, count, 0)[1].tolist()
    assert labels_of(datamodule.test_dataloader()) == list(range(count))
    assert labels_of(datamodule.predict_dataloader()) == list(range(count))


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("part", ["val", "test", "predict"])
def test_processes_share_the_evaluation_without_a_repeat_or_a_gap(part: str, world_size: int) -> None:
    datamodule = ready(Numbered(1100, 1000, val_size=1000))  # not a multiple of 3
    loaders = [getattr(on_rank(datamodule, rank, world_size), f"{part}_dataloader")() for rank in range(world_size)]
    shares = [labels_of(loader) for loader in loaders]
    assert sum(map(len, shares)) == len(set().union(*shares)) == 1000
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_the_training_images_in_equal_parts(world_size: int) -> None:
    datamodule = ready(Numbered(587))
    shares = [labels_of(on_rank(datamodule, rank, world_size).train_dataloader()) for rank in range(world_size)]
    assert set(itertools.chain(*shares)) == set(range(587))
    # Padded with repeats: the others would wait for ever for a process that runs out of batches.
    assert {len(share) for share in shares} == {-(-587 // world_size)}


# ---- In a Trainer


class Watcher(LightningModule):
    """Trains nothing, and keeps the batches that reach its steps: those of each training epoch, and of validation."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.epochs: dict[int, list[Any]] = {}
        self.validated: list[Tensor] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self.epochs.setdefault(self.current_epoch, []).append(batch)
        return self.weight * 1.0

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.validated.append(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def labels(self) -> list[list[int]]:
        return [torch.cat([labels for _, labels in batches]).tolist() for batches in self.epochs.values()]


@pytest.mark.filterwarnings("ignore:You requested to overfit but enabled .* shuffling")
def test_overfit_batches_brings_the_same_batches_again_and_again(quiet: Callable) -> None:
    watcher = Watcher()
    quiet(max_epochs=3, overfit_batches=2).fit(watcher, Numbered(300, val_size=50))
    first, *others = watcher.labels()
    assert len(first) == 128
    assert others == [first] * 2


def test_augmentation_changes_training_images_alone_and_anew_each_time(quiet: Callable) -> None:
    plain, augmented, again = Watcher(), Watcher(), Watcher()
    for watcher, augment in ((plain, 0), (augmented, 1), (again, 1)):
        torch.manual_seed(0)
        digits = MNISTDataModule(source="digits", batch_size=32, train_size=32, val_size=400, augment=augment)
        quiet(max_epochs=2).fit(watcher, digits)
    first, second = plain.labels()
    assert first != second  # the Trainer shuffles anew
    assert all(map(torch.equal, plain.validated, augmented.validated))
    changes = []
    for epoch in (0, 1):
        (before, _), (after, _), (same, _) = (watcher.epochs[epoch][0] for watcher in (plain, augmented, again))
        assert after.dtype == torch.uint8 and after.shape == before.shape
        assert torch.equal(after, same)  # torch's global generator has drawn the maps: the seed repeats them
        changes.append((after.int() - before.int()).abs().flatten(1).sum(1).sort().values)
        assert changes[-1].all()
    assert not torch.equal(*changes)


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
