"""Checks: refuses what could only fail later, or would fail without saying why."""

import math
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR

from mnist_lightning.classifier import DigitClassifier
from mnist_lightning.convnet import ConvNet
from mnist_lightning.data import MNISTDataModule
from mnist_lightning.errors import UserError
from mnist_lightning.pretrained import PretrainedClassifier
from mnist_lightning.resnet import ResNet18
from mnist_lightning.runs.checkpoints import BestCheckpoint, averages_at_the_end, check_monitor, unknown_metric

LOGGED = ("train/loss", "train/acc", "train/loss_step", "val/loss", "val/acc")  # by ConvNet and ResNet18


class Checks(Callback):
    """Looks at the callbacks before training, at the metrics after each validation (the first is the sanity check), and
    at the first batch: what a DigitClassifier's own steps can't take is refused in its datamodule's name.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        if trainer.world_size > 1 and isinstance(data, MNISTDataModule):
            first = trainer.strategy.broadcast(data.source)
            if data.source != first:  # auto, on a host without the files
                raise UserError(f"the same data on every host ({first})", data.source, "give --data.source.")
            fewest = min(len(part) for part in (data.train_set, data.val_set, data.test_set) if len(part))
            if fewest < trainer.world_size:
                got, remedy = f"a part of {fewest}", "use fewer --trainer.devices, or another --data.val_size."
                raise UserError(f"an image for each of {trainer.world_size} processes", got, remedy)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if averages_at_the_end(trainer) and isinstance(pl_module, PretrainedClassifier) and pl_module.frozen:
            got = "a frozen backbone, whose statistics it would reset"
            remedy = "use EMAWeightAveraging, or train all: --model.trainable_layers 5."
            raise UserError("BatchNorm layers that StochasticWeightAveraging can compute anew", got, remedy)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        empty = trainer.val_dataloaders is not None and not sum(trainer.num_val_batches)  # --data.val_size 0
        if empty or not trainer.enable_validation:
            for monitor in monitored(trainer, best=False):
                if monitor.startswith("val"):
                    got = f"{monitor}, without any validation"
                    raise UserError("a metric that is measured", got, "name one of training.")
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        others = [c for c in callbacks if not type(c).__module__.startswith(("lightning.", "mnist_lightning."))]
        if type(pl_module) in (ConvNet, ResNet18) and not others:  # which might log more
            for monitor in monitored(trainer):
                if monitor not in (*LOGGED, "epoch", "step") and not monitor.startswith("lr-"):
                    raise unknown_metric(monitor, LOGGED)
        if stopped_early(trainer):
            trainer.should_stop = True  # Lightning would train one more epoch, and stop again
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
            check(trainer, pl_module, batch, "training_step")

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx == 0:
            step = "test_step" if trainer.testing else "predict_step" if trainer.predicting else "validation_step"
            check(trainer, pl_module, batch, step)

    on_validation_batch_start = on_predict_batch_start = on_test_batch_start


def stopped_early(trainer: Trainer) -> bool:
    """Whether EarlyStopping has ended the fit, or the one that this one resumes."""
    stopping = [c for c in trainer.callbacks if isinstance(c, EarlyStopping)]  # type: ignore[attr-defined]
    return any(callback.stopping_reason is not EarlyStoppingReason.NOT_STOPPED for callback in stopping)


def steps_of(trainer: Trainer) -> float:
    """The optimizer steps of the whole fit. (Trainer.estimated_stepping_batches would make a resumed fit forget its
    place in the epoch: https://github.com/Lightning-AI/pytorch-lightning/issues/20550)"""
    most = trainer.max_steps if trainer.max_steps >= 0 else math.inf
    if trainer.max_epochs is None or trainer.max_epochs < 0 or math.isinf(trainer.num_training_batches):
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


def check(trainer: Trainer, model: LightningModule, batch: Any, step: str) -> None:
    """Raises UserError if a DigitClassifier's own step can't take a batch."""
    if not isinstance(model, DigitClassifier) or is_overridden(step, model, DigitClassifier):
        return
    owner = type(trainer.datamodule).__name__  # type: ignore[attr-defined]
    images, *rest = batch if isinstance(batch, (tuple, list)) else [batch]
    if step == "predict_step":
        return
    if not isinstance(batch, (tuple, list)) or len(rest) != 1:
        got = f"a {type(batch).__name__} of {len(batch)} from {owner}"
        raise UserError("batches that are pairs (images, labels)", got, f"return pairs, or override {step}.")
    (labels,) = rest
    if not isinstance(labels, Tensor) or labels.ndim != 1 or labels.dtype not in (torch.int64, torch.uint8):
        kind = f"{labels.dtype} {tuple(labels.shape)}" if isinstance(labels, Tensor) else f"a {type(labels).__name__}"
        got = f"{kind.removeprefix('torch.')} from {owner}"
        raise UserError("class numbers as labels, int64 (B,)", got, f"convert them, or override {step}.")
    if labels.numel() and (labels.min() < 0 or labels.max() >= model.num_classes):
        got = f"{int(labels.min())} to {int(labels.max())} from {owner}"
        remedy = "give --model.num_classes, or mend the labels."
        raise UserError(f"labels from 0 to {model.num_classes - 1}", got, remedy)
