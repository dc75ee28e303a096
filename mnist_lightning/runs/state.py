"""RunState: what a checkpoint of a run holds beside Lightning's own, and the check that it is worth keeping."""

import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from mnist_lightning.errors import UserError
from mnist_lightning.files import write_whole
from mnist_lightning.loader import ImagesDataModule
from mnist_lightning.pretrained import Features
from mnist_lightning.runs.classes import named_classes
from mnist_lightning.runs.saved import Example, Progress, complete_epoch, is_in_mid_epoch, save_run


class RunState(Callback):
    """Keeps in each checkpoint what Lightning forgets: the states of all random generators, gradients that wait for an
    optimizer step, which parameters are trained, ReduceLROnPlateau's next step; the settings; the classes' names.

    A run that is resumed then goes on as one that nothing interrupted; what can't is refused. Weights or a loss that
    aren't finite end the fit before they overwrite a good checkpoint.

    Args:
        settings: all of the run's, as config.yaml has them: {"model": {"class_path": ..., "init_args": ...}, ...}.
        config: config.yaml of a resumed run, written anew when training starts: the settings may be others now.
    """

    def __init__(self, settings: dict[str, Any], config: Path | None = None) -> None:
        self.settings, self.config = settings, config
        self.example: Example | None = None
        self._resumed: Progress | None = None  # from the checkpoint, until training starts
        self._epoch_ended = False  # and ReduceLROnPlateau hasn't stepped yet
        self._plateau_left_out = False  # by Lightning, in an epoch that was resumed in its middle

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.example is None:
            self.example = example_of(batch, trainer.datamodule)  # type: ignore[attr-defined]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if not isinstance(loss, Tensor) or (loss.is_cuda and trainer.global_step % max(1, every)):
            return  # a GPU would be waited for at each step
        if not math.isfinite(loss.item()):
            raise not_finite(f"a training loss of {loss.item()}", trainer.global_step)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        parameters = dict(pl_module.named_parameters())
        if not all(bool(value.isfinite().all()) for value in parameters.values() if value.requires_grad):
            raise not_finite("weights that aren't", trainer.global_step)
        frozen = [name for name, value in parameters.items() if not value.requires_grad]
        progress = Progress(generators(), frozen, trainer.world_size)
        if gathers_gradients(trainer, pl_module):
            gradients = {name: value.grad for name, value in parameters.items() if value.grad is not None}
            # Until the optimizer's step each process has its own.
            progress.gradients = {name: each_process(trainer, value) for name, value in gradients.items()}
        if self._epoch_ended:
            progress.plateaus = due_plateaus(trainer, trainer.current_epoch + 1)
        names = named_classes(trainer.datamodule)  # type: ignore[attr-defined]
        save_run(checkpoint, self.settings, progress, self.example, names)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._resumed = Progress.of(checkpoint)
        processes = self._resumed.processes or trainer.world_size
        if processes != trainer.world_size and (is_in_mid_epoch(checkpoint) or self._resumed.gradients):
            expected = f"as many processes as before the stop in mid-epoch: {processes}"  # each had a share of its own
            raise UserError(expected, str(trainer.world_size), f"give --trainer.devices {processes}.")
        if trainer.max_steps >= 0:
            complete_epoch(checkpoint, trainer.check_val_every_n_epoch if trainer.enable_validation else None)
        # At once, for the data loader of the next epoch may draw its order; and again before a batch that follows.
        if self._resumed.generators:
            set_generators(self._resumed.generators)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        resumed, self._resumed = self._resumed, None
        if resumed is not None:
            self._go_on(trainer, pl_module, resumed)
        if self.config is not None and trainer.is_global_zero:
            write_settings(self.config, self.settings)

    def _go_on(self, trainer: Trainer, model: LightningModule, resumed: Progress) -> None:
        """Puts back what Lightning didn't."""
        for name, parameter in model.named_parameters():
            if resumed.frozen is not None:
                # BackboneFinetuning freezes all again: https://github.com/Lightning-AI/pytorch-lightning/issues/21901
                parameter.requires_grad_(name not in resumed.frozen)
            if name in resumed.gradients:
                mine = resumed.gradients[name][trainer.global_rank]
                parameter.grad = torch.empty_like(parameter, requires_grad=False).copy_(mine)
        step_plateaus(trainer, resumed.plateaus)
        if trainer.fit_loop.restarted_mid_epoch:
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, GradientAccumulationScheduler):
                    callback.on_train_epoch_start(trainer)  # Lightning doesn't call it: the epoch has started before
            if resumed.generators:
                set_generators(resumed.generators)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._plateau_left_out:
            step_plateaus(trainer, due_plateaus(trainer, trainer.current_epoch))
        self._epoch_ended = self._plateau_left_out = False

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # An epoch that was cut short, by --trainer.max_steps for example, moves no schedule.
        self._epoch_ended = trainer.is_last_batch
        self._plateau_left_out = trainer.is_last_batch and trainer.fit_loop.restarting

    on_train_end = on_train_epoch_start


def example_of(batch: Any, data: Any) -> Example | None:
    """What one image is like: of the batch, or of those that its cached features were made of; None if nobody knows."""
    images = batch[0] if isinstance(batch, (tuple, list)) and len(batch) else batch
    if isinstance(images, Features) and isinstance(data, ImagesDataModule):
        images = data.train_set.images
    if not isinstance(images, Tensor):
        return None
    return Example(tuple(images.shape[1:]), str(images.dtype).removeprefix("torch."))


def gathers_gradients(trainer: Trainer, model: LightningModule) -> bool:
    """Whether gradients may outlive a batch. Of a model that optimizes by itself nobody knows."""
    own = not model.automatic_optimization or is_overridden("optimizer_zero_grad", model)
    return own or trainer.accumulate_grad_batches > 1


def each_process(trainer: Trainer, value: Tensor) -> Tensor:
    """The values that all processes have, (processes, *value.shape)."""
    return trainer.strategy.all_gather(value.contiguous()).reshape(trainer.world_size, *value.shape)


def due_plateaus(trainer: Trainer, epochs: int) -> dict[int, float]:
    """Which ReduceLROnPlateau step after so many epochs, by their place among the schedules, and what they look at."""
    if not trainer.lightning_module.automatic_optimization:
        return {}
    return {
        index: float(trainer.callback_metrics[str(config.monitor)])
        for index, config in enumerate(trainer.lr_scheduler_configs)
        if config.reduce_on_plateau and config.interval == "epoch" and epochs % config.frequency == 0
        if config.monitor in trainer.callback_metrics
    }


def step_plateaus(trainer: Trainer, due: Mapping[int, float]) -> None:
    """What Lightning leaves out of an epoch that was resumed in its middle or after the checkpoint of its end."""
    for index, metric in due.items():
        trainer.lightning_module.lr_scheduler_step(trainer.lr_scheduler_configs[index].scheduler, metric)


def write_settings(path: Path, settings: dict[str, Any]) -> None:
    with write_whole(path, text=True) as file:
        yaml.safe_dump(settings, file, sort_keys=False)


def generators() -> dict[str, Any]:
    """The states of Python's, numpy's and torch's generators, as values that load with weights_only=True."""
    state: Any = np.random.get_state()
    name, keys, *rest = state
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_generators(states: dict[str, Any]) -> None:
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])


def not_finite(got: str, step: int) -> UserError:
    remedy = "try a smaller --model.optimizer.lr, or --trainer.gradient_clip_val 1."
    return UserError("finite numbers in training", f"{got} at step {step}", remedy)
