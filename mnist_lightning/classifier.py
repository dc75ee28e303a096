"""DigitClassifier: what ConvNet and ResNet18 share: the loss, the metrics, the steps, the optimizer.

B = batch size, C = classes. Images are uint8 (B, 1, 28, 28), labels int64 (B,), logits float (B, C).
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jsonargparse.typing import PositiveInt, restricted_number_type
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy

from mnist_lightning.errors import UserError
from mnist_lightning.loader import Batch
from mnist_lightning.schedules import schedule_config

LabelSmoothing = restricted_number_type("LabelSmoothing", float, [(">=", 0), ("<", 1)])


class DigitClassifier(LightningModule):
    """Base of the models: a subclass builds its layers and defines `forward`. Where it overrides configure_callbacks,
    on_save_checkpoint or on_load_checkpoint, it calls super's as well.

    Args:
        optimizer: builds the optimizer from the trainable parameters.
        scheduler: builds a learning-rate schedule from the optimizer.
        label_smoothing: share of the target that is spread over all classes (Szegedy et al., arXiv:1512.00567).
        num_classes: how many classes there are; by default as many as the data names, else 10.
    """

    default_epochs = 10  # of `fit` where --trainer.max_epochs isn't given

    def __init__(
        self,
        optimizer: OptimizerCallable,
        scheduler: LRSchedulerCallable | None = None,
        label_smoothing: LabelSmoothing = 0.0,  # type: ignore[valid-type]
        num_classes: PositiveInt | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["optimizer", "scheduler"])  # functions, which a checkpoint can't hold
        self.optimizer, self.scheduler = optimizer, scheduler
        self.label_smoothing, self.num_classes = label_smoothing, num_classes or 10
        self.trained_with = ""  # the optimizer's class
        self._classify: Callable[[DigitClassifier, Any], Any] | None = None
        # validate_args=False: a check of every batch's labels would take as long as the metric itself
        metric: dict[str, Any] = {"num_classes": self.num_classes, "average": "micro", "validate_args": False}
        self.val_acc, self.test_acc = MulticlassAccuracy(**metric), MulticlassAccuracy(**metric)
        # nan_strategy: a loss that isn't a number is shown as such; by default it would be dropped
        self.val_loss, self.test_loss = MeanMetric(nan_strategy=math.nan), MeanMetric(nan_strategy=math.nan)

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        images, labels = batch
        logits = self(images)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        return {"loss": loss, "logits": logits.detach(), "labels": labels}  # logged by TrainingMeans

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, labels = batch
        logits = self(images)
        self.val_loss.update(F.cross_entropy(logits, labels), weight=len(labels))
        self.val_acc.update(logits, labels)
        self.log_dict({"val/loss": self.val_loss, "val/acc": self.val_acc}, prog_bar=True)
        return logits

    def test_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, labels = batch
        logits = self(images)
        self.test_loss.update(F.cross_entropy(logits, labels), weight=len(labels))
        self.test_acc.update(logits, labels)
        self.log_dict({"test/loss": self.test_loss, "test/acc": self.test_acc})
        return logits

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        images, *labels = batch if isinstance(batch, (tuple, list)) else [batch]
        probabilities = self(images).softmax(dim=1)  # (B, C)
        return {"probabilities": probabilities} | ({"labels": labels[0]} if labels else {})

    def classify(self, pictures: Any) -> Any:
        """Each class's name with its probability, the likeliest first, of a picture; of a list of them a list.

        Args:
            pictures: a path, a PIL image, or an array, uint8 (H, W) or (H, W, 3); or a list of such.

        Raises:
            UserError: it is no picture, or the model isn't `load_model`'s, or its checkpoint says nothing of its data.
        """
        if self._classify is None:
            expected = "a model from load_model, of a run of `fit`, or trained on an ImageFolder or MNISTDataModule"
            raise UserError(expected, f"another {type(self).__name__}", "call it with a tensor of images.")
        return self._classify(self, pictures)

    def classify_with(self, classify: "Callable[[DigitClassifier, Any], Any]") -> None:
        """Takes what `classify` calls, with the model and the pictures: how they are read isn't the model's matter."""
        self._classify = classify

    def parameter_groups(self) -> list[tuple[list[nn.Parameter], float]]:
        """What the optimizer trains, and each group's learning rate as a share of the one that was asked for."""
        return [([parameter for parameter in self.parameters() if parameter.requires_grad], 1.0)]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        groups, factors = zip(*self.parameter_groups(), strict=True)
        if len(groups) == 1:
            optimizer = self.optimizer(groups[0])
        else:
            optimizer = self.optimizer([{"params": group} for group in groups])
        for group, factor in zip(optimizer.param_groups, factors, strict=True):
            group["lr"] *= factor
        name = type(optimizer).__name__
        if self.trained_with not in ("", name):
            rank_zero_warn(f"Trained with {self.trained_with} so far, and from now on with {name}: optimizer= chooses.")
        self.trained_with = name
        if self.scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": schedule_config(self.scheduler, optimizer, factors, self)}

    def configure_callbacks(self) -> list[Callback]:
        return [TrainingMeans()]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["class_path"] = f"{type(self).__module__}.{type(self).__qualname__}"
        checkpoint["optimizer"] = self.trained_with

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.trained_with = checkpoint.get("optimizer", "")


class TrainingMeans(Callback):
    """Logs train/loss and train/acc, the means over all images of an epoch, and at some steps train/loss_step.

    A `self.log` in each training_step would take a millisecond of a step of 20. A training_step of one's own that
    returns the loss alone logs for itself.
    """

    def __init__(self) -> None:
        self.loss: float | Tensor = 0.0  # sums over the epoch's images so far, in this process
        self.right: float | Tensor = 0.0
        self.images = 0.0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # An earlier fit may have ended in mid-validation, and tensors that `validate` made can't be changed in a fit.
        for metric in pl_module.modules():
            if isinstance(metric, Metric):
                metric.reset()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.loss, self.right, self.images = 0.0, 0.0, 0.0  # an epoch that is resumed in its middle keeps its sums

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if "logits" not in outputs or "labels" not in outputs:
            return
        right = outputs["logits"].argmax(1) == outputs["labels"]  # (B,)
        loss = outputs["loss"].float() * trainer.accumulate_grad_batches  # by which Lightning has divided it
        self.loss += loss * len(right)  # on the device, which nobody waits for
        self.right += right.sum()
        self.images += len(right)
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and (trainer.global_step + 1) % every < 2:  # that step is logged, or gradients accumulate for it
            pl_module.log("train/loss_step", loss)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loss, right, images = self.of_all_processes(trainer)
        if images:
            # sync_dist: they are the same in all processes, but Lightning would warn
            pl_module.log_dict({"train/loss": loss / images, "train/acc": right / images}, sync_dist=True)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["training_sums"] = self.of_all_processes(trainer)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.is_global_zero:
            self.loss, self.right, self.images = checkpoint.get("training_sums", (0.0, 0.0, 0.0))

    def of_all_processes(self, trainer: Trainer) -> list[float]:
        """The sums of the losses, of the right answers and of the images."""
        sums = torch.tensor([float(self.loss), float(self.right), self.images], device=trainer.strategy.root_device)
        return trainer.strategy.reduce(sums, reduce_op="sum").tolist()


def wrong_images(expected: str, images: Tensor) -> UserError:
    """The error of a model that takes other images."""
    got = f"{str(images.dtype).removeprefix('torch.')} {tuple(images.shape)}"
    if images.dtype == torch.uint8:
        return UserError(expected, got, "convert them, or use --model ResNet18, which takes grey or colour.")
    if images.is_floating_point():
        got += f", in [{images.min():.3g}, {images.max():.3g}]"
    return UserError(expected, got, "give the pixels unscaled: the model normalises them itself.")
