"""Datamodules: one that knows nothing of this package, floats from torchvision's ImageFolder and ToTensor; odd ones."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule
from running import Few
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset, random_split
from torchvision.datasets import ImageFolder
from torchvision.transforms import ToTensor

from mnist_lightning.sources import load_digits


class Letters(LightningDataModule):
    """Letters from a folder of PNGs.

    Args:
        data_dir: where they are.
        batch_size: images a step.
    """

    def __init__(self, data_dir: str = "letters", batch_size: int = 8) -> None:
        super().__init__()
        self.data_dir, self.batch_size = Path(data_dir), batch_size

    def setup(self, stage: str) -> None:
        images = ImageFolder(str(self.data_dir / "train"), ToTensor())
        self.train_set, self.val_set = random_split(images, [0.75, 0.25], torch.Generator().manual_seed(0))
        self.test_set = ImageFolder(str(self.data_dir / "test"), ToTensor())
        self.class_names = images.classes

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train_set, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val_set, batch_size=self.batch_size)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test_set, batch_size=self.batch_size)

    def predict_dataloader(self) -> DataLoader:
        return DataLoader(self.test_set, batch_size=self.batch_size)


class Nameless(Letters):
    """Images without labels in `predict`, and no names for the classes."""

    def setup(self, stage: str) -> None:
        super().setup(stage)
        del self.class_names

    def predict_dataloader(self) -> DataLoader:
        return DataLoader([image for image, _ in self.test_set], batch_size=self.batch_size)


# ---- Of MNIST's images


class Fewer(Few):
    """Its training images aren't this package's Images any more."""

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.train_set = Subset(self.train_set, range(32))  # type: ignore[assignment]


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        images, labels = load_digits().test
        return iter(TensorDataset(images[:40], labels[:40]))


class Odd(LightningDataModule):
    """40 digits in batches that a DigitClassifier's own steps take, pairs, or others.

    Args:
        kind: of batches.
    """

    def __init__(self, kind: str = "pairs") -> None:
        super().__init__()
        self.kind = kind

    def loader(self) -> Any:
        images, labels = (part[:40] for part in load_digits().test)
        rows = {
            "pairs": TensorDataset(images, labels), "one-hot": TensorDataset(images, F.one_hot(labels).float()),
            "int32": TensorDataset(images, labels.int()), "three": TensorDataset(images, labels, labels),
            "dict": [{"image": images[0], "label": labels[0]}], "stream": Stream(),
        }  # fmt: skip
        return DataLoader(rows[self.kind], batch_size=8)

    train_dataloader = val_dataloader = test_dataloader = predict_dataloader = loader


class Named(Odd):
    def test_dataloader(self) -> Any:
        return {"digits": self.loader()}


class Rooted(Odd):
    def __init__(self, root: Path) -> None:
        super().__init__()
