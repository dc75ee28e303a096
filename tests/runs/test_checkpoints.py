"""The checkpoints of a run: when they are saved, that they are whole, and which is the best."""

import errno
import os
import shlex
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from lightning.pytorch import Trainer
from running import loaded

from mnist_lightning.convnet import ConvNet
from mnist_lightning.data import MNISTDataModule
from mnist_lightning.runs.checkpoints import BestCheckpoint, LastCheckpoint, WholeCheckpointIO


@pytest.fixture
def fitting(quiet: Callable, tmp_path: Path) -> Callable[..., Trainer]:
    """Makes a Trainer for one training batch with the callbacks of checkpoints that it is given."""
    usual = {"max_epochs": 1, "limit_train_batches": 1, "limit_val_batches": 0, "enable_checkpointing": True}
    return lambda *callbacks, **settings: quiet(
        **{**usual, "callbacks": list(callbacks), "default_root_dir": tmp_path, **settings}
    )


@pytest.mark.parametrize("place", ["torch.save", "os.fsync", "os.replace"])
@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "full"), PermissionError(), KeyboardInterrupt()], ids=repr)
def test_failed_save_is_an_error_and_the_earlier_checkpoint_survives(
    place: str, failure: BaseException, tmp_path: Path, fitting: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through a Trainer, whose own plugin swallows a PermissionError: no file, no word."""
    path = tmp_path / "last.ckpt"
    run = fitting(plugins=[WholeCheckpointIO()])
    run.strategy.connect(ConvNet())
    run.save_checkpoint(path)
    whole = path.read_bytes()
    with monkeypatch.context() as patch, pytest.raises(type(failure)):
        patch.setattr(place, Mock(side_effect=failure))
        run.save_checkpoint(path)
    assert path.read_bytes() == whole
    assert os.listdir(path.parent) == ["last.ckpt"]
    run.save_checkpoint(path)
    assert set(loaded(path)["state_dict"]) == set(ConvNet().state_dict())


class Scripted(ConvNet):
    """Logs these (val/acc, val/loss), one pair an epoch, in the place of what it measures."""

    script: list[tuple[float, float]]

    def validation_step(self, *_: Any) -> None:
        accuracy, loss = self.script[self.current_epoch]
        self.log_dict({"val/acc": accuracy, "val/loss": loss})


@pytest.mark.parametrize(("script", "best"), [
    ([(0.5, 2), (0.9, 1), (0.7, 0.5)], 1),
    ([(0.9, 1), (0.9, 0.5), (0.9, 0.7)], 1),  # of equal ones the lower loss
    ([(0.9, 1), (0.9, 1), (0.5, 0.1)], 0),
])  # fmt: skip
def test_best_is_the_highest_accuracy_and_of_equal_ones_the_lower_loss(
    script: list[tuple[float, float]], best: int, tmp_path: Path, fitting: Callable
) -> None:
    model, keeper = Scripted(), BestCheckpoint(tmp_path, "val/acc", "max")
    model.script = script
    fitting(keeper, max_epochs=3, limit_val_batches=1).fit(model, MNISTDataModule(source="digits"))
    assert torch.load(tmp_path / "best.ckpt", weights_only=True)["epoch"] == best
    assert os.listdir(tmp_path) == ["best.ckpt"]


@pytest.mark.parametrize(("settings", "interval", "saved"), [
    ({"max_epochs": 3, "limit_train_batches": 4}, 14, [4, 8, 12]),  # seconds between two batches
    ({"max_epochs": 1, "limit_train_batches": 4}, 25, [3, 4]),
    ({"max_epochs": 1, "limit_train_batches": 4}, 61, [1, 2, 3, 4]),
    ({"max_epochs": -1, "max_steps": 6, "limit_train_batches": 4}, 0, [4, 6]),
    ({"max_epochs": -1, "max_steps": 8, "limit_train_batches": 4}, 0, [4, 8]),
])  # fmt: skip
def test_last_is_saved_at_an_epochs_end_once_a_minute_and_where_the_fit_ends(
    settings: dict[str, Any], interval: int, saved: list[int], tmp_path: Path, fitting: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    steps: list[int] = []
    monkeypatch.setattr(Trainer, "save_checkpoint", lambda trainer, *_, **__: steps.append(trainer.global_step))
    run = fitting(LastCheckpoint(tmp_path / "last.ckpt"), **settings)
    clock = SimpleNamespace(monotonic=lambda: interval * run.global_step)
    monkeypatch.setattr("mnist_lightning.runs.checkpoints.time", clock)
    run.fit(ConvNet(), MNISTDataModule(source="digits"))
    assert steps == saved


def test_command_to_go_on_can_be_pasted_where_the_path_has_a_space(
    folder: Path, fitting: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    class Asked(ConvNet):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            signal.raise_signal(signal.SIGTERM)

    last = folder / "my runs" / "last.ckpt"
    with pytest.raises(SystemExit, match="143"):
        fitting(LastCheckpoint(last)).fit(Asked(), MNISTDataModule(source="digits"))
    command = capsys.readouterr().out.split("To go on: ")[1]
    assert Path(shlex.split(command)[-1]).resolve() == last and last.is_file()
