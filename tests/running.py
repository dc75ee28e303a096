"""Commands run in this process, and the data that several test modules fit."""

import csv
import io
import os
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

import mnist_lightning
from mnist_lightning import MNISTDataModule
from mnist_lightning.commands.cli import run
from mnist_lightning.sources import Digits, Split, load_digits

DIGITS = ("--data.source", "digits", "--pictures", "false")
SHORT = (
    *(*DIGITS, "--data.batch_size", "64"),
    *("--trainer.limit_train_batches", "2", "--trainer.limit_test_batches", "2"),
)
RUN = Path("lightning_logs", "ConvNet-digits", "version_0")
CONFIGS = Path(mnist_lightning.__file__).parents[1] / "configs"
THE_DIGITS = "the 360 test images of scikit-learn's digits, not MNIST"
# For a fit on tests/conftest.py's 640 images
ON_640 = (
    *("--data.val_size", "0.1", "--pictures", "false"),
    *("--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2"),
)
READER = "--model foreign_project.models.Reader --data foreign_project.data.Letters --data.data_dir letters"


class Fit(NamedTuple):
    root: Path  # holds lightning_logs
    out: str


def command(*args: object) -> str:
    """Runs a command, which has to succeed; returns what it printed."""
    with redirect_stdout(io.StringIO()) as out:
        assert run([str(arg) for arg in args]) == 0
    return out.getvalue()


class Few(MNISTDataModule):
    """80 digits to train on, 20 to validate, 40 to test."""

    def __init__(self, augment: float = 0.0) -> None:
        super().__init__(batch_size=16, val_size=20, augment=augment)

    def load(self) -> Digits:
        train, test = load_digits()
        return Digits(Split(train.images[:100], train.labels[:100]), Split(test.images[:40], test.labels[:40]))


class Numbered(MNISTDataModule):
    """Images that can be told apart: label i for image i, and i modulo 251 as its only pixel."""

    def __init__(self, train: int = 300, test: int = 300, val_size: int = 0, **kwargs: Any) -> None:
        super().__init__(val_size=val_size, **{"batch_size": 64, **kwargs})
        self.counts = train, test

    def load(self) -> Digits:
        labels = [torch.arange(count) for count in self.counts]
        return Digits(*(Split((label % 251).to(torch.uint8).view(-1, 1, 1, 1), label) for label in labels))


def ready(datamodule: MNISTDataModule) -> MNISTDataModule:
    """The datamodule as `fit` has it."""
    datamodule.setup("fit")
    return datamodule


def labels_of(loader: DataLoader) -> list[int]:
    """The labels that a loader of `Numbered` gives, in order, each with the image that it belongs to."""
    batches = list(loader)
    assert all(torch.equal(images.flatten().long(), labels % 251) for images, labels in batches)
    return torch.cat([labels for _, labels in batches]).tolist()


class At(Checkpoint):
    """Does something after a step, as the last callback."""

    def __init__(self, step: int, action: Callable[[Trainer], None]) -> None:
        self.step, self.action = step, action

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == self.step:
            self.action(trainer)


def write_pictures(folder: Path) -> None:
    """20 pictures of each of two classes, red and blue, as people have them: of all sizes and modes, turned, broken."""
    generator = np.random.default_rng(0)
    for name, colour in (("ants", (200, 40, 40)), ("bees", (40, 40, 200))):
        (folder / name).mkdir(parents=True)
        (folder / name / ".DS_Store").write_bytes(b"Bud1")
        (folder / name / "broken.jpg").write_bytes(b"hello")
        for i in range(20):
            size = *generator.integers(35, 90, 2), 3
            pixels = np.clip(generator.normal(colour, 20, size), 0, 255).astype(np.uint8)
            exif = Image.Exif()
            exif[0x0112] = 1 + i % 8  # how the camera was held
            picture = Image.fromarray(pixels).convert(("RGB", "RGB", "RGBA", "P", "L")[i % 5])
            picture.save(folder / name / f"{i:02}.{'png' if picture.mode in ('RGBA', 'P') else 'jpg'}", exif=exif)


def fit(root: Path, *args: object) -> Fit:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr(sys, "argv", ["mnist_lightning"])
        patch.setenv("XDG_CACHE_HOME", str(root.with_name(f"{root.name}-cache")))
        return Fit(root, command("fit", *args))


def refusal(*args: object) -> list[str]:
    """Runs a command that must end in exit code 2 and three lines, and leave nothing: expected, got, remedy."""
    before = files(Path()) | folders()
    with redirect_stderr(io.StringIO()) as error:
        code = run([str(arg) for arg in args])
    message = re.sub("^Downloading .*\n", "", error.getvalue(), flags=re.M)
    assert (code, message.count("\n")) == (2, 3), message
    assert re.match("error: expected .*\n       got .*\n", message) and "Error" not in message, message
    changed = (files(Path()) | folders()) ^ before
    assert not changed, changed
    return [line.strip() for line in message.removeprefix("error: ").splitlines()]


def refused(*args: object) -> str:
    """The same in one line."""
    return " ".join(refusal(*args))


def printed_config(capsys: pytest.CaptureFixture[str], *args: object) -> dict[str, Any]:
    with pytest.raises(SystemExit) as ended:
        run([*map(str, args), "--print_config"])
    assert ended.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


def process(*args: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """`python -m mnist_lightning ARGS` in the current folder; the tests' own classes can be imported there."""
    tests = Path(__file__).parent
    usual = {"PYTHONPATH": os.pathsep.join(map(str, (tests.parent, tests, tests / "runs")))}
    usual |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.run(
        [sys.executable, "-m", "mnist_lightning", *args],
        env={**os.environ, **usual, **environment}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def accuracy(output: str) -> str:
    return re.search(r"accuracy\s+(\S+) %", output)[1]


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"}


def folders() -> set[str]:
    """Of runs, even empty ones."""
    return {str(path) for path in Path().rglob("lightning_logs/**") if path.is_dir()}


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def loaded(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def plain(value: Any) -> Any:
    """With tensors as bytes: == then compares to the last bit."""
    if isinstance(value, torch.Tensor):
        stored = value.float() if value.dtype == torch.bfloat16 else value.contiguous()  # numpy has no bfloat16
        return str(value.dtype), tuple(value.shape), stored.numpy().tobytes()
    if isinstance(value, dict):
        return {key: plain(content) for key, content in value.items()}
    return [plain(content) for content in value] if isinstance(value, (list, tuple)) else value


def events(run_folder: Path) -> EventAccumulator:
    return EventAccumulator(str(run_folder)).Reload()


def points(run_folder: Path, tag: str) -> list[float]:
    return [point.value for point in events(run_folder).Scalars(tag)]


def last(run_folder: Path = RUN) -> dict[str, Any]:
    return loaded(run_folder / "checkpoints" / "last.ckpt")
