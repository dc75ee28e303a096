"""The datamodule: what is trained on, chosen by and tested on, on any number of processes."""

import hashlib
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from mnist_lightning import data
from mnist_lightning.data import MNISTDataModule, affine, balanced, split
from mnist_lightning.errors import UserError
from mnist_lightning.sources import Digits, Split, load_mnist


@pytest.fixture(autouse=True)
def no_global_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another test's seed_everything leaves its seed in the environment."""
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)


def numbered(count: int) -> Split:
    """Images that can be told apart: label i for image i, and i modulo 251 as its only pixel."""
    labels = torch.arange(count)
    return Split((labels % 251).to(torch.uint8).view(-1, 1, 1, 1), labels)


def ready(data_dir: str, **kwargs: Any) -> MNISTDataModule:
    """The datamodule as `fit` has it after setup."""
    datamodule = MNISTDataModule(source="mnist", data_dir=data_dir, **kwargs)
    datamodule.prepare_data()
    datamodule.setup("fit")
    return datamodule


def ready_with(train: int = 0, val: int = 0, test: int = 0, **kwargs: Any) -> MNISTDataModule:
    """The same with so many numbered images: `train` from 0, then `val`; and `test` from 0."""
    datamodule = MNISTDataModule(**kwargs)
    datamodule.digits = Digits(numbered(train + val), numbered(test))
    images = torch.arange(train + val)
    datamodule.indices = {"train": images[:train], "val": images[train:], "test": torch.arange(test)}
    return datamodule


def labels_of(loader: DataLoader) -> list[int]:
    return torch.cat([labels for _, labels in loader]).tolist()


def on_rank(datamodule: MNISTDataModule, rank: int, world_size: int) -> MNISTDataModule:
    """`datamodule` as process `rank` of `world_size` sees it."""
    strategy = SimpleNamespace(broadcast=lambda value: value)
    datamodule.trainer = SimpleNamespace(world_size=world_size, global_rank=rank, strategy=strategy)
    return datamodule


# ---- The split


def test_split_is_55000_and_5000_disjoint_and_covering() -> None:
    train, val = split(60000, val_size=5000, seed=0)
    assert (len(train), len(val)) == (55000, 5000)
    assert sorted(train.tolist() + val.tolist()) == list(range(60000))


def test_split_is_the_same_on_every_machine() -> None:
    _, val = split(60000, val_size=5000, seed=0)
    # torch.randperm is Fisher and Yates's shuffle by MT19937: the first five were computed with NumPy's generator, too.
    assert val[:5].tolist() == [36044, 10678, 57327, 55074, 21567]
    indices = val.numpy().astype("<i4").tobytes()
    assert hashlib.md5(indices, usedforsecurity=False).hexdigest() == "b42190d31cbf0ef3f1ddf7aa501ade18"


def test_split_follows_its_own_seed_alone() -> None:
    _, first = split(600, 5000, seed=1)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    _, again = split(600, 5000, seed=1)
    _, other = split(600, 5000, seed=2)
    assert first.tolist() == again.tolist() != other.tolist()
    assert torch.equal(torch.get_rng_state(), state)  # nor does it disturb another's


def test_smaller_data_keeps_the_same_share_for_validation() -> None:
    train, val = split(1437, val_size=5000, seed=0)
    assert (len(train), len(val)) == (1317, 120)


@pytest.mark.parametrize(("val_size", "kept"), [(0, 0), (1, 1), (20, 1), (59_980, 1436), (59_999, 1436)])
def test_smaller_data_leaves_an_image_to_train_on_and_one_to_validate(val_size: int, kept: int) -> None:
    train, val = split(1437, val_size, seed=0)
    assert (len(train), len(val)) == (1437 - kept, kept)


def test_val_size_0_trains_on_every_image(mnist_dir: str) -> None:
    datamodule = ready(mnist_dir, val_size=0)
    assert len(labels_of(datamodule.train_dataloader())) == 640
    assert datamodule.val_dataloader() == []


@pytest.mark.parametrize("split_seed", [0, 1])
def test_training_and_validation_images_are_those_of_the_split(split_seed: int, mnist_dir: str) -> None:
    datamodule = ready(mnist_dir, val_size=30000, split_seed=split_seed)
    train, val = split(640, 30000, split_seed)
    every = load_mnist(mnist_dir).train
    assert labels_of(datamodule.val_dataloader()) == every.labels[val].tolist()
    images = torch.cat([images for images, _ in datamodule.train_dataloader()])
    assert sorted(images.sum((1, 2, 3)).tolist()) == sorted(every.images[train].sum((1, 2, 3)).tolist())


@pytest.mark.parametrize("val_size", [-1, 60000, 60001])
def test_val_size_that_leaves_nothing_to_train_on_is_refused(val_size: int, mnist_dir: str) -> None:
    with pytest.raises(UserError, match=rf"val_size from 0 to 59999\ngot {val_size}\n"):
        ready(mnist_dir, val_size=val_size)


# ---- The loaders


@pytest.mark.parametrize(("part", "size"), [("train", 32), ("val", 250), ("test", 200), ("predict", 200)])
def test_batches_are_uint8_images_and_int64_labels(part: str, size: int, mnist_dir: str) -> None:
    datamodule = ready(mnist_dir, batch_size=32, val_size=30000)
    images, labels = next(iter(getattr(datamodule, f"{part}_dataloader")()))
    assert (images.shape, images.dtype) == ((size, 1, 28, 28), torch.uint8)
    assert (labels.shape, labels.dtype) == ((size,), torch.int64)


@pytest.mark.parametrize("part", ["train", "val", "test", "predict"])
def test_images_keep_their_labels(part: str) -> None:
    for images, labels in getattr(ready_with(train=700, val=300, test=600), f"{part}_dataloader")():
        assert torch.equal(images.flatten().long(), labels % 251)


@pytest.mark.parametrize("part", ["train", "val", "test"])
def test_features_take_the_place_of_the_images_they_were_made_of(part: str) -> None:
    datamodule = ready_with(train=200, val=100, test=150)
    loader = getattr(datamodule, f"{part}_dataloader")()  # made before the features are known
    # Two features an image, which tell of which it is, and whether of the test set.
    features = [torch.stack([labels.float(), torch.full((len(labels),), float(test))], dim=1)
                for test, (_, labels) in enumerate(datamodule.digits)]  # fmt: skip
    labels = [split.labels for split in datamodule.digits]
    datamodule.features = Digits(Split(features[0], labels[0]), Split(features[1], labels[1]))
    for given, answers in loader:
        assert torch.equal(given[:, 0].long(), answers)
        assert (given[:, 1] == (part == "test")).all()


def orders(epochs: int, datamodule: MNISTDataModule) -> list[list[int]]:
    """The training labels as `epochs` epochs bring them."""
    loader = datamodule.train_dataloader()
    labels = []
    for epoch in range(epochs):
        loader.sampler.set_epoch(epoch)
        labels.append(labels_of(loader))
    return labels


def test_each_epoch_has_every_training_image_once_in_another_order() -> None:
    epochs = orders(3, ready_with(train=587, batch_size=64))  # 587 is not a multiple of 64
    assert all(sorted(labels) == list(range(587)) for labels in epochs)
    assert all(one != other for one, other in itertools.combinations([*epochs, list(range(587))], 2))


def test_order_follows_the_seed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    datamodule = ready_with(train=587)
    by_seed = {}
    for seed in ("1", "2"):
        monkeypatch.setenv("PL_GLOBAL_SEED", seed)
        by_seed[seed] = orders(2, datamodule)
        torch.rand(1)  # whatever else draws random numbers in between
        assert orders(2, datamodule) == by_seed[seed]
    assert by_seed["1"] != by_seed["2"]


@pytest.mark.parametrize("batch_size", [64, 100, 600])  # eight are gathered at once, five, one
def test_loader_goes_on_with_the_batch_after_those_it_has_given(batch_size: int) -> None:
    datamodule = ready_with(train=1299, batch_size=batch_size)
    whole = [labels.tolist() for _, labels in datamodule.train_dataloader()]
    assert [len(batch) for batch in whole] == [batch_size] * (1299 // batch_size) + [1299 % batch_size]
    for given in range(len(whole)):
        first, second = datamodule.train_dataloader(), datamodule.train_dataloader()
        list(zip(range(given), first, strict=False))
        second.load_state_dict(first.state_dict())
        assert [labels.tolist() for _, labels in second] == whole[given:]


class Watcher(LightningModule):
    """Notes the labels that the Trainer hands it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.epochs: dict[int, list[int]] = {}

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self.epochs.setdefault(self.current_epoch, []).extend(batch[1].tolist())
        return self.weight * 1.0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_trainer_shuffles_anew_in_each_epoch(tmp_path: Path) -> None:
    watcher = Watcher()
    trainer = Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(watcher, ready_with(train=150).train_dataloader())
    assert [sorted(labels) for labels in watcher.epochs.values()] == [list(range(150))] * 2
    assert watcher.epochs[0] != watcher.epochs[1]


@pytest.mark.parametrize("count", [1, 249, 250, 251, 777])
def test_evaluation_sees_every_image_in_order(count: int) -> None:
    datamodule = ready_with(train=10, val=count, test=count)
    assert labels_of(datamodule.val_dataloader()) == list(range(10, 10 + count))
    assert labels_of(datamodule.test_dataloader()) == list(range(count))
    assert labels_of(datamodule.predict_dataloader()) == list(range(count))


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("part", ["val", "test", "predict"])
def test_processes_share_the_evaluation_without_a_repeat_or_a_gap(part: str, world_size: int) -> None:
    datamodule = ready_with(val=1000, test=1000)  # not a multiple of 3
    shares = [
        labels_of(getattr(on_rank(datamodule, rank, world_size), f"{part}_dataloader")()) for rank in range(world_size)
    ]
    assert sorted(itertools.chain(*shares)) == list(range(1000))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_the_training_images_in_equal_parts(world_size: int) -> None:
    datamodule = ready_with(train=587)
    shares = [labels_of(on_rank(datamodule, rank, world_size).train_dataloader()) for rank in range(world_size)]
    assert set(itertools.chain(*shares)) == set(range(587))
    # Padded with repeats: the others would wait for ever for a process that runs out of batches.
    assert {len(share) for share in shares} == {-(-587 // world_size)}


# ---- The source


def test_auto_takes_mnist_where_it_is(mnist_dir: str, capsys: pytest.CaptureFixture) -> None:
    datamodule = MNISTDataModule(data_dir=mnist_dir)
    datamodule.prepare_data()
    assert (datamodule.source, datamodule.hparams["source"], datamodule.fell_back) == ("mnist", "mnist", False)
    datamodule.setup("fit")
    assert len(datamodule.digits.train.labels) == 640
    assert capsys.readouterr().err == ""


def test_auto_without_mnist_falls_back_to_digits_and_says_why(
    tmp_path: Path, server: Any, capsys: pytest.CaptureFixture
) -> None:
    datamodule = MNISTDataModule(data_dir=str(tmp_path), mirrors=[server.url])
    datamodule.prepare_data()
    datamodule.setup("fit")
    assert (datamodule.source, datamodule.hparams["source"], datamodule.fell_back) == ("digits", "digits", True)
    assert {name: len(indices) for name, indices in datamodule.indices.items()} == {
        "train": 1317,
        "val": 120,
        "test": 360,
    }
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("WARNING") == 1
    assert "scikit-learn's 1,797 digits" in captured.err
    assert f"got {server.url} (HTTP Error 404: Not Found)\n" in captured.err


def test_fallback_keeps_the_other_hyperparameters(tmp_path: Path, server: Any) -> None:
    datamodule = MNISTDataModule(data_dir=str(tmp_path), mirrors=[server.url], batch_size=7)
    before = dict(datamodule.hparams)
    datamodule.prepare_data()
    assert dict(datamodule.hparams) == before | {"source": "digits"}


def test_mnist_never_falls_back(tmp_path: Path, server: Any, capsys: pytest.CaptureFixture) -> None:
    datamodule = MNISTDataModule(source="mnist", data_dir=str(tmp_path), mirrors=[server.url])
    for call in (datamodule.prepare_data, lambda: datamodule.setup("fit")):
        with pytest.raises(UserError, match="HTTP Error 404"):
            call()
    assert datamodule.source == "mnist"
    assert "digits instead" not in capsys.readouterr().err


def test_digits_ask_neither_disk_nor_network(tmp_path: Path, server: Any) -> None:
    datamodule = MNISTDataModule(source="digits", data_dir=str(tmp_path / "data"), mirrors=[server.url])
    datamodule.prepare_data()
    datamodule.setup("test")
    assert (datamodule.source, len(datamodule.digits.test.labels)) == ("digits", 360)
    assert server.probes == []
    assert not (tmp_path / "data").exists()


def test_files_are_read_once_however_often_lightning_asks(mnist_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(data, "load_mnist", lambda *args: calls.append(args) or load_mnist(*args))
    datamodule = ready(mnist_dir)
    datamodule.setup("test")
    assert calls == [(mnist_dir, None)]


def test_hosts_with_different_data_are_refused(mnist_dir: str) -> None:
    datamodule = on_rank(MNISTDataModule(source="digits"), rank=1, world_size=2)
    datamodule.trainer.strategy.broadcast = lambda value: "mnist"  # what rank 0 found
    with pytest.raises(UserError, match=r"the same data on every host \(mnist\)\ngot digits\n"):
        datamodule.setup("fit")


# ---- Few images


def test_train_size_takes_as_many_of_each_digit() -> None:
    labels = torch.randint(10, (600,), generator=torch.Generator().manual_seed(0))
    chosen = balanced(torch.arange(600), labels, 200)
    assert labels[chosen].bincount().tolist() == [20] * 10
    assert len(set(chosen.tolist())) == 200


def test_train_size_beyond_the_rarest_digit_goes_on_with_the_others() -> None:
    labels = torch.tensor([0] * 5 + [1] * 2)
    assert labels[balanced(torch.arange(7), labels, 6)].bincount().tolist() == [4, 2]


def test_train_size_leaves_validation_as_it_is_and_drops_the_rest(mnist_dir: Path) -> None:
    whole, few = ready(str(mnist_dir)), ready(str(mnist_dir), train_size=50)

    def images(data: MNISTDataModule, part: str) -> list[bytes]:
        return [image.numpy().tobytes() for image in data.digits.train.images[data.indices[part]]]

    assert images(few, "val") == images(whole, "val")
    assert set(images(few, "train")) < set(images(whole, "train"))
    assert len(few.indices["train"]) == 50
    assert len(few.digits.train.labels) == 50 + len(few.indices["val"])  # a frozen backbone passes no others


def test_train_size_of_more_than_there_are_is_refused(mnist_dir: Path) -> None:
    with pytest.raises(UserError, match=r"expected a train_size up to 587\ngot 588"):
        ready(str(mnist_dir), train_size=588)


# ---- Augmentation


class Seen(LightningModule):
    """Trains nothing, and keeps the images that reach its steps."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: dict[str, list[Tensor]] = {"train": [], "val": []}

    def training_step(self, batch: data.Batch, batch_idx: int) -> Tensor:
        self.seen["train"].append(batch[0])
        return self.weight.sum()

    def validation_step(self, batch: data.Batch, batch_idx: int) -> None:
        self.seen["val"].append(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def seen(mnist_dir: Path, augment: float) -> dict[str, list[Tensor]]:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(accelerator="cpu", max_epochs=2, limit_train_batches=2, num_sanity_val_steps=0, **quiet)
    model = Seen()
    trainer.fit(model, MNISTDataModule(source="mnist", data_dir=str(mnist_dir), augment=augment))
    return model.seen


def test_augmentation_changes_training_images_alone_and_anew_each_time(mnist_dir: Path) -> None:
    plain, augmented, again = seen(mnist_dir, 0), seen(mnist_dir, 1), seen(mnist_dir, 1)
    assert all(map(torch.equal, plain["val"], augmented["val"]))
    assert all(map(torch.equal, augmented["train"], again["train"]))  # the same seed
    for before, after in zip(plain["train"], augmented["train"], strict=True):
        assert after.dtype == torch.uint8 and after.shape == before.shape
        assert (before != after).flatten(1).any(1).all()


def test_each_image_has_an_affine_map_of_its_own() -> None:
    image = torch.zeros(1, 1, 28, 28, dtype=torch.uint8)
    image[..., 8:20, 12:16] = 255
    different = affine(image.expand(64, 1, 28, 28), 1, torch.Generator().manual_seed(0)).flatten(1).unique(dim=0)
    assert len(different) == 64


def test_affine_maps_stay_within_what_the_help_says() -> None:
    """A dot at the centre moves by up to 2.5 pixels, one at 10 pixels from it by what turning, scale and slant add."""
    dot = torch.zeros(2000, 1, 28, 28, dtype=torch.uint8)
    dot[..., 13:15, 13:15] = 255
    moved = affine(dot, 1, torch.Generator().manual_seed(0)).float()
    rows = torch.arange(28.0)
    centre = torch.stack([(moved.sum((1, 3)) @ rows), (moved.sum((1, 2)) @ rows)]) / moved.sum((1, 2, 3))
    shift = (centre - 13.5).abs().amax()
    assert 2 < shift < 2.5 * 1.35  # the shift comes before scale and slant


def test_strength_0_is_the_image_itself() -> None:
    images = torch.randint(256, (4, 1, 28, 28), dtype=torch.uint8)
    assert torch.equal(affine(images, 0, torch.Generator()), images)
