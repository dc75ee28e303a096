"""DigitClassifier: what ConvNet and ResNet18 share: the loss, the metrics, the steps, the optimizer.

B = batch size, C = classes. Images are uint8 (B, 1, 28, 28), labels int64 (B,), logits float (B, C).
"""

from typing import Any

import torch
import torch.nn.functional as F
from jsonargparse.typing import PositiveInt, restricted_number_type
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import LBFGS
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy

from mnist_lightning.errors import UserError
from mnist_lightning.hyperparameters import make_hyperparameters_plain, refuse_lost, schedule_config
from mnist_lightning.loader import Batch

LabelSmoothing = restricted_number_type("LabelSmoothing", float, [(">=", 0), ("<", 1)])


class DigitClassifier(LightningModule):
    """Base of the models: a subclass builds its layers and defines `forward`. Where it overrides on_fit_start,
    on_train_epoch_end or on_save_checkpoint, it calls super's as well.

    Args:
        optimizer: builds the optimizer from the trainable parameters.
        scheduler: builds a learning-rate schedule from the optimizer.
        label_smoothing: share of the target that is spread over all classes (Szegedy et al., arXiv:1512.00567).
        num_classes: how many classes there are.
    """

    default_epochs = 10  # of `fit` where --trainer.max_epochs isn't given

    def __init__(
        self,
        optimizer: OptimizerCallable,
        scheduler: LRSchedulerCallable | None = None,
        label_smoothing: LabelSmoothing = 0.0,  # type: ignore[valid-type]
        num_classes: PositiveInt = 10,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        make_hyperparameters_plain(self)
        self.optimizer, self.scheduler = optimizer, scheduler
        self.label_smoothing, self.num_classes = label_smoothing, num_classes
        # validate_args=False: a check of every batch's labels would take as long as the metric itself
        metric = {"num_classes": num_classes, "average": "micro", "validate_args": False}
        self.train_acc, self.val_acc, self.test_acc = (MulticlassAccuracy(**metric) for _ in range(3))
        # nan_strategy="disable": a NaN is shown, not dropped
        self.train_loss, self.val_loss, self.test_loss = (MeanMetric(nan_strategy="disable") for _ in range(3))

    @torch.compiler.disable  # torch.compile(model) compiles forward alone: for metrics it would recompile each step
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, labels = batch
        logits = self(images)
        losses = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing, reduction="none")  # (B,)
        loss = losses.mean()
        self.train_loss.update(losses)
        self.train_acc.update(logits, labels)
        self.log("train/loss_step", loss)
        return loss

    def on_train_epoch_end(self) -> None:
        if self.train_loss.update_called:  # not by a subclass with a training_step of its own
            self.log_dict({"train/loss": self.train_loss, "train/acc": self.train_acc})

    @torch.compiler.disable
    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, labels = batch
        logits = self(images)
        self.val_loss.update(F.cross_entropy(logits, labels, reduction="none"))
        self.val_acc.update(logits, labels)
        self.log_dict({"val/loss": self.val_loss, "val/acc": self.val_acc}, prog_bar=True)
        return logits

    @torch.compiler.disable
    def test_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, labels = batch
        logits = self(images)
        self.test_loss.update(F.cross_entropy(logits, labels, reduction="none"))
        self.test_acc.update(logits, labels)
        self.log_dict({"test/loss": self.test_loss, "test/acc": self.test_acc})
        return logits

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        images, *labels = batch if isinstance(batch, (tuple, list)) else [batch]
        probabilities = self(images).softmax(dim=1)  # (B, C)
        return {"probabilities": probabilities} | ({"labels": labels[0]} if labels else {})

    def parameter_groups(self) -> list[tuple[list[nn.Parameter], float]]:
        """What the optimizer trains, and each group's learning rate as a share of the one that was asked for."""
        return [([parameter for parameter in self.parameters() if parameter.requires_grad], 1.0)]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        refuse_lost(optimizer=self.optimizer, scheduler=self.scheduler)
        groups, factors = zip(*self.parameter_groups(), strict=True)
        optimizer = self.optimizer(groups[0] if len(groups) == 1 else [{"params": group} for group in groups])
        for group, factor in zip(optimizer.param_groups, factors, strict=True):
            group["lr"] *= factor
        if isinstance(optimizer, LBFGS):  # it takes no gradients that are laid out as channels_last
            self.to(memory_format=torch.contiguous_format)
        if self.scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": schedule_config(self.scheduler, optimizer, factors, self)}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["class_path"] = f"{type(self).__module__}.{type(self).__qualname__}"

    def on_fit_start(self) -> None:
        # An earlier fit may have ended in mid-epoch, and tensors that `validate` made can't be changed in training.
        for metric in self.modules():
            if isinstance(metric, Metric):
                metric.reset()


def check_images(images: Tensor, given_by: str = "the caller") -> None:
    """Raises UserError unless these are images as MNIST has them: uint8 (B, 1, 28, 28)."""
    if images.dtype != torch.uint8 or images.shape[1:] != (1, 28, 28):
        got = f"{str(images.dtype).removeprefix('torch.')} {tuple(images.shape)} from {given_by}"
        if images.is_floating_point():
            got += f", in [{images.min():.3g}, {images.max():.3g}]"
        remedy = "give the pixels unscaled: the model normalises them itself."
        raise UserError("uint8 images (B, 1, 28, 28), 0 to 255", got, remedy)
