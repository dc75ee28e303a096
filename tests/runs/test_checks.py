"""Checks: what is refused once several processes run, or a schedule's length is known. Batches that don't fit, and
metrics to monitor, are in commands/test_refusals.py."""

import io
from contextlib import redirect_stderr
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch import LightningModule
from running import command, run

from mnist_lightning.data import MNISTDataModule
from mnist_lightning.errors import UserError
from mnist_lightning.runs.checks import Checks


@pytest.mark.parametrize(("settings", "first", "message"), [
    ({}, "mnist", r"the same data on every host \(mnist\)\ngot digits\n"),
    ({"val_size": 50}, "digits", "an image for each of 2 processes\ngot a part of 1\n"),  # of MNIST's 60,000
])  # fmt: skip
def test_processes_need_the_same_data_and_an_image_each(settings: Any, first: str, message: str) -> None:
    data = MNISTDataModule(source="digits", **settings)
    data.setup("fit")
    strategy = SimpleNamespace(broadcast=lambda source: first)  # what rank 0 found
    trainer: Any = SimpleNamespace(world_size=2, strategy=strategy, datamodule=data)
    with pytest.raises(UserError, match=f"^expected {message}"):
        Checks().setup(trainer, LightningModule(), "fit")


def test_schedule_of_a_fixed_length_is_not_outlived(folder: Path) -> None:
    one_cycle = "--model.scheduler OneCycleLR --model.scheduler.max_lr 0.1 --pictures false --trainer.max_epochs 1"
    command("fit", "--data", "running.Few", *one_cycle.split())
    with redirect_stderr(io.StringIO()) as error:
        assert run(["fit", "--ckpt_path", "last", "--trainer.max_epochs", "2"]) == 2
    assert "expected a fit as long as its OneCycleLR, 5 steps\n       got a fit of 10 steps\n" in error.getvalue()
    assert "to train longer, start a new run" in command("fit", "--ckpt_path", "last")
