"""MNISTDataModule: uint8 images in memory, a batch is one index operation.

B = batch size. A batch is (images, labels): uint8 (B, 1, 28, 28), 0 = paper, 255 = ink, and int64 (B,). Normalising and
resizing are the model's: the pixels that a model was trained on and those it is asked about can't disagree.
"""

import math
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from jsonargparse.typing import NonNegativeFloat, PositiveInt, restricted_number_type
from lightning.pytorch import LightningDataModule
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from mnist_lightning.errors import UserError
from mnist_lightning.sources import Digits, Split, load_digits, load_mnist

Batch = tuple[Tensor, Tensor]

AHEAD = 512  # training images that are gathered at once: a megabyte of features, which fits a CPU's cache
EVAL_BATCH = 250  # divides 5,000 and 10,000; on CPUs its activations still fit the cache
MNIST_TRAIN = 60000  # the training images that val_size is counted in

ValSize = restricted_number_type("ValSize", int, [(">=", 0), ("<", MNIST_TRAIN)])


class MNISTDataModule(LightningDataModule):
    """The official 60,000/10,000 images, 5,000 of the 60,000 kept for validation; or digits that need no network.

    The test set is never trained on, never chosen by, never truncated, on any number of processes.

    Args:
        source: mnist is the official files (in data_dir, else downloaded), digits is the 1,797 that scikit-learn ships;
            auto takes mnist where it can be had, else digits, and says so.
        data_dir: folder that holds, or gets, MNIST/raw with the four official files.
        mirrors: addresses to download MNIST from, tried in order; the default is torchvision's list.
        batch_size: training images a step, on each process.
        val_size: training images kept for validation, of MNIST's 60,000 (digits keeps the same share). 0 trains on all
            of them and keeps the last epoch.
        split_seed: which images those are. Independent of --seed_everything.
        train_size: train on so many of the training images only, of each digit as many; the default is all.
        augment: turn, shift, scale and slant each training image at random, anew each time: 0 not at all, 1 by up to
            12 degrees, 2.5 pixels, an eighth, 0.15; another number scales these. On the device, in training only.

    Raises:
        UserError: val_size leaves nothing to train on, train_size is more than that, or the data can't be had.
    """

    def __init__(
        self,
        source: Literal["auto", "mnist", "digits"] = "auto",
        data_dir: str = "data",
        mirrors: list[str] | None = None,
        batch_size: PositiveInt = 64,
        val_size: ValSize = 5000,  # type: ignore[valid-type]
        split_seed: int = 0,
        train_size: PositiveInt | None = None,
        augment: NonNegativeFloat = 0.0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        if "data_dir" in self.hparams:
            self.save_hyperparameters({**self.hparams, "data_dir": str(data_dir)})  # weights_only=True refuses a Path
        self.source: str = source  # mnist or digits once the data was loaded
        self.data_dir, self.mirrors, self.batch_size = data_dir, mirrors, batch_size
        self.val_size, self.split_seed, self.train_size, self.augment = val_size, split_seed, train_size, augment
        self.fell_back = False  # from MNIST to digits
        self.features: Digits | None = None  # in place of the images, while a frozen backbone's head trains
        self.resumed_seed: int | None = None
        self._digits: Digits | None = None

    def prepare_data(self) -> None:
        self._load()

    def setup(self, stage: str) -> None:
        self.resumed_seed = None
        self.digits = self._load()
        if self.trainer is not None and self.trainer.world_size > 1:
            chosen = self.trainer.strategy.broadcast(self.source)
            if self.source != chosen:  # auto, on a host without the files
                raise UserError(f"the same data on every host ({chosen})", self.source, "give --data.source.")
        train, val = split(len(self.digits.train.labels), self.val_size, self.split_seed)
        if self.train_size is not None:
            train = balanced(train, self.digits.train.labels, self.train_size)
            kept = torch.cat([train, val])  # the others go, so that no frozen layer has to see them
            part = Split(self.digits.train.images[kept], self.digits.train.labels[kept])
            self.digits = self.digits._replace(train=part)
            train, val = torch.arange(len(kept)).split([len(train), len(val)])
        self.indices = {"train": train, "val": val, "test": torch.arange(len(self.digits.test.labels))}

    def load(self) -> Digits:
        """The training and test images. For other images override this, see docs/make-it-yours.md.

        Raises:
            UserError: they can't be had.
        """
        try:
            digits = load_digits() if self.source == "digits" else load_mnist(self.data_dir, self.mirrors)
            self.source = "digits" if self.source == "digits" else "mnist"
        except UserError as error:
            if self.source == "mnist":
                raise
            digits, self.source, self.fell_back = load_digits(), "digits", True
            rank_zero_only(print)(
                f"WARNING: MNIST can't be had, so this run uses scikit-learn's 1,797 digits instead.\n{error}",
                file=sys.stderr,
            )
        if "source" in self.hparams:  # so that the run and its checkpoints name it
            self.save_hyperparameters({**self.hparams, "source": self.source})
        return digits

    def _load(self) -> Digits:
        if self._digits is None:
            self._digits = self.load()
        return self._digits

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        trainer: Any = self.trainer
        if not (self.augment and trainer.training):
            return batch
        images, labels = batch
        # Seeded by the place in the run: a resumed run draws the same changes, with no generator's state to keep.
        loader, (processes, rank) = trainer.train_dataloader, self._share()
        step = loader.sampler.epoch * len(loader) + loader.yielded
        generator = torch.Generator(images.device).manual_seed((self._seed() << 32) + step * processes + rank)
        return affine(images, self.augment, generator), labels

    def state_dict(self) -> dict[str, int]:
        return {"seed": self._seed()}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.resumed_seed = state_dict["seed"]

    def train_dataloader(self) -> DataLoader:
        # DistributedSampler in every case: its order depends on seed and epoch alone, on one process or several.
        part = Part(self, "train")
        sampler: DistributedSampler = DistributedSampler(part, *self._share(), shuffle=True, seed=self._seed())
        return ResumableLoader(part, batch_size=self.batch_size, sampler=sampler)

    def val_dataloader(self) -> DataLoader | list[Any]:
        return self._eval_dataloader("val") if len(self.indices["val"]) else []

    def test_dataloader(self) -> DataLoader:
        return self._eval_dataloader("test")

    def predict_dataloader(self) -> DataLoader:
        return self._eval_dataloader("test")

    def _eval_dataloader(self, name: str) -> DataLoader:
        # Lightning's default sampler repeats images to make the processes' shares equal; this one is exact.
        part, collate = Part(self, name), cast(Any, finished)
        sampler = UnrepeatedDistributedSampler(part, *self._share(), shuffle=False)
        return DataLoader(part, batch_size=EVAL_BATCH, sampler=sampler, collate_fn=collate)

    def _seed(self) -> int:
        """Of the order of the training images: where seed_everything leaves it, or the resumed run's."""
        return int(os.environ.get("PL_GLOBAL_SEED", 0)) if self.resumed_seed is None else self.resumed_seed

    def _share(self) -> tuple[int, int]:
        """How many processes there are, and which one this is."""
        return (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)


class Part(Dataset[Batch]):
    """The training, validation or test images of a datamodule as a dataset that hands out finished batches."""

    def __init__(self, data: MNISTDataModule, name: str) -> None:
        self.data, self.name = data, name

    def __len__(self) -> int:
        return len(self.data.indices[self.name])

    def __getitems__(self, positions: Sequence[int]) -> Batch:
        """The loaders call this instead of 64 times `__getitem__`."""
        source = self.data.features or self.data.digits
        split = source.test if self.name == "test" else source.train
        index = self.data.indices[self.name][positions]
        # Not images[index], which is slower.
        return split.images.index_select(0, index), split.labels.index_select(0, index)


class ResumableLoader(DataLoader):
    """A DataLoader whose place in the epoch is part of the checkpoint: a killed run goes on with the next batch.

    Lightning saves the state of a training loader that has these two methods. On resume it calls `load_state_dict`,
    `iter()` and the sampler's `set_epoch`, in that order, and it never exhausts the iterator of an epoch.
    """

    yielded = 0  # batches of this epoch
    saved: dict[str, int] | None = None

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.sampler.epoch, "yielded": self.yielded}  # type: ignore[attr-defined]

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.saved = state

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        # A generator: this runs at the first batch, when the sampler already knows its epoch.
        saved, self.saved = self.saved, None
        same_epoch = saved is not None and saved["epoch"] == self.sampler.epoch  # type: ignore[attr-defined]
        self.yielded = saved["yielded"] if saved and same_epoch else 0
        size = cast(int, self.batch_size)
        positions = torch.tensor(list(self.sampler))[self.yielded * size :]
        # Not by super().__iter__(): that takes the positions one by one, as Python's integers, and batch by batch.
        for several in positions.split(max(1, AHEAD // size) * size):
            parts = self.dataset.__getitems__(several)  # type: ignore[attr-defined]
            for batch in zip(*(part.split(size) for part in parts), strict=True):
                self.yielded += 1
                yield batch


def finished(batch: Batch) -> Batch:
    """`__getitems__` already returned a batch: nothing to collate."""
    return batch


def split(count: int, val_size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Which of `count` images are for training and which for validation: two int64 tensors of indices.

    Disjoint, covering, and the same on every machine for the same seed.

    Raises:
        UserError: val_size leaves nothing to train on.
    """
    if not 0 <= val_size < MNIST_TRAIN:
        raise UserError(f"a val_size from 0 to {MNIST_TRAIN - 1}", str(val_size), "the default is 5000.")
    kept = round(count * val_size / MNIST_TRAIN)
    kept = min(max(kept, min(val_size, 1)), count - 1)  # of few images, too, some in each part
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order[kept:], order[:kept]


def balanced(indices: Tensor, labels: Tensor, size: int) -> Tensor:
    """The first `size` of `indices` by turns: one of each digit, a second of each, and so on.

    Args:
        indices: of images, in the order in which they are to be taken.
        labels: of all images.

    Raises:
        UserError: there are fewer.
    """
    if size > len(indices):
        raise UserError(f"a train_size up to {len(indices)}", str(size), "leave it out to train on all.")
    one_hot = F.one_hot(labels[indices])
    turn = one_hot.cumsum(0)[one_hot.bool()]  # of each image among those of its digit
    return indices[turn.argsort(stable=True)[:size]]


def affine(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Each of uint8 images (B, 1, H, W) under an affine map of its own; outside of the image is paper.

    Torchvision's RandomAffine draws one map for a whole batch.
    """
    draws = strength * (2 * torch.rand(6, len(images), generator=generator, device=images.device) - 1)
    angle, slant = math.radians(12) * draws[0], 0.15 * draws[1]
    scale_x, scale_y = (0.12 * draws[2]).exp(), (0.12 * draws[3]).exp()
    shift_x, shift_y = 2.5 / 14 * draws[4], 2.5 / 14 * draws[5]  # grid_sample's unit is half an image, 14 pixels
    rows = [
        torch.stack([angle.cos() * scale_x, (slant - angle.sin()) * scale_y, shift_x], dim=1),
        torch.stack([angle.sin() * scale_x, angle.cos() * scale_y, shift_y], dim=1),
    ]
    grid = F.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)  # (B, H, W, 2)
    return F.grid_sample(images.float(), grid, align_corners=False).round().to(images.dtype)
