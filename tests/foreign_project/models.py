"""Models: two on the package's base, one with a metric of its own; and a LightningModule that knows nothing of it."""

from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torchmetrics.classification import MulticlassF1Score

from mnist_lightning import DigitClassifier


class Reader(DigitClassifier):
    """One convolution, one linear layer, and val/f1 beside val/acc.

    Args:
        channels: of the convolution.
        optimizer: any class of torch.optim; its arguments follow as --model.optimizer.lr 1e-3.
        scheduler: any class of torch.optim.lr_scheduler.
        num_classes: how many letters there are.
    """

    default_epochs = 3

    def __init__(
        self,
        channels: int = 8,
        optimizer: OptimizerCallable = lambda params: Adam(params, lr=0.01),
        scheduler: LRSchedulerCallable | None = None,
        num_classes: int = 26,
    ) -> None:
        super().__init__(optimizer, scheduler, num_classes=num_classes)
        self.conv = nn.Conv2d(3, channels, 5, stride=3)
        self.head = nn.Linear(channels * 12 * 12, num_classes)
        self.val_f1 = MulticlassF1Score(num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.conv(1 - images).relu().flatten(1))  # ink, not paper

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = super().validation_step(batch, batch_idx)
        self.val_f1(logits, batch[1])
        self.log("val/f1", self.val_f1)
        return logits


class Plain(LightningModule):
    """A model as in Lightning's own tutorial.

    Args:
        lr: learning rate.
        num_classes: how many letters there are.
    """

    def __init__(self, lr: float = 0.01, num_classes: int = 26) -> None:
        super().__init__()
        self.lr = lr
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 40 * 40, 16), nn.ReLU(), nn.Linear(16, num_classes))

    def training_step(self, batch: Any) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        images, labels = batch
        self.log("val/loss", F.cross_entropy(self.net(images), labels))

    def test_step(self, batch: Any) -> None:
        images, labels = batch
        self.log("test/loss", F.cross_entropy(self.net(images), labels))

    def predict_step(self, batch: Any) -> Tensor:
        return self.net(batch[0] if isinstance(batch, (tuple, list)) else batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Tiny(DigitClassifier):
    """A linear layer on a digit of 7×7: its checkpoint takes a few kilobytes.

    Args:
        optimizer: any class of torch.optim; its arguments follow as --model.optimizer.lr 1e-3.
        scheduler: any class of torch.optim.lr_scheduler.
        num_classes: how many digits there are.
    """

    def __init__(
        self,
        optimizer: OptimizerCallable = lambda params: SGD(params, lr=0.1, momentum=0.9),
        scheduler: LRSchedulerCallable | None = None,
        num_classes: int = 10,
    ) -> None:
        super().__init__(optimizer, scheduler, num_classes=num_classes)
        self.head = nn.Linear(49, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(F.avg_pool2d(images / 255, 4).flatten(1))
