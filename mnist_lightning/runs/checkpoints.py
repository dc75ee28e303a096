"""A run's checkpoints: `best`, `last`, `exception` where a fit failed: written whole, read without running anything."""

import io
import math
import os
import pickle
import re
import signal
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import IO, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from mnist_lightning.errors import Reason, UserError
from mnist_lightning.files import load_safely, write_whole
from mnist_lightning.runs.folder import quoted, shown_path
from mnist_lightning.runs.saved import REMEDY, Saved

MINUTE = 60.0  # seconds; what a kill costs at most


class WholeCheckpointIO(TorchCheckpointIO):
    """Lightning's own goes by the temp folder, moves without fsync, and swallows a PermissionError.

    The first checkpoint is read back: one that can't be loaded with weights_only=True is refused, not found out later.

    Args:
        saved: a checkpoint that has been read: it isn't read again.
    """

    def __init__(self, saved: Saved | None = None) -> None:
        self.saved, self.checked = saved, False

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        buffer = io.BytesIO()  # torch.save's zip writer would turn a full disk's OSError into a RuntimeError
        torch.save(checkpoint, buffer)
        if not self.checked:
            refuse_objects(buffer)
            self.checked = True
        with write_whole(path) as file:
            file.write(buffer.getbuffer())

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True) -> Any:
        if self.saved is not None and Path(path) == self.saved.path:
            return self.saved.content
        return load_safely(Path(path), "a checkpoint", REMEDY, map_location)


class BestCheckpoint(ModelCheckpoint):
    """`best`: the weights with the best validation metric, of equal ones those with the lower val/loss.

    After a fit without validation, or one that never came to it, `best` holds the final weights.

    Args:
        folder: where best.ckpt goes.
        monitor: the metric.
        mode: max or min.
    """

    def __init__(self, folder: Path, monitor: str, mode: str) -> None:
        after_training = None if monitor.startswith("val") else True  # a validation in mid-epoch comes too early for it
        options: dict[str, Any] = {"monitor": monitor, "mode": mode, "save_on_train_epoch_end": after_training}
        super().__init__(folder, filename="best", enable_version_counter=False, **options)
        self.best_loss = math.inf

    def check_monitor_top_k(self, trainer: Trainer, current: Tensor | None = None) -> bool:
        loss = float(trainer.callback_metrics.get("val/loss", math.inf))
        better = super().check_monitor_top_k(trainer, current)
        if not better and current is not None and current == self.best_model_score:
            better = trainer.strategy.reduce_boolean_decision(loss < self.best_loss)
        if better:
            self.best_loss = loss
        return better

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not str(self.monitor).startswith("val"):
            check_monitor(trainer, str(self.monitor))
        if self.monitor in trainer.callback_metrics:
            super().on_train_epoch_end(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        if (not self.best_model_path or averages_at_the_end(trainer)) and trainer.global_step > 0:
            self.best_model_path = os.path.join(str(self.dirpath), "best.ckpt")
            trainer.save_checkpoint(self.best_model_path, weights_only=False)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "best_loss": self.best_loss}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Lightning's own forgets the best score of a run whose folder was moved since."""
        path = os.path.join(str(self.dirpath), "best.ckpt")
        if not (state_dict["best_model_path"] and os.path.isfile(path)):
            return  # a copy of `last` alone: the next validation gives a new `best`
        scores = {path: score for score in state_dict["best_k_models"].values()}
        moved = {"best_model_path": path, "kth_best_model_path": path, "last_model_path": "", "best_k_models": scores}
        super().load_state_dict({**state_dict, **moved, "dirpath": self.dirpath})
        self.best_loss = state_dict.get("best_loss", -math.inf)


class LastCheckpoint(Checkpoint):
    """`last`: saved at each epoch's end, once a minute, and where a fit ends or is stopped in mid-epoch.

    SIGTERM and Ctrl-C end a fit between two batches, with that checkpoint; a second Ctrl-C ends it at once.
    (Lightning's own Ctrl-C may fall into the middle of an optimizer step and exits with 1; its SIGTERM exits with 0.)
    An exception leaves exception.ckpt.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.signal = 0  # the one that was received
        self.saved_time, self.saved_step = 0.0, 0
        self.first_step = sys.maxsize  # of this fit
        self._handlers: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.saved_time, self.saved_step = time.monotonic(), trainer.global_step
        self.first_step = trainer.global_step
        # Not in setup: Lightning registers its own handlers between the two. Only a main thread may have any.
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # One resumed from a checkpoint before a validation, or before the epoch's end, would leave that out.
        if not trainer.is_last_batch and not validates_next(trainer, batch_idx):
            self._save_or_leave(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking and not trainer.is_last_batch:
            self._save_or_leave(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The end of an epoch that was cut short would be taken for a whole one on resuming.
        if trainer.is_last_batch:
            self._save(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not in on_train_epoch_end: the epoch's metrics are logged after it, and `best` is saved in on_train_end.
        if self.first_step < self.saved_step == trainer.global_step and agreed(trainer, bool(self.signal)):
            self._leave(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if averages_at_the_end(trainer) or self.saved_step != trainer.global_step:
            self._save(trainer)
        # A signal may have come in the last validation. `best` is saved after on_train_epoch_end: leave only here.
        if agreed(trainer, bool(self.signal)):
            self._leave(trainer)
        self._put_back()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._put_back()
        unexpected = isinstance(exception, Exception) and not isinstance(exception, UserError)
        if unexpected and trainer.world_size == 1 and trainer.global_step > self.first_step:
            path = self.path.with_name("exception.ckpt")
            try:
                trainer.save_checkpoint(path, weights_only=False)
                said = f"the state is kept in {shown_path(path)}"
            except Exception as error:  # a full disk, weights that aren't finite: it mustn't hide the first exception
                said = f"the state can't be kept: {error}".splitlines()[0]
            print(f"{type(exception).__name__}: {said}", file=sys.stderr, flush=True)

    def _save(self, trainer: Trainer) -> None:
        trainer.save_checkpoint(self.path, weights_only=False)
        self.saved_time, self.saved_step = time.monotonic(), trainer.global_step

    def _save_or_leave(self, trainer: Trainer) -> None:
        minute = time.monotonic() - self.saved_time >= MINUTE
        if agreed(trainer, bool(self.signal)):
            self._save(trainer)
            self._leave(trainer)
        elif agreed(trainer, minute) or ends_now(trainer):
            self._save(trainer)

    def _leave(self, trainer: Trainer) -> None:
        if trainer.is_global_zero:
            command = f"python -m mnist_lightning fit --ckpt_path {quoted(self.path)}"
            print(f"Stopped after step {trainer.global_step}. To go on: {command}")
        sys.exit(128 + (self.signal or signal.SIGTERM))

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal and number == signal.SIGINT:
            os._exit(128 + number)
        self.signal = number
        print(f"\n{signal.Signals(number).name}: ending after this batch ...", file=sys.stderr, flush=True)

    def _put_back(self) -> None:
        # Not in teardown: by then Lightning has put back what it found, and these would be Lightning's own.
        while self._handlers:
            signal.signal(*self._handlers.popitem())


def refuse_objects(saved: IO[bytes]) -> None:
    """Raises UserError if a checkpoint holds more than plain values and tensors."""
    saved.seek(0)
    try:
        torch.load(saved, "cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        name = re.search(r"(?:GLOBAL|class) ([\w.]+)", str(error))
        got = f"an object of {name[1]}" if name else str(error).splitlines()[0]
        remedy = "change the hyperparameters, state_dict or on_save_checkpoint that it comes from."
        raise UserError("plain values and tensors in a checkpoint", got, remedy) from error


def check_monitor(trainer: Trainer, monitor: str) -> None:
    """Raises UserError if a metric isn't logged."""
    if monitor not in trainer.callback_metrics:
        raise UserError(*unknown_metric(monitor, trainer.callback_metrics))


def unknown_metric(monitor: str, logged: Iterable[str]) -> Reason:
    got = f"{monitor}; the model logs {', '.join(sorted(logged)) or 'nothing'}"
    remedy = "name another: --monitor METRIC (with --monitor_mode min where lower is better), or the callback's."
    return "a metric to monitor", got, remedy


def agreed(trainer: Trainer, mine: bool) -> bool:
    """Whether any of the processes says so: clocks differ, and a signal may reach one of them only."""
    return mine if trainer.world_size == 1 else trainer.strategy.reduce_boolean_decision(mine, all=False)


def validates_next(trainer: Trainer, batch_idx: int) -> bool:
    """Whether a validation follows this batch in the middle of an epoch."""
    epochs, every = trainer.check_val_every_n_epoch, trainer.val_check_batch
    if not trainer.enable_validation or not every or (epochs and (trainer.current_epoch + 1) % epochs):
        return False
    return ((batch_idx if epochs else trainer.fit_loop.total_batch_idx) + 1) % every == 0


def ends_now(trainer: Trainer) -> bool:
    """Whether the fit ends after this batch: by --trainer.max_steps, or by a callback that asked for it."""
    if trainer.should_stop:
        return trainer.global_step >= (trainer.min_steps or 0) and trainer.current_epoch >= (trainer.min_epochs or 0)
    return 0 <= trainer.max_steps <= trainer.global_step  # two optimizers make two steps a batch


def averages_at_the_end(trainer: Trainer) -> bool:
    """Whether the weights change after the last validation."""
    return any(isinstance(callback, StochasticWeightAveraging) for callback in trainer.callbacks)  # type: ignore
