"""Models: one on the package's base, with a metric of its own; a LightningModule that knows nothing of it; odd ones."""

from enum import Enum
from typing import Any

import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torchmetrics.classification import MulticlassF1Score

from mnist_lightning import ConvNet, DigitClassifier


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
    """A model as in Lightning's own tutorial, with metrics under names of its own.

    Args:
        lr: learning rate.
        num_classes: how many letters there are.
        pixels: of an image, in all its channels.
    """

    def __init__(self, lr: float = 0.01, num_classes: int = 26, pixels: int = 3 * 40 * 40) -> None:
        super().__init__()
        self.lr = lr
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(pixels, 16), nn.ReLU(), nn.Linear(16, num_classes))

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images.float())

    def training_step(self, batch: Any) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        images, labels = batch
        self.log("val/loss", F.cross_entropy(self(images), labels))

    def test_step(self, batch: Any) -> None:
        images, labels = batch
        self.log("test/loss", F.cross_entropy(self(images), labels))

    def predict_step(self, batch: Any) -> Tensor:
        return self(batch[0] if isinstance(batch, (tuple, list)) else batch)

    def configure_optimizers(self) -> Any:
        return SGD(self.parameters(), lr=self.lr)


class TwoOptimizers(Plain):
    def __init__(self) -> None:
        super().__init__(pixels=784)
        self.automatic_optimization = False

    def training_step(self, batch: Any) -> None:
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch))
            optimizer.step()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if not self.trainer.sanity_checking:
            super().validation_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        return [Adam(self.parameters(), lr=1e-3), SGD(self.parameters(), lr=1e-3)]


# ---- Of MNIST's images


class Pool(Enum):
    MAX = "max"
    MEAN = "mean"


class Pooled(ConvNet):
    def __init__(self, pool: Pool = Pool.MAX) -> None:
        super().__init__()


class Deep(ConvNet):
    def __init__(self, dropout: float = 0.1, **kwargs: Any) -> None:
        super().__init__(**kwargs)


class Unannotated(ConvNet):
    """The command line knows its optimizer as a function alone."""

    def __init__(self, optimizer=lambda params: Adam(params, lr=0.002)) -> None:
        super().__init__(optimizer=optimizer)


class Late(DigitClassifier):
    """Its layers come when it is configured."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__(lambda params: Adam(params, lr=1e-3), num_classes=num_classes)
        self.net: Any = None

    def configure_model(self) -> None:
        self.net = self.net or nn.Sequential(nn.Flatten(), nn.Linear(784, self.num_classes))

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images / 255)


class Lazy(Late):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.LazyLinear(10))


class Counting(ConvNet):
    """What it answers depends on a state beside the weights."""

    epochs = 0

    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()
        self.epochs += 1

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).roll(self.epochs, 1)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["epochs_counted"] = self.epochs

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.epochs = checkpoint["epochs_counted"]


class Partly(ConvNet):
    """Doesn't save what is frozen, as Lightning documents it."""

    strict_loading = False

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return {name: value for name, value in super().state_dict(*args, **kwargs).items() if "conv1" not in name}


class Extra(nn.Module):
    def get_extra_state(self) -> dict[str, int]:
        return {"calls": 3}

    def set_extra_state(self, state: Any) -> None:
        assert state == {"calls": 3}


class WithExtra(ConvNet):
    def __init__(self) -> None:
        super().__init__()
        self.extra = Extra()


class Stops(ConvNet):
    """Asks for the end after three steps."""

    def on_train_batch_end(self, *_: Any) -> None:
        if self.trainer.global_step == 3:
            self.trainer.should_stop = True


class Breaks(ConvNet):
    """Fails in its third step."""

    def forward(self, images: Tensor) -> Tensor:
        if self.training and self.trainer.global_step == 2:
            raise ValueError("the user's own")
        return super().forward(images)


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
