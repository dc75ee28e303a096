"""FirstBatch: looks at the first batch of a fit, validation or test, before torch fails on it without saying why."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from mnist_lightning.classifier import DigitClassifier, check_images
from mnist_lightning.convnet import ConvNet
from mnist_lightning.errors import UserError
from mnist_lightning.resnet import ResNet18


class FirstBatch(Callback):
    """Refuses images and labels that a DigitClassifier can't take, and names the datamodule that they come from."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            check(trainer, pl_module, batch)

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *batch_and_index: Any) -> None:
        if batch_and_index[1] == 0:
            check(trainer, pl_module, batch_and_index[0])

    on_test_batch_start = on_validation_batch_start  # type: ignore[assignment]
    on_predict_batch_start = on_validation_batch_start  # type: ignore[assignment]


def check(trainer: Trainer, model: LightningModule, batch: Any) -> None:
    if not isinstance(model, DigitClassifier) or not isinstance(batch, (tuple, list)) or len(batch) != 2:
        return
    images, labels = batch
    owner = type(trainer.datamodule).__name__  # type: ignore[attr-defined]
    if isinstance(model, (ConvNet, ResNet18)) and isinstance(images, Tensor):
        check_images(images, owner)
    if isinstance(labels, Tensor) and not labels.is_floating_point() and labels.numel():
        low, high = int(labels.min()), int(labels.max())
        if not trainer.predicting and (low < 0 or high >= model.num_classes):
            expected = f"labels from 0 to {model.num_classes - 1}"
            raise UserError(expected, f"{low} to {high} from {owner}", "give --model.num_classes, or mend the labels.")
