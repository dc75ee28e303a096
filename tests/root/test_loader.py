"""What datamodules of images share: every image once, in an order of the seed's, on any number of processes."""

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, seed_everything
from running import Numbered, labels_of, ready
from torch import Tensor
from torch.utils.data import DataLoader

from mnist_lightning.data import MNISTDataModule, split


def on_rank(datamodule: MNISTDataModule, rank: int, world_size: int) -> MNISTDataModule:
    """`datamodule` as process `rank` of `world_size` sees it."""
    datamodule.trainer = SimpleNamespace(world_size=world_size, global_rank=rank)
    return datamodule


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
