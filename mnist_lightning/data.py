"""MNISTDataModule: MNIST's images in memory, split, augmented and handed out in batches.

B = batch size, N = images of a data set. A batch is (images, labels): uint8 (B, 1, 28, 28), 0 = background, 255 =
stroke, and int64 (B,). The model normalises and resizes them, so that training, validation, photos and export all see
the same pixels. How batches are made of images in memory is in loader.py.
"""

import sys
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jsonargparse.typing import NonNegativeFloat, OpenUnitInterval, PositiveInt
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from mnist_lightning.errors import UserError
from mnist_lightning.loader import Images, ImagesDataModule
from mnist_lightning.sources import Digits, load_digits, load_mnist

MNIST_TRAIN = 60_000


class MNISTDataModule(ImagesDataModule):
    """MNIST's 60,000 + 10,000 images, 5,000 of the 60,000 kept for validation; or digits that need no network.

    The test set is never trained on, never used to choose by, and never truncated, on any number of processes.

    Args:
        source: mnist is the official files (in data_dir, else downloaded), digits the 1,797 that scikit-learn bundles;
            auto takes mnist where it can be had, else digits, and says so.
        data_dir: folder that holds, or gets, MNIST/raw with the four official files.
        mirrors: addresses to download MNIST from, tried in order; the default is torchvision's list.
        batch_size: training images a step, on each process; by default 64, and 16 of the few bundled digits, so that an
            epoch has steps enough.
        val_size: training images kept for validation: a number of images, or a share below 1. The bundled digits keep
            the same share as MNIST: 5000 of 60,000 is 120 of their 1,437. 0 trains on all and keeps the last epoch.
        split_seed: chooses which images those are. Independent of --seed_everything.
        train_size: train on only so many of the training images, the same number of each class; the default is all.
        augment: rotate, shift, scale and shear each training image at random, anew each time: 0 not at all, 1 by up to
            12 degrees, 2.5 pixels, an eighth, 0.15; other numbers scale these. On the device, in training only.

    Raises:
        UserError: an argument is out of range, val_size leaves nothing to train on, or the data can't be had.
    """

    def __init__(
        self,
        source: Literal["auto", "mnist", "digits"] = "auto",
        data_dir: str = "data",
        mirrors: list[str] | None = None,
        batch_size: PositiveInt | None = None,
        val_size: int | OpenUnitInterval = 5000,
        split_seed: int = 0,
        train_size: PositiveInt | None = None,
        augment: NonNegativeFloat = 0.0,
    ) -> None:
        super().__init__(batch_size)
        if source not in ("auto", "mnist", "digits"):
            raise UserError("a source: auto, mnist or digits", repr(source), "correct it.")
        data_dir = str(data_dir)  # a checkpoint holds no Path
        self.save_hyperparameters()
        self.source: str = source  # mnist or digits once the images are loaded
        self.data_dir, self.mirrors, self.val_size = data_dir, mirrors, val_size
        self.split_seed, self.train_size, self.augment = split_seed, train_size, augment
        self.fell_back = False  # from MNIST to the bundled digits
        self.loaded: Digits | None = None

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if self.loaded is None:
            self.loaded = self.load()
            self.batch_size = int(self.batch_size or (16 if self.source == "digits" else 64))
            settled = {"source": self.source, "batch_size": self.batch_size}  # not auto and None
            self.hparams.update({name: value for name, value in settled.items() if name in self.hparams})
        images, labels = self.loaded.train
        val_size = self.val_size
        if self.source == "digits" and val_size >= 1:
            val_size = max(1, round(len(labels) * val_size / MNIST_TRAIN))
        train, val = split(len(labels), val_size, self.split_seed)
        if self.train_size is not None:
            train = balanced(train, labels, self.train_size)
        self.train_set = Images(images[train], labels[train])
        self.val_set = Images(images[val], labels[val])
        self.test_set = Images(*self.loaded.test)

    def load(self) -> Digits:
        """The training and test images. For other images override this, see docs/make-it-yours.md.

        Raises:
            UserError: they can't be had.
        """
        if self.source == "digits":
            return load_digits()
        try:
            digits = load_mnist(self.data_dir, self.mirrors)
            self.source = "mnist"
        except UserError as error:
            if self.source == "mnist":
                raise
            digits, self.source, self.fell_back = load_digits(), "digits", True
            warning = "WARNING: MNIST can't be had, so this run uses scikit-learn's 1,797 digits instead."
            rank_zero_only(print)(f"{warning}\n{error}", file=sys.stderr)
        return digits

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if self.augment and self.trainer is not None and self.trainer.training:
            images, labels = batch
            return affine(images, self.augment), labels
        return batch


def split(count: int, val_size: int | float, seed: int) -> tuple[Tensor, Tensor]:
    """Which of `count` images are for training and which for validation: two int64 tensors of indices.

    Disjoint, covering, and the same on every machine for the same seed. val_size is a number of images, or a share
    below 1.

    Raises:
        UserError: val_size leaves nothing to train on.
    """
    kept = round(count * val_size) if 0 < val_size < 1 else val_size
    if kept not in range(count):
        raise UserError(f"a val_size from 0 to {count - 1} images", str(val_size), "give --data.val_size 0.1, a tenth.")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order[int(kept) :], order[: int(kept)]


def balanced(indices: Tensor, labels: Tensor, size: int) -> Tensor:
    """`size` of `indices`, the same number of each class, taken in their order. `labels` are those of all images.

    Raises:
        UserError: there are fewer.
    """
    if size > len(indices):
        raise UserError(f"a train_size up to {len(indices)}", str(size), "leave it out to train on all.")
    turn = torch.empty_like(indices)  # 0 for the first image of its class, 1 for the second, ...
    for label in labels[indices].unique():
        of_class = labels[indices] == label
        turn[of_class] = torch.arange(int(of_class.sum()))
    return indices[turn.argsort(stable=True)[:size]]


def affine(images: Tensor, strength: float) -> Tensor:
    """Each of uint8 images (B, 1, H, W) under a random affine map of its own; what comes in at the edges is background.

    Torchvision's RandomAffine draws one map for a whole batch.
    """
    draws = strength * (2 * torch.rand(6, len(images), device=images.device) - 1)
    angle, shear = torch.deg2rad(12 * draws[0]), 0.15 * draws[1]
    scale_x, scale_y = (0.12 * draws[2]).exp(), (0.12 * draws[3]).exp()
    shift_x, shift_y = 2.5 / 14 * draws[4], 2.5 / 14 * draws[5]  # grid_sample's unit is half an image, 14 pixels
    rows = [
        torch.stack([angle.cos() * scale_x, (shear - angle.sin()) * scale_y, shift_x], dim=1),
        torch.stack([angle.sin() * scale_x, angle.cos() * scale_y, shift_y], dim=1),
    ]
    grid = F.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)  # (B, H, W, 2)
    return F.grid_sample(images.float(), grid, align_corners=False).round().to(images.dtype)
