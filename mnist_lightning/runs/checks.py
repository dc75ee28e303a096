"""Checks: refuses what could only fail later, or would fail without saying why."""

import math
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, StochasticWeightAveraging
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR

from mnist_lightning.classifier import DigitClassifier, check_images
from mnist_lightning.convnet import ConvNet
from mnist_lightning.data import MNISTDataModule
from mnist_lightning.errors import UserError
from mnist_lightning.resnet import ResNet18
from mnist_lightning.runs.checkpoints import BestCheckpoint, check_monitor


class Checks(Callback):
    """Looks at the callbacks before training, at the metrics after each validation (the first is the sanity check), and
    at the first batch: images and labels that a DigitClassifier can't take are refused in their datamodule's name.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        if trainer.world_size > 1 and isinstance(data, MNISTDataModule):
            first = trainer.strategy.broadcast(data.source)
            if data.source != first:  # auto, on a host without the files
                raise UserError(f"the same data on every host ({first})", data.source, "give --data.source.")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        averages = any(isinstance(callback, StochasticWeightAveraging) for callback in callbacks)
        if averages and isinstance(pl_module, ResNet18) and pl_module.frozen:
            got = "a frozen backbone, whose statistics it would reset"
            remedy = "use EMAWeightAveraging, or train all: --model.trainable_layers 5."
            raise UserError("BatchNorm layers that StochasticWeightAveraging can compute anew", got, remedy)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        empty = trainer.val_dataloaders is not None and not sum(trainer.num_val_batches)  # of --data.val_size 0
        if empty or not trainer.enable_validation:
            for monitor in monitored(trainer, best=False):
                if monitor.startswith("val"):
                    got = f"{monitor}, without any validation"
                    raise UserError("a metric that is measured", got, "name one of training.")
        steps = steps_of(trainer)
        for config in trainer.lr_scheduler_configs:
            schedule = config.scheduler
            if not isinstance(schedule, OneCycleLR) or config.interval != "step":
                continue
            if schedule.total_steps < steps < math.inf:
                remedy = "leave out --trainer.max_epochs and max_steps; to train longer start a new run."
                got = f"a fit of {steps:.0f} steps"
                raise UserError(f"a fit as long as its OneCycleLR, {schedule.total_steps} steps", got, remedy)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Some models log nothing in the sanity check.
        if trainer.state.fn == "fit" and (trainer.callback_metrics or not trainer.sanity_checking):
            for monitor in monitored(trainer):
                if monitor.startswith("val"):
                    check_monitor(trainer, monitor)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            check(trainer, pl_module, batch)

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *batch_and_index: Any) -> None:
        if batch_and_index[1] == 0:
            check(trainer, pl_module, batch_and_index[0])

    on_test_batch_start = on_validation_batch_start  # type: ignore[assignment]
    on_predict_batch_start = on_validation_batch_start  # type: ignore[assignment]


def steps_of(trainer: Trainer) -> float:
    """The optimizer steps of the whole fit. (Trainer.estimated_stepping_batches would make a resumed fit forget its
    place in the epoch: https://github.com/Lightning-AI/pytorch-lightning/issues/20550)"""
    most = trainer.max_steps if trainer.max_steps >= 0 else math.inf
    if trainer.max_epochs is None or trainer.max_epochs < 0:
        return most
    return min(most, trainer.max_epochs * math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches))


def monitored(trainer: Trainer, best: bool = True) -> list[str]:
    """The metrics that callbacks and schedules of a fit can't do without.

    Args:
        best: with that of BestCheckpoint, which does without where nothing is validated.
    """
    names = [config.monitor for config in trainer.lr_scheduler_configs if config.reduce_on_plateau and config.strict]
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        saves = isinstance(callback, ModelCheckpoint) and (best or not isinstance(callback, BestCheckpoint))
        if saves or (isinstance(callback, EarlyStopping) and callback.strict):
            names.append(callback.monitor)
    return [name for name in names if name]


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
