"""Schedules: when they step, what they watch, how long they are."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.cli import LightningCLI, ReduceLROnPlateau
from running import At
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import StepLR

from mnist_lightning.convnet import ConvNet
from mnist_lightning.data import MNISTDataModule

FIT = {"max_epochs": 2, "limit_train_batches": 3}


def digits() -> MNISTDataModule:
    return MNISTDataModule(source="digits", batch_size=16, train_size=88, val_size=2000)


def named(scheduler: str, **arguments: Any) -> ConvNet:
    """ConvNet with a schedule that is given by its name, on Lightning's own command line."""
    chosen = {"class_path": f"torch.optim.lr_scheduler.{scheduler}", "init_args": arguments}
    args = {"seed_everything": 0, "model": {"scheduler": chosen}, "trainer": {"logger": False, "accelerator": "cpu"}}
    return LightningCLI(ConvNet, run=False, args=args, auto_configure_optimizers=False).model


def test_schedule_given_as_a_function_steps_after_each_epoch(quiet: Callable) -> None:
    model = ConvNet(optimizer=lambda params: Adam(params, lr=2e-3), scheduler=lambda adam: StepLR(adam, 1, gamma=0.5))
    trainer = quiet(**FIT)
    trainer.fit(model, digits())
    (optimizer,) = trainer.optimizers
    assert (type(optimizer), optimizer.param_groups[0]["lr"]) == (Adam, 5e-4)


def test_reduce_on_plateau_watches_the_metric_that_it_is_told(quiet: Callable) -> None:
    schedule = {"monitor": "val/loss", "patience": 0, "factor": 0.5}
    model = ConvNet(
        optimizer=lambda params: SGD(params, lr=1e-12),  # the loss stays as it is
        scheduler=lambda optimizer: ReduceLROnPlateau(optimizer, eps=0, **schedule),
    )
    trainer = quiet(max_epochs=3, limit_train_batches=1)
    trainer.fit(model, digits())
    (config,) = trainer.lr_scheduler_configs
    assert config.scheduler.best == trainer.callback_metrics["val/loss"]
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.25e-12)


@pytest.mark.parametrize(("settings", "arguments", "steps", "total"), [
    ({}, {}, 6, 6),
    ({"accumulate_grad_batches": 2}, {}, 4, 4),  # the third batch of an epoch makes a step of its own
    ({"max_steps": 5}, {}, 5, 5),
    ({"max_steps": 50}, {}, 6, 6),  # the epochs end before
    ({"limit_train_batches": 0.5}, {}, 6, 6),  # of 6 batches
    ({"limit_train_batches": None}, {}, 12, 12),
    ({}, {"total_steps": 9}, 6, 9),
    ({}, {"epochs": 2, "steps_per_epoch": 4}, 6, 8),
])  # fmt: skip
def test_onecycle_steps_after_each_batch_to_the_end_of_the_fit(
    settings: dict[str, Any], arguments: dict[str, Any], steps: int, total: int, quiet: Callable
) -> None:
    trainer = quiet(**{**FIT, **settings})
    trainer.fit(named("OneCycleLR", max_lr=0.1, **arguments), digits())
    schedule = trainer.lr_scheduler_configs[0].scheduler
    assert (schedule.last_epoch, schedule.total_steps) == (steps, total)


def test_fit_resumed_in_mid_epoch_keeps_its_place_in_the_data_and_in_the_schedule(
    quiet: Callable, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    whole = named("OneCycleLR", max_lr=0.1)
    saves = At(4, lambda trainer: trainer.save_checkpoint(tmp_path / "mid.ckpt"))
    quiet(**FIT, callbacks=saves, enable_checkpointing=True).fit(whole, digits())
    resumed = named("OneCycleLR", max_lr=0.1)
    trainer = quiet(**FIT)
    trainer.fit(resumed, digits(), ckpt_path=tmp_path / "mid.ckpt", weights_only=True)
    assert trainer.lr_scheduler_configs[0].scheduler.total_steps == trainer.global_step == 6
    assert all(map(torch.equal, resumed.state_dict().values(), whole.state_dict().values()))


@pytest.mark.parametrize("monitor", ["val/loss", "train/loss"])
def test_plateau_waits_for_the_validations(monitor: str, quiet: Callable) -> None:
    trainer = quiet(max_epochs=3, limit_train_batches=1, check_val_every_n_epoch=2)
    trainer.fit(ConvNet(scheduler=lambda optimizer: ReduceLROnPlateau(optimizer, monitor=monitor)), digits())
    assert trainer.current_epoch == 3
