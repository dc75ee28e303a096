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
from torch import Tensor

from mnist_lightning.errors import UserError
from mnist_lightning.files import write_whole
from mnist_lightning.runs.classes import named_classes
from mnist_lightning.runs.saved import Example, generators_of, save_run


class RunState(Callback):
    """Keeps in each checkpoint the states of all random generators, the settings, and what the classes are called.

    A run that is resumed draws the same random numbers as one that nothing interrupted, dropout's for example. Weights
    or a loss that aren't finite end the fit before they overwrite a good checkpoint.

    Args:
        settings: all of the run's, as config.yaml has them: {"model": {"class_path": ..., "init_args": ...}, ...}.
        config: config.yaml of a resumed run, written anew when training starts: the settings may be others now.
    """

    def __init__(self, settings: dict[str, Any], config: Path | None = None) -> None:
        self.settings, self.config = settings, config
        self.example: Example | None = None
        self._generators: dict[str, Any] | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.example is None and isinstance(batch, (tuple, list)) and isinstance(batch[0], Tensor):
            images = batch[0]
            self.example = Example(tuple(images.shape[1:]), str(images.dtype).removeprefix("torch."))

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
        trained = (parameter for parameter in pl_module.parameters() if parameter.requires_grad)
        if not all(bool(parameter.isfinite().all()) for parameter in trained):
            raise not_finite("weights that aren't", trainer.global_step)
        names = named_classes(trainer.datamodule)  # type: ignore[attr-defined]
        save_run(checkpoint, self.settings, generators(), self.example, names)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # At once, for the data loader of the next epoch may draw its order; and again before a batch that follows.
        self._generators = generators_of(checkpoint)
        if self._generators:
            set_generators(self._generators)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._generators and trainer.fit_loop.restarted_mid_epoch:
            set_generators(self._generators)
        self._generators = None
        if self.config is not None and trainer.is_global_zero:
            write_settings(self.config, self.settings)


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
