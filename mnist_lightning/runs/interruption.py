"""Interruption: a fit that is stopped, or fails, leaves a checkpoint and says how to go on."""

import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from mnist_lightning.errors import UserError
from mnist_lightning.runs.folder import shown_path


class Interruption(Callback):
    """SIGTERM and Ctrl-C end a fit between two batches, with a checkpoint; a second Ctrl-C ends it at once.

    Lightning's own Ctrl-C may fall into the middle of an optimizer step and exits with 1; its SIGTERM exits with 0.

    Args:
        checkpoint: the file to save to.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        self.received = 0
        self._before: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not in setup: Lightning registers its own handlers between the two.
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._leave_if_asked(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # After a signal during the last validation. Not in on_train_epoch_end: Lightning calls those that save `best`
        # after the others, and a resumed run doesn't come back to that epoch.
        self._leave_if_asked(trainer)
        self._put_back()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._put_back()
        unexpected = isinstance(exception, Exception) and not isinstance(exception, UserError)
        if unexpected and trainer.world_size == 1 and trainer.global_step > 0:
            path = self.checkpoint.with_name("exception.ckpt")  # a name that no later save takes
            try:
                trainer.save_checkpoint(path)
                said = f"the state is kept in {shown_path(path)}"
            except Exception as error:  # a full disk, weights that aren't finite: it mustn't hide the first exception
                said = f"the state can't be kept: {error}".splitlines()[0]
            print(f"{type(exception).__name__}: {said}", file=sys.stderr, flush=True)

    def _put_back(self) -> None:
        # Not in teardown: by then Lightning has put back what it found, and these would be Lightning's own.
        while self._before:
            signal.signal(*self._before.popitem())

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            os._exit(128 + number)
        self.received = number
        print(f"\n{signal.Signals(number).name}: ending after this batch ...", file=sys.stderr, flush=True)

    def _leave_if_asked(self, trainer: Trainer) -> None:
        asked = bool(self.received)
        if trainer.world_size > 1:  # the signal may have reached one process only
            asked = trainer.strategy.reduce_boolean_decision(asked, all=False)
        if asked:
            trainer.save_checkpoint(self.checkpoint)
            if trainer.is_global_zero:
                command = f"python -m mnist_lightning fit --ckpt_path {shown_path(self.checkpoint)}"
                print(f"Stopped after step {trainer.global_step}. To go on: {command}")
            sys.exit(128 + (self.received or signal.SIGTERM))
