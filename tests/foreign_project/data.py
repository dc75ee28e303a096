"""A datamodule that knows nothing of this package: torchvision's ImageFolder, floats from ToTensor."""

from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, random_split
from torchvision.datasets import ImageFolder
from torchvision.transforms import ToTensor


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
