"""Checkpoint files: written whole or not at all, read without running anything in them."""

import importlib
import io
import math
import os
import time
import warnings
from functools import cached_property
from pathlib import Path
from typing import Any
from zipfile import ZipFile, is_zipfile

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from mnist_lightning.classifier import DigitClassifier
from mnist_lightning.errors import UserError
from mnist_lightning.files import write_whole


class WholeCheckpointIO(TorchCheckpointIO):
    """Lightning's own goes by the temp folder, moves without fsync, and swallows a PermissionError."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        buffer = io.BytesIO()  # torch.save's zip writer would turn a full disk's OSError into a RuntimeError
        torch.save(checkpoint, buffer)
        with write_whole(path) as file:
            file.write(buffer.getbuffer())

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = True) -> dict[str, Any]:
        return read_checkpoint(Path(path), map_location)


class RunCheckpoint(ModelCheckpoint):
    """Lightning's own forgets the best score when the run was moved since."""

    @cached_property
    def state_key(self) -> str:
        return super().state_key  # asked for at six hooks a step, and put together anew each time

    def on_train_batch_end(self, trainer: Trainer, *hook: Any) -> None:
        if self._train_time_interval is None:
            return  # nothing is due before the epoch's end
        waited = time.monotonic() - (self._last_time_checked or 0)
        # Lightning's own asks the other processes at each step.
        if trainer.world_size > 1 or waited >= self._train_time_interval.total_seconds():
            super().on_train_batch_end(trainer, *hook)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        def here(path: str) -> str:
            return os.path.join(str(self.dirpath), os.path.basename(path)) if path else path

        paths = ("best_model_path", "kth_best_model_path", "last_model_path")
        moved = {key: here(state_dict[key]) for key in paths}
        best = {here(path): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict({**state_dict, **moved, "best_k_models": best, "dirpath": self.dirpath})


class LastCheckpoint(RunCheckpoint):
    """`last`, at the end of an epoch: always of the fit's last one, of others ten seconds apart.

    A head on kept features trains for less than a second an epoch; saving 45 MB each time would take longer.
    """

    def __init__(self) -> None:
        super().__init__(filename="last", save_on_train_epoch_end=True, enable_version_counter=False)
        self._saved = -math.inf

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        ends = trainer.current_epoch + 1 == trainer.max_epochs or trainer.global_step == trainer.max_steps
        due = ends or trainer.should_stop or time.monotonic() - self._saved > 10
        if trainer.strategy.reduce_boolean_decision(due, all=False):  # clocks differ; saving takes all processes
            super().on_train_epoch_end(trainer, pl_module)
            self._saved = time.monotonic()


def read_checkpoint(path: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """The content of a checkpoint of this project.

    Raises:
        UserError: there is no such file, it is damaged, or it isn't a checkpoint of this project.
    """
    expected, remedy = "a checkpoint of this project", "give --ckpt_path best, last or another file."
    checkpoint = load_safely(path, expected, remedy, map_location)
    content = checkpoint if isinstance(checkpoint, dict) else {}
    hyperparameters, state = content.get("hyper_parameters"), content.get("state_dict")
    named = isinstance(hyperparameters, dict) and isinstance(hyperparameters.get("_class_path"), str)
    if not (named and isinstance(state, dict) and all(isinstance(value, torch.Tensor) for value in state.values())):
        raise UserError(expected, f"{path}, which is something else", remedy)
    return checkpoint


def load_model(path: str | os.PathLike[str]) -> DigitClassifier:
    """The model of a checkpoint, of the class and with the settings that it was trained with: on the CPU, in eval mode.

    Raises:
        UserError: there is no such file, it isn't a checkpoint of this project, or its class has changed since.
    """
    class_path = read_checkpoint(Path(path))["hyper_parameters"]["_class_path"]
    module, _, name = class_path.rpartition(".")
    remedy = "install that class's package, or the version of this one that wrote the checkpoint."
    try:
        cls = getattr(importlib.import_module(module), name)
        if not issubclass(cls, DigitClassifier):
            raise TypeError(f"{class_path} is no DigitClassifier")
        return cls.load_from_checkpoint(path, map_location="cpu", weights_only=True).eval()
    except (ImportError, AttributeError, TypeError, ValueError, RuntimeError) as error:  # KeyError is of our own code
        reason = str(error).strip().splitlines()
        got = f"{path}, of {class_path}: {' '.join(reason[:2])}"
        raise UserError("a checkpoint that fits its class as it is now", got, remedy) from error


def load_safely(path: Path, expected: str, remedy: str, map_location: Any = "cpu") -> Any:
    """torch.load with weights_only=True, so that a hostile file runs nothing; errors in words.

    Raises:
        UserError: there is no such file, or torch can't read it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd pickle protocols, in files that are no pickles
            if is_zipfile(path):
                with ZipFile(path) as file:  # torch writes the checksums but reads on over a flipped bit
                    if file.testzip():
                        raise ValueError("checksum")
            return torch.load(path, map_location=map_location, weights_only=True)
    except FileNotFoundError as error:
        raise UserError(expected, f"no such file: {path}", remedy) from error
    except IsADirectoryError as error:
        raise UserError(expected, f"a folder: {path}", remedy) from error
    except PermissionError as error:
        raise UserError(expected, f"a file without read permission: {path}", remedy) from error
    except Exception as error:  # torch.load answers damaged bytes with a dozen kinds of exception
        raise UserError(expected, f"{path}, which is damaged or something else", remedy) from error
