"""Bad input: exit code 2, three lines that say what was expected, what was there and what to do, and nothing left."""

import re
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from lightning.pytorch import Callback
from running import refused

from mnist_lightning.convnet import ConvNet

NOBODY = "http://127.0.0.1:1"  # a port that nothing listens on

FILES = {
    "broken.yaml": b"model: [ConvNet\n}{",
    "list.yaml": b"- model\n- data\n",
    "binary.yaml": bytes(range(256)),
    "only_fit.yaml": b"fit:\n",
    "key.yaml": b"modell: ConvNet\n",
    "data_key.yaml": b"data:\n  batchsize: 3\n",
    "class.yaml": b"model: ConvNt\n",
    "init_args.yaml": b"model:\n  class_path: ConvNet\n  init_args: 3\n",
    "range.yaml": b"data:\n  class_path: MNISTDataModule\n  init_args:\n    batch_size: 0\n",
    "model_list.yaml": b"model: [1, 2]\n",
    "model_number.yaml": b"model: 5\n",
    "model_null.yaml": b"model: null\n",
    "trainer_number.yaml": b"trainer: 5\n",
    "text.ckpt": b"not a checkpoint",
}


def checkpoint(**changes: Any) -> dict[str, Any]:
    """A checkpoint of ConvNet in its smallest form; a change to None leaves that part out."""
    content = {
        "state_dict": ConvNet().state_dict(),
        "hyper_parameters": {"_class_path": "mnist_lightning.convnet.ConvNet"},
        "datamodule_hyper_parameters": {"source": "digits"},
        "pytorch-lightning_version": "2.6.0",
        **changes,
    }
    return {key: value for key, value in content.items() if value is not None}


def hyperparameters(**changes: Any) -> dict[str, Any]:
    return {"hyper_parameters": {"_class_path": "mnist_lightning.convnet.ConvNet", **changes}}


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of files of the wrong kind, by the names that the table below uses."""
    folder = tmp_path_factory.mktemp("samples")
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    (folder / "folder").mkdir()
    contents = {
        "whole.ckpt": checkpoint(),
        "other.ckpt": {"a": 1},
        "wrong_shape.ckpt": checkpoint(state_dict={**ConvNet().state_dict(), "fc2.bias": torch.zeros(11)}),
        "missing_layer.ckpt": checkpoint(state_dict={"conv1.weight": torch.zeros(32, 1, 3, 3)}),
        "no_state.ckpt": checkpoint(state_dict=None),
        "hyper_unknown.ckpt": checkpoint(**hyperparameters(dropout=0.5)),
        "data_range.ckpt": checkpoint(datamodule_hyper_parameters={"batch_size": -3}),
        "class_gone.ckpt": checkpoint(**hyperparameters(_class_path="mnist_lightning.gone.Net")),
        "class_foreign.ckpt": checkpoint(**hyperparameters(_class_path="torch.nn.Linear")),
    }
    for name, content in contents.items():
        torch.save(content, folder / name)
    whole = (folder / "whole.ckpt").read_bytes()
    (folder / "truncated.ckpt").write_bytes(whole[: len(whole) // 2])
    return folder


class Own(ConvNet):
    """A class that isn't the project's: mine.Own."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()


class Rich(Callback):
    """As Lightning's RichProgressBar where that package isn't installed."""

    def __init__(self) -> None:
        raise ModuleNotFoundError("RichProgressBar requires rich")


@pytest.fixture(autouse=True)
def in_a_folder_of_samples(samples: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in samples.iterdir():
        (folder / path.name).symlink_to(path)
    mine = ModuleType("mine")
    mine.Own, mine.Rich = Own, Rich
    monkeypatch.setitem(sys.modules, "mine", mine)


# The command line, and what the message says: expected … got … remedy.
BAD = {
    # Misspelt, with a did-you-mean
    "fit --model ConvNt": "class for --model: ConvNet, ResNet18 got ConvNt did you mean ConvNet",
    "fit --model=ResNet": "got ResNet did you mean ResNet18",
    "fit --data MNISTDatamodule": "class for --data: .*Photos got MNISTDatamodule did you mean MNISTDataM",
    "fit --modle ConvNet": "an option that exists here got --modle did you mean --model",
    "fit --data.batchsize 3": "got --data.batchsize did you mean --data.batch_size",
    "fit --model ResNet18 --model.image_siz 64": "got --model.image_siz did you mean --model.image_size",
    "fit --model.optimizer AdamWW": "class for --model.optimizer, by its name got AdamWW did you mean AdamW",
    "fit --model.optimizer AdamW --model.optimizer.lrr 1": "an option that exists here got --model.optimizer.lrr",
    "fit --model.scheduler OneCycle": "class for --model.scheduler, by its name got OneCycle did you mean OneCycleLR",
    "fitt": "one of fit, validate, test, predict got fitt did you mean fit",
    "": "a command: fit, validate, test, predict, export.* got none for example: python -m mnist_lightning fit",
    # Right, in the wrong place
    "fit --model.image_size 64": "got --model.image_size it belongs to ResNet18: add --model ResNet18",
    "fit --model ConvNet --model.weights none": "got --model.weights it belongs to ResNet18",
    "fit surplus": "got surplus",
    # Abbreviated
    "fit --trainer.max_epoch=3": "got --trainer.max_epoch did you mean --trainer.max_epochs",
    "fit --mod ConvNet": "got --mod did you mean --model",
    # No value
    "fit --data.batch_size": "a value after --data.batch_size got nothing",
    "fit --config": "a value after .*--config got nothing",
    "fit --model": "a value after --model got nothing",
    "test --ckpt_path": "a value after --ckpt_path got nothing",
    # A class of one's own, or one whose package isn't there
    "fit --model mine.Own --model.widht 4": "got --model.widht did you mean --model.width",
    "fit --model mine.Own --model.width wide": "--model.width to be a whole number got wide",
    "fit --model nowhere.Net": "a valid --model got nowhere.Net: No module named 'nowhere'",
    "fit --trainer.callbacks nowhere.Watch": "a valid --trainer.callbacks got nowhere.Watch: No module named 'nowhere'",
    "fit --data.source digits --trainer.logger WandbLogger": "got .*wandb.* not met",
    "fit --data.source digits --trainer.callbacks mine.Rich": "got RichProgressBar requires rich",
    # Wrong type or range
    "fit --data.batch_size 0": "--data.batch_size to be a number >0 got 0",
    "fit --data.batch_size many": "--data.batch_size to be a whole number got many",
    "fit --data.source digits --data.val_size -1": "a val_size from 0 to 1436 images got -1",
    "fit --data.val_size 1.5": "--data.val_size to be a whole number or a number >0 and <1 got 1.5",
    "fit --data.source digits --data.val_size 60000": "a val_size from 0 to 1436 images got 1437",
    "fit --data.source cifar": "--data.source to be one of auto, mnist, digits got cifar",
    f"fit --data.mirrors {NOBODY}": f"--data.mirrors to be .*list.* got {NOBODY}",
    "fit --model ResNet18 --model.image_size 8": "--model.image_size to be a number >=28 and <=512 got 8",
    "fit --model.optimizer AdamW --model.optimizer.lr fast": "--model.optimizer.lr to be a number got fast",
    "fit --data.source digits --model.optimizer.lr -1": "settings that fit together got Invalid learning rate: -1",
    "fit --model.scheduler StepLR": "step_size beside --model.scheduler got nothing add --model.scheduler.step_size",
    "fit --trainer.callbacks LearningRateMonitor --trainer.callbacks.logging_interval hour":
        "--trainer.callbacks.logging_interval to be one of step, epoch got hour",
    "fit --data.source digits --lr_find true --trainer.max_steps 5": "--lr_find alone got --trainer.max_steps 5",
    "test --ckpt_path whole.ckpt --trainer.barebones true": "metrics to test with got --trainer.barebones true",
    "fit --trainer.max_epochs ten": "--trainer.max_epochs to be a whole number got ten",
    "fit --data.source digits --trainer.max_epochs -5": "got .*max_epochs.* -5",
    "fit --data.source digits --trainer.val_check_interval 1000": "got .*val_check_interval.*1000",
    "fit --data.source digits --trainer.max_epochs -1 --model.scheduler OneCycleLR --model.scheduler.max_lr 1":
        "a fit of known length for this schedule got none give --trainer.max_epochs",
    "fit --seed_everything x": "--seed_everything to be .*a whole number got x",
    "fit --seed_everything -5": "got .*-5",
    # Config files
    "fit --config nowhere.yaml": "--config got File does not exist: .*nowhere.yaml",
    "fit --config folder": "--config got Path is not a file: .*folder",
    "fit --config broken.yaml": "config file got .*line 1",
    "fit --config list.yaml": "config file got Unexpected config: - model - data",
    "fit --config only_fit.yaml": "config file got Unexpected config: fit:",
    "fit --config binary.yaml": "config file got .*can't decode byte 0x80",
    "fit --config key.yaml": "got --modell did you mean --model",
    "fit --config data_key.yaml": "got --data.batchsize did you mean --data.batch_size",
    "fit --config class.yaml": "class for --model: ConvNet, ResNet18 got ConvNt did you mean ConvNet",
    "fit --config init_args.yaml": "a valid --model got .*'init_args': 3.*no attribute",
    "fit --config range.yaml": "--data.batch_size to be a number >0 got .*0",
    "fit --config model_list.yaml": "a valid --model got .1, 2.: Not a valid subclass",
    "fit --config model_number.yaml": "a valid --model got 5: Not a valid subclass",
    "fit --config model_null.yaml": "--model got nothing",
    "fit --config trainer_number.yaml": "settings below trainer: in trainer_number.yaml got 5",
    # Checkpoints
    "test": "a checkpoint to test got none add --ckpt_path FILE, or best or last",
    "test --ckpt_path=": "a checkpoint",
    "test --ckpt_path best": "a run of a model with a checkpoint under lightning_logs got none train one with",
    "test --ckpt_path last --model ResNet18": "a run of ResNet18 with a checkpoint under lightning_logs got none",
    "fit --ckpt_path last": "a run of a model with a checkpoint under lightning_logs got none",
    "test --ckpt_path nowhere.ckpt": "a checkpoint of this project got no such file: nowhere.ckpt",
    "test --ckpt_path folder": "got a folder: folder",
    "test --ckpt_path text.ckpt": "got text.ckpt, which is damaged or something else",
    "test --ckpt_path truncated.ckpt": "got truncated.ckpt, which is damaged or something else",
    "test --ckpt_path other.ckpt": "got other.ckpt, which is something else",
    "test --ckpt_path whole.ckpt --model ResNet18": "a checkpoint of .*ResNet18 got one of .*ConvNet leave out --model",
    "fit --ckpt_path whole.ckpt": "to go on from got whole.ckpt, which holds the weights alone start a new run",
    "test --ckpt_path wrong_shape.ckpt": "fits the model .* got wrong_shape.ckpt, ConvNet: size mismatch for fc2",
    "test --ckpt_path missing_layer.ckpt": "got missing_layer.ckpt, ConvNet: Missing key.s. in state_dict: .conv1.bias",
    "test --ckpt_path no_state.ckpt": "got no_state.ckpt, which is something else",
    "test --ckpt_path hyper_unknown.ckpt": "got --model.dropout",
    "test --ckpt_path data_range.ckpt": "--data.batch_size to be a number >0 got .*-3",
    "test --ckpt_path class_gone.ckpt": "got .*(class_gone.ckpt|mnist_lightning.gone.Net)",
    "test --ckpt_path class_foreign.ckpt": "got .*torch.nn.*Linear",
    # Weights
    "fit --data.source digits --model ResNet18 --model.weights nowhere.pth":
        "ResNet18's weights .* or a checkpoint .* got no such file: nowhere.pth give --model.weights another file, im",
    "fit --data.source digits --model ResNet18 --model.weights text.ckpt": "got text.ckpt, which is damaged or some",
    # Folders that can't be used
    "fit --data.source mnist --data.data_dir text.ckpt": "a folder to read and write: text.ckpt/MNIST/raw got ",
    "fit --data.source digits --trainer.default_root_dir text.ckpt": "got Not a directory: .*/text.ckpt/lightning_logs",
}  # fmt: skip


@pytest.mark.parametrize("command", [line for line in BAD if "Wandb" not in line or find_spec("wandb") is None])
def test_bad_input_is_explained(command: str) -> None:
    assert re.search(f"^error: expected .*{BAD[command]}", refused(*command.split()))


# ---- What needs more than a command line


LOCKED = PermissionError(13, "Permission denied", "locked/x")
FULL = OSError(28, "No space left on device")


@pytest.mark.parametrize(("place", "error", "command", "message"), [
    ("pathlib.Path.mkdir", LOCKED, "fit --data.source mnist --data.data_dir locked",
     "a folder to read and write: locked/MNIST/raw got .*Permission denied: 'locked/x' put .* or give --data.data_dir"),
    ("pathlib.Path.mkdir", LOCKED, "fit --data.source digits", "the run's files got Permission denied: locked/x"),
    ("os.fsync", FULL, "fit --data.source digits", "to read and write the run's files got No space left on device"),
    ("torch.load", LOCKED, "test --ckpt_path whole.ckpt", "without read permission: whole.ckpt give --ckpt_path"),
], ids=lambda value: None)  # fmt: skip
def test_refusal_of_the_system_is_explained(
    place: str, error: OSError, command: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is played: whoever runs the tests as root may write everywhere."""
    monkeypatch.setattr(place, Mock(side_effect=error))
    assert re.search(message, refused(*command.split()))
