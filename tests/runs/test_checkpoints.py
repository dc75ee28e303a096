"""Checkpoint files: when they are saved, that they are whole, that nothing in them is run, that old ones are read."""

import errno
import os
import random
import shlex
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer

from mnist_lightning.convnet import ConvNet
from mnist_lightning.data import MNISTDataModule
from mnist_lightning.errors import UserError
from mnist_lightning.runs.checkpoints import BestCheckpoint, LastCheckpoint, WholeCheckpointIO, read_checkpoint
from mnist_lightning.runs.state import RunState, generators, set_generators

CONTENT = {"state_dict": {"weight": torch.arange(1000.0)}, "hyper_parameters": {"_class_path": "a.B"}, "epoch": 3}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    WholeCheckpointIO().save_checkpoint(CONTENT, path)
    return path


def trainer(root: Path, **settings: Any) -> Trainer:
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    usual = {"max_epochs": 1, "limit_train_batches": 1, "limit_val_batches": 0, "accelerator": "cpu"}
    return Trainer(default_root_dir=root, **quiet | usual | settings)


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as raised:
        read_checkpoint(path)
    expected, got, remedy = str(raised.value).split("\n")
    assert expected == "expected a checkpoint of this project"
    assert remedy == "give --ckpt_path best, last or another file."
    return got


# ---- Writing and reading


def test_checkpoint_comes_back_as_it_was(path: Path) -> None:
    content = read_checkpoint(path)
    assert torch.equal(content["state_dict"]["weight"], torch.arange(1000.0))
    assert (content["epoch"], content["hyper_parameters"]) == (3, {"_class_path": "a.B"})
    assert os.listdir(path.parent) == ["last.ckpt"]


@pytest.mark.parametrize("place", ["torch.save", "os.fsync", "os.replace"])
@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "full"), PermissionError(), KeyboardInterrupt()], ids=repr)
def test_failed_save_is_an_error_and_the_earlier_checkpoint_survives(
    place: str, failure: BaseException, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through a Trainer, whose own plugin swallows a PermissionError: no file, no word."""
    run, whole = trainer(path.parent, plugins=[WholeCheckpointIO()]), path.read_bytes()
    run.strategy.connect(ConvNet())
    with monkeypatch.context() as patch, pytest.raises(type(failure)):
        patch.setattr(place, Mock(side_effect=failure))
        run.save_checkpoint(path)
    assert path.read_bytes() == whole
    assert os.listdir(path.parent) == ["last.ckpt"]
    run.save_checkpoint(path)
    assert set(read_checkpoint(path)["state_dict"]) == set(ConvNet().state_dict())


@pytest.mark.parametrize("content", [b"", b"\x00" * 99, b"text\n", b"\x80\x05.", b"PK\x03\x04"])
def test_file_that_is_no_checkpoint_is_refused(content: bytes, path: Path) -> None:
    path.write_bytes(content)
    assert "which is " in refusal(path)


@pytest.mark.parametrize("content", [
    [], 3, torch.zeros(3), {}, {"state_dict": {}}, {"hyper_parameters": {}}, {"hyper_parameters": {"lr": 1}},
    {"hyper_parameters": 3}, {"hyper_parameters": {"_class_path": "a.B"}}, {**CONTENT, "state_dict": 3},
    {**CONTENT, "hyper_parameters": {"_class_path": ["a"]}},
], ids=repr)  # fmt: skip
def test_content_of_another_kind_is_refused(content: Any, path: Path) -> None:
    torch.save(content, path)
    assert refusal(path) == f"got {path}, which is something else"


def test_checkpoint_of_a_gpu_is_read_without_one(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("torch.serialization.location_tag", lambda storage: "cuda:0")  # as if its tensors lay there
        torch.save(CONTENT, path)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="CUDA"):
            torch.load(path)
    assert torch.equal(read_checkpoint(path)["state_dict"]["weight"], torch.arange(1000.0))
    assert WholeCheckpointIO().load_checkpoint(path)["state_dict"]["weight"].device.type == "cpu"


# ---- What a fit keeps


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
    script: list[tuple[float, float]], best: int, tmp_path: Path
) -> None:
    model, keeper = Scripted(), BestCheckpoint(tmp_path, "val/acc", "max")
    model.script = script
    settings = {"max_epochs": 3, "limit_val_batches": 1, "num_sanity_val_steps": 0, "enable_checkpointing": True}
    trainer(tmp_path, callbacks=[keeper], **settings).fit(model, MNISTDataModule(source="digits"))
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
    settings: dict[str, Any], interval: int, saved: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    monkeypatch.setattr(Trainer, "save_checkpoint", lambda trainer, *_, **__: steps.append(trainer.global_step))
    run = trainer(tmp_path, callbacks=[LastCheckpoint(tmp_path / "last.ckpt")], enable_checkpointing=True, **settings)
    clock = SimpleNamespace(monotonic=lambda: interval * run.global_step)
    monkeypatch.setattr("mnist_lightning.runs.checkpoints.time", clock)
    run.fit(ConvNet(), MNISTDataModule(source="digits"))
    assert steps == saved


def test_command_to_go_on_can_be_pasted_where_the_path_has_a_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Asked(ConvNet):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.chdir(tmp_path)
    last = tmp_path / "my runs" / "last.ckpt"
    run = trainer(tmp_path, callbacks=[LastCheckpoint(last)], enable_checkpointing=True)
    with pytest.raises(SystemExit, match="143"):
        run.fit(Asked(), MNISTDataModule(source="digits"))
    command = capsys.readouterr().out.split("To go on: ")[1]
    assert Path(shlex.split(command)[-1]).resolve() == last and last.is_file()


@pytest.mark.parametrize(("poison", "got"), [("conv1", "a training loss of nan at step 1"), ("unused", "weights that")])
def test_numbers_that_are_not_finite_end_the_fit_before_a_checkpoint(poison: str, got: str, tmp_path: Path) -> None:
    model = ConvNet()
    model.unused = torch.nn.Linear(2, 2)
    torch.nn.init.constant_(model.get_submodule(poison).weight, float("nan"))
    callbacks = [RunState({}), LastCheckpoint(tmp_path / "last.ckpt")]
    run = trainer(tmp_path, callbacks=callbacks, enable_checkpointing=True)
    with pytest.raises(UserError, match=rf"finite numbers in training\ngot {got}(.|\n)*smaller --model.optimizer.lr"):
        run.fit(model, MNISTDataModule(source="digits"))
    assert os.listdir(tmp_path) == []


def test_generators_go_on_where_they_were(tmp_path: Path) -> None:
    def draw() -> list[float]:
        return [random.gauss(0, 1), float(np.random.randn()), float(torch.randn(()))]

    draw()
    torch.save(generators(), tmp_path / "states")
    expected = draw() + draw()
    set_generators(torch.load(tmp_path / "states", weights_only=True))
    assert draw() + draw() == expected
