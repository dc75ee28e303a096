"""Every option of Lightning's Trainer on the command line, with both models, and whether what is reported is so.

The table is checked against Trainer's signature: an option that a new Lightning brings fails here until it has a row.
A value is accepted (exit code 0) or refused in three lines (2). After a fit the files named exist, the accuracy printed
is that of `best` when a plain Trainer tests it, `last` has taken as many steps as were asked for, and files of somebody
else's lie as they lay.
"""

import inspect
import io
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch import Trainer

from mnist_lightning import MNISTDataModule, load_model
from mnist_lightning.commands.cli import run
from mnist_lightning.sources import Digits, Split, load_digits

# What Lightning warns of is said to the user; here it would end the fit.
# Slow: it has not been seen to pass whole yet, and takes minutes.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]

EPOCH = 5  # steps: 80 images, 16 a batch
FEW = f"{__name__}.Few"
MODELS = {
    "ConvNet": (),
    "ResNet18": ("--model", "ResNet18", "--model.weights", "none", "--model.image_size", "28"),
}
THEIRS = ("lightning_logs/notes.txt", "metrics.csv", "config.yaml", "report.png", "checkpoints/best.ckpt")


@cache
def few() -> Digits:
    train, test = load_digits()
    return Digits(Split(train.images[:100], train.labels[:100]), Split(test.images[:40], test.labels[:40]))


class Few(MNISTDataModule):
    """80 digits to train on, 20 to validate, 40 to test."""

    def __init__(self) -> None:
        super().__init__(batch_size=16, val_size=20)

    def load(self) -> Digits:
        return few()


class Case(NamedTuple):
    """A value of an option, what becomes of it, and what has to be typed beside it."""

    value: Any
    steps: int | None = EPOCH  # None: refused, with exit code 2
    beside: str = ""  # {m} is "trainer."


REFUSED = None
ONE_EPOCH = "--trainer.max_epochs 1"


def callbacks(name: str, steps: int | None = EPOCH, **arguments: Any) -> Case:
    typed = " ".join(f"--trainer.callbacks.{key} {value}" for key, value in arguments.items())
    return Case(name, steps, f"{typed} {ONE_EPOCH}")


OPTIONS: dict[str, list[Case]] = {
    "accelerator": [Case("cpu"), Case("auto"), Case("abacus", REFUSED)],
    "strategy": [Case("auto"), Case("ddp"), Case("deepspeed", REFUSED), Case("guess", REFUSED), Case("fsdp", REFUSED)],
    "devices": [Case(1), Case("auto"), Case(0, REFUSED)],
    "num_nodes": [Case(1), Case(0, REFUSED)],
    "precision": [Case("bf16-mixed"), Case("64"), Case("bf16-true"), Case("16-true"), Case("32"), Case("7", REFUSED)],
    "logger": [Case("false"), Case("true"), Case("CSVLogger", EPOCH, "--trainer.logger.save_dir csv"),
        Case("TensorBoardLogger", EPOCH, "--trainer.logger.save_dir board"), Case("WandbLogger", REFUSED), Case("Scribe", REFUSED)],  # noqa: E501,E128
    "callbacks": [
        callbacks("EarlyStopping", monitor="val/acc"),
        callbacks("EarlyStopping", monitor="train/loss"),
        callbacks("EarlyStopping", REFUSED, monitor="val/nope"),
        callbacks("EMAWeightAveraging"),
        callbacks("WeightAveraging"),
        callbacks("StochasticWeightAveraging", swa_lrs=0.1),
        callbacks("ModelCheckpoint", monitor="val/loss"),
        callbacks("ModelCheckpoint", REFUSED, monitor="val/nope"),
        callbacks("LearningRateMonitor"),
        callbacks("DeviceStatsMonitor"),
        callbacks("GradientAccumulationScheduler", 3, scheduling="'{0: 2}'"),
        callbacks("Timer", duration="00:01:00:00", interval="step"),
        callbacks("TQDMProgressBar"),
        callbacks("RichProgressBar"),
        callbacks("ModelSummary"),
        callbacks("RichModelSummary"),
        callbacks("OnExceptionCheckpoint", dirpath="."),
        callbacks("LearningRateFinder", REFUSED),
        callbacks("BatchSizeFinder", 1),
        callbacks("ThroughputMonitor", batch_size_fn="builtins.len"),
        callbacks("ModelPruning", pruning_fn="l1_unstructured", amount=0.5),
        callbacks("BackboneFinetuning"),
        callbacks("LambdaCallback"),
        callbacks("GradualUnfreezing", layers="[0]"),
        callbacks("Bystander", REFUSED),
    ],
    "fast_dev_run": [Case("true", 0), Case(2, 0), Case("false")],
    "max_epochs": [Case(2, 2 * EPOCH), Case(1), Case(0, 0), Case(-2, REFUSED), Case(-1, 7, "--trainer.max_steps 7")],
    "min_epochs": [Case(1), Case(2)],
    "max_steps": [Case(3, 3), Case(7, 7, "--trainer.max_epochs 9"), Case(0, 0), Case(-2, REFUSED)],
    "min_steps": [Case(2), Case(9)],
    "max_time": [Case("00:01:00:00"), Case("'{\"hours\": 1}'"), Case("00:00:00:00", 0), Case("soon", REFUSED)],
    "limit_train_batches": [Case(1, 1), Case(0.5, 2), Case(1.0), Case(0, REFUSED), Case(99), Case(-1, REFUSED)],
    "limit_val_batches": [Case(1), Case(0), Case(1.0), Case(0.1, REFUSED)],
    "limit_test_batches": [Case(1), Case(0), Case(1.0)],
    "limit_predict_batches": [Case(1), Case(0)],
    "overfit_batches": [Case(2, 2), Case(1.0), Case(0.0)],
    "val_check_interval": [Case(0.5), Case(2), Case(99, REFUSED), Case(7, 2 * EPOCH, "--trainer.check_val_every_n_epoch null --trainer.max_epochs 2")],  # noqa: E501,E128
    "check_val_every_n_epoch": [Case(2), Case(1), Case(2, 2 * EPOCH, "--trainer.max_epochs 2"), Case(0, REFUSED)],
    "num_sanity_val_steps": [Case(0), Case(2), Case(-1)],
    "log_every_n_steps": [Case(1), Case(0), Case(-1)],
    "enable_checkpointing": [Case("false"), Case("true")],
    "enable_progress_bar": [Case("true"), Case("false")],
    "enable_model_summary": [Case("false"), Case("true")],
    "accumulate_grad_batches": [Case(2, 3), Case(9, 1), Case(0, REFUSED)],
    "gradient_clip_val": [Case(0.1), Case(0)],
    "gradient_clip_algorithm": [Case("value", EPOCH, "--trainer.gradient_clip_val 0.1"), Case("norm"), Case("scissors", REFUSED)],  # noqa: E501,E128
    "deterministic": [Case("true"), Case("warn"), Case("false")],
    "benchmark": [Case("true"), Case("false")],
    "inference_mode": [Case("false"), Case("true")],
    "use_distributed_sampler": [Case("false"), Case("true")],
    "profiler": [Case("simple"), Case("advanced"), Case("pytorch"), Case("stopwatch", REFUSED)],
    "detect_anomaly": [Case("true"), Case("false")],
    "barebones": [Case("true", 0), Case("false")],
    "plugins": [Case("AsyncCheckpointIO"), Case("LightningEnvironment"), Case("Socket", REFUSED)],
    "sync_batchnorm": [Case("true"), Case("false")],
    "reload_dataloaders_every_n_epochs": [Case(1), Case(0), Case(-1, REFUSED)],
    "default_root_dir": [Case("elsewhere"), Case("'a place'"), Case("s3://bucket/runs", REFUSED)],
    "enable_autolog_hparams": [Case("false"), Case("true")],
    "model_registry": [Case("null"), Case("mine")],
}


def test_every_option_of_this_lightning_has_a_row() -> None:
    assert set(OPTIONS) == set(inspect.signature(Trainer.__init__).parameters) - {"self"}


def rows() -> Iterator[Any]:
    for option, cases in OPTIONS.items():
        for number, case in enumerate(cases):
            for model in MODELS:
                name = f"{option}-{case.value}-{number}-{model}"
                yield pytest.param(option, case, model, id=name)


@pytest.mark.parametrize(("option", "case", "model"), list(rows()))
def test_option_does_what_it_says_or_is_refused(
    option: str, case: Case, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["mnist_lightning"])  # LightningCLI warns of pytest's own arguments
    for name in THEIRS:
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("somebody else's")
    typed = f"fit --data {FEW} --pictures false --trainer.max_epochs 1 --trainer.{option}={case.value} {case.beside}"
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as error:
        code = run([*shlex.split(typed), *MODELS[model]])
    assert "Traceback" not in error.getvalue()
    assert {name: Path(name).read_text() for name in THEIRS} == dict.fromkeys(THEIRS, "somebody else's")
    if case.steps is None:
        message = error.getvalue()[error.getvalue().index("error:") :]
        assert (code, message.count("\n")) == (2, 3), message
        assert not list(Path().rglob("version_*"))
        return
    assert code == 0, error.getvalue()
    printed = out.getvalue()
    for path in re.findall(r"(?:^Run +|--logdir |--ckpt_path )('[^']*'|\S+)", printed, flags=re.M):
        assert Path(shlex.split(path)[0]).exists(), path
    checkpoints = {path.stem: torch.load(path, weights_only=True) for path in Path().rglob("version_*/checkpoints/*.ckpt")}  # noqa: E501,E128
    if not case.steps or (option, case.value) == ("enable_checkpointing", "false"):
        assert not checkpoints
        return
    assert {"best", "last"} <= set(checkpoints)
    assert checkpoints["last"]["global_step"] == case.steps
    if (option, case.value) == ("limit_test_batches", 0):
        assert "Test           not measured" in printed
        return
    accuracy = float(re.search(r"^Test accuracy  (\S+) %", printed, flags=re.M)[1])
    assert f"{100 * accuracy_of(next(Path().rglob('version_*/checkpoints/best.ckpt')), case.value if option == 'precision' else '32'):.2f}" == f"{accuracy:.2f}"  # noqa: E501,E128


def accuracy_of(checkpoint: Path, precision: str) -> float:
    """The accuracy of a checkpoint by a plain Trainer."""
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(accelerator="cpu", devices=1, precision=precision, **off)
    return trainer.test(load_model(checkpoint), datamodule=Few(), verbose=False)[0]["test/acc"]
