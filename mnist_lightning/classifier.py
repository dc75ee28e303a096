"""DigitClassifier: what ConvNet and ResNet18 share: loss, metrics, the steps, the optimizer.

B = batch size. Images are uint8 (B, 1, 28, 28), labels int64 (B,), logits float (B, 10).
"""

import math
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from jsonargparse.typing import restricted_number_type
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable, ReduceLROnPlateau
from lightning.pytorch.utilities.types import LRSchedulerConfigType, OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import LBFGS
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy

from mnist_lightning.data import Batch
from mnist_lightning.errors import UserError

NUM_CLASSES = 10

LabelSmoothing = restricted_number_type("LabelSmoothing", float, [(">=", 0), ("<", 1)])


class DigitClassifier(LightningModule):
    """Base of the models: a subclass builds its layers and defines `forward`.

    Args:
        optimizer: builds the optimizer from the trainable parameters.
        scheduler: builds a learning-rate schedule from the optimizer.
        label_smoothing: share of the target that is spread over all ten digits (Szegedy et al., arXiv:1512.00567).
    """

    default_epochs = 10  # of `fit` where --trainer.max_epochs isn't given

    def __init__(
        self,
        optimizer: OptimizerCallable,
        scheduler: LRSchedulerCallable | None = None,
        label_smoothing: LabelSmoothing = 0.0,  # type: ignore[valid-type]
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        # From the command line the hyperparameters are plain data; built in Python they hold functions, which a
        # checkpoint that loads with weights_only=True can't.
        plain = {
            name: str(value) if isinstance(value, Path) else value
            for name, value in self.hparams.items()
            if not callable(value)
        }
        plain.setdefault("_class_path", f"{type(self).__module__}.{type(self).__qualname__}")
        self.hparams.clear()
        self.save_hyperparameters(plain)
        self.optimizer, self.scheduler, self.label_smoothing = optimizer, scheduler, label_smoothing
        self._answers: list[tuple[Tensor, Tensor]] = []  # logits and labels that train_acc hasn't seen yet
        self.metrics = nn.ModuleDict()
        for part in ("train", "val", "test"):
            # validate_args=False: checking the labels' range at each batch costs as much as the metric
            self.metrics[f"{part}_acc"] = MulticlassAccuracy(NUM_CLASSES, average="micro", validate_args=False)
            self.metrics[f"{part}_loss"] = MeanMetric(nan_strategy="disable")  # a NaN is shown, not dropped

    def __setattr__(self, name: str, value: Any) -> None:
        if (
            name == "_current_fx_name"
        ):  # Lightning sets it around some 40 hooks a step; Module's own looks into each value
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    def forward(self, images: Tensor) -> Tensor:
        raise NotImplementedError

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, labels = batch
        logits = self(images)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        trainer: Any = self.trainer
        every, ends = trainer.log_every_n_steps, trainer.is_last_batch
        shown = every > 0 and (trainer.global_step + 1) % every == 0
        if (shown or not loss.is_cuda) and not math.isfinite(loss.item()):  # a GPU would be waited for
            raise not_finite(f"a training loss of {loss.item()}", trainer.global_step)
        # An update of the metric costs as much as a linear head's forward pass: one for all steps since the last.
        self._answers.append((logits.detach(), labels))
        if shown or ends:
            self._metric("train_acc").update(*(torch.cat(parts) for parts in zip(*self._answers, strict=True)))
            self._answers.clear()
        # self.log does its bookkeeping at each call, and the Trainer takes up a step's values only every
        # log_every_n_steps: for a linear head on kept features the calls between would be a third of the step.
        if shown:
            self.log("train/loss", loss)
        if ends:
            self.log("train/acc", self._metric("train_acc"), on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self._evaluate("val", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self._evaluate("test", batch)

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        images, labels = batch
        return {"labels": labels, "probabilities": self(images).softmax(dim=1)}  # (B,), (B, 10)

    def parameter_groups(self) -> list[tuple[list[nn.Parameter], float]]:
        """What the optimizer trains, and each group's learning rate as a share of the one that was asked for."""
        return [([parameter for parameter in self.parameters() if parameter.requires_grad], 1.0)]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        groups, factors = zip(*self.parameter_groups(), strict=True)
        try:
            optimizer = self.optimizer(groups[0] if len(groups) == 1 else [{"params": group} for group in groups])
        except (ValueError, TypeError) as error:
            raise UserError("an optimizer's arguments", str(error), "see that class in torch.optim.") from error
        for group, factor in zip(optimizer.param_groups, factors, strict=True):
            group["lr"] *= factor
        if isinstance(optimizer, LBFGS):  # it reads gradients as torch lays them out by default
            self.to(memory_format=torch.contiguous_format)
        if self.scheduler is None:
            return optimizer
        given = getattr(self.scheduler, "keywords", {})  # from the command line it is a functools.partial
        # OneCycleLR and CyclicLR take no notice of the groups' own rates.
        filled: dict[str, Any] = {
            name: [given[name] * factor for factor in factors]
            for name in ("max_lr", "base_lr")
            if len(factors) > 1 and isinstance(given.get(name), (int, float))
        }
        if "total_steps" in given and not (given["total_steps"] or given.get("epochs")):
            filled["total_steps"] = self._total_steps()
        schedule = self.scheduler(optimizer, **filled)
        by_batch = isinstance(schedule, (OneCycleLR, CyclicLR))  # torch's documentation: made to step after each batch
        config: LRSchedulerConfigType = {"scheduler": schedule, "interval": "step" if by_batch else "epoch"}
        if isinstance(schedule, ReduceLROnPlateau):
            config["monitor"] = schedule.monitor
        return {"optimizer": optimizer, "lr_scheduler": config}

    def on_fit_start(self) -> None:
        trainer: Any = self.trainer
        fused = any(getattr(optimizer, "_step_supports_amp_scaling", False) for optimizer in trainer.optimizers)
        if fused and trainer.gradient_clip_val and "mixed" in trainer.precision:  # a RuntimeError at the first step
            got = f"a fused one with --trainer.precision {trainer.precision} and --trainer.gradient_clip_val"
            raise UserError("an optimizer whose gradients can be clipped", got, "give --model.optimizer.fused false.")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        trained = (parameter for parameter in self.parameters() if parameter.requires_grad)
        if not all(bool(parameter.isfinite().all()) for parameter in trained):
            raise not_finite("weights that aren't", self.trainer.global_step)  # the last good checkpoint stays

    def _total_steps(self) -> int:
        """Optimizer steps of the whole fit.

        Not `trainer.estimated_stepping_batches`: that builds the training loader early, and a resumed loader's place
        in the epoch is lost (https://github.com/Lightning-AI/pytorch-lightning/issues/20550).
        """
        trainer: Any = self.trainer
        batches = len(trainer.datamodule.train_dataloader())
        limit = trainer.limit_train_batches
        batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
        steps = math.ceil(batches / trainer.accumulate_grad_batches) * int(trainer.max_epochs or -1)
        known = [count for count in (steps, trainer.max_steps) if count > 0]
        if not known:
            raise UserError("a fit of known length for this schedule", "none", "give --trainer.max_epochs.")
        return min(known)

    def stages(self) -> dict[str, nn.Module]:
        """The layers whose output pictures.py and demo.py show, by name, in order."""
        return {name: layer for name, layer in self.named_children() if isinstance(layer, nn.Conv2d)}

    def _evaluate(self, part: str, batch: Batch) -> Tensor:
        images, labels = batch
        logits = self(images)
        loss, accuracy = self._metric(f"{part}_loss"), self._metric(f"{part}_acc")
        # One loss an image, for the last batch is shorter: with nan_strategy="disable" MeanMetric drops a weight.
        loss.update(F.cross_entropy(logits, labels, reduction="none"))
        accuracy.update(logits, labels)
        self.log_dict({f"{part}/loss": loss, f"{part}/acc": accuracy}, prog_bar=part == "val")
        return logits

    def _metric(self, name: str) -> Metric:
        return cast(Metric, self.metrics[name])


def not_finite(got: str, step: int) -> UserError:
    remedy = "try a smaller --model.optimizer.lr, or --trainer.gradient_clip_val 1; the last good checkpoint is kept."
    return UserError("finite numbers in training", f"{got} at step {step}", remedy)
