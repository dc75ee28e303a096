"""Checks: what only a running fit, test or prediction can show to be wrong is refused, as early as it shows."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR

from mnist_lightning.classifier import DigitClassifier
from mnist_lightning.data import MNISTDataModule
from mnist_lightning.errors import Reason, refuse
from mnist_lightning.loader import ImagesDataModule
from mnist_lightning.pretrained import PretrainedClassifier
from mnist_lightning.runs.checkpoints import BestCheckpoint, averages_at_the_end, unknown_metric


class Checks(Callback):
    """Goes through the reasons below: of data and model before a fit, of the callbacks' metrics after each validation
    (the first is the sanity check), of the first batch of each evaluation.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        refuse(of_processes(trainer))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        refuse(of_averaging(trainer, pl_module))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        refuse(of_schedules_and_metrics(trainer))
        if stopped_early(trainer):
            trainer.should_stop = True  # Lightning would train one more epoch, and stop again

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Some models log nothing in the sanity check.
        if trainer.state.fn == "fit" and (trainer.callback_metrics or not trainer.sanity_checking):
            logged = trainer.callback_metrics
            names = [name for name in monitored(trainer) if name.startswith("val") and name not in logged]
            refuse(unknown_metric(name, logged) for name in names)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            refuse(of_batch(trainer, pl_module, batch, "training_step"))

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx == 0:
            step = "test_step" if trainer.testing else "predict_step" if trainer.predicting else "validation_step"
            refuse(of_batch(trainer, pl_module, batch, step))

    on_validation_batch_start = on_predict_batch_start = on_test_batch_start


# ---- The reasons


def of_processes(trainer: Trainer) -> Iterator[Reason]:
    data = trainer.datamodule  # type: ignore[attr-defined]
    if trainer.world_size == 1 or not isinstance(data, ImagesDataModule):
        return

    if isinstance(data, MNISTDataModule):
        first = trainer.strategy.broadcast(data.source)
        if data.source != first:  # auto, on a host without the files
            yield f"the same data on every host ({first})", data.source, "give --data.source."

    fewest = min((len(part) for part in data.parts().values() if len(part)), default=trainer.world_size)
    if fewest < trainer.world_size:
        remedy = "use fewer --trainer.devices, or another --data.val_size."
        yield f"an image for each of {trainer.world_size} processes", f"a part of {fewest}", remedy


def of_averaging(trainer: Trainer, model: LightningModule) -> Iterator[Reason]:
    if averages_at_the_end(trainer) and isinstance(model, PretrainedClassifier) and model.frozen:
        got = "a frozen backbone, whose statistics it would reset"
        remedy = "use EMAWeightAveraging, or train all: --model.trainable_layers 5."
        yield "BatchNorm layers that StochasticWeightAveraging can compute anew", got, remedy


def of_schedules_and_metrics(trainer: Trainer) -> Iterator[Reason]:
    empty = trainer.val_dataloaders is not None and not sum(trainer.num_val_batches)  # --data.val_size 0
    for monitor in monitored(trainer, best=False) if empty or not trainer.enable_validation else []:
        if monitor.startswith("val"):
            yield "a metric that is measured", f"{monitor}, without any validation", "name one of training."

    steps = steps_of(trainer)
    for config in trainer.lr_scheduler_configs:
        schedule = config.scheduler
        if not isinstance(schedule, OneCycleLR) or config.interval != "step":
            continue
        if schedule.total_steps < steps < math.inf:
            remedy = "leave out --trainer.max_epochs and max_steps; to train longer start a new run."
            got = f"a fit of {steps:.0f} steps"
            yield f"a fit as long as its OneCycleLR, {schedule.total_steps} steps", got, remedy


def of_batch(trainer: Trainer, model: LightningModule, batch: Any, step: str) -> Iterator[Reason]:
    """What a DigitClassifier's own step can't take."""
    if not isinstance(model, DigitClassifier) or is_overridden(step, model, DigitClassifier):
        return
    owner = type(trainer.datamodule).__name__  # type: ignore[attr-defined]
    images, *rest = batch if isinstance(batch, (tuple, list)) else [batch]
    if step == "predict_step":
        return

    if not isinstance(batch, (tuple, list)) or len(rest) != 1:
        got = f"a {type(batch).__name__} of {len(batch)} from {owner}"
        yield "batches that are pairs (images, labels)", got, f"return pairs, or override {step}."

    (labels,) = rest
    if not isinstance(labels, Tensor) or labels.ndim != 1 or labels.dtype not in (torch.int64, torch.uint8):
        kind = f"{labels.dtype} {tuple(labels.shape)}" if isinstance(labels, Tensor) else f"a {type(labels).__name__}"
        got = f"{kind.removeprefix('torch.')} from {owner}"
        yield "class numbers as labels, int64 (B,)", got, f"convert them, or override {step}."

    if labels.numel() and (labels.min() < 0 or labels.max() >= model.num_classes):
        got = f"{int(labels.min())} to {int(labels.max())} from {owner}"
        remedy = "give --model.num_classes, or mend the labels."
        yield f"labels from 0 to {model.num_classes - 1}", got, remedy


# ---- What they ask the Trainer


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
