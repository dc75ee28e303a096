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
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch import Trainer
from running import Few, run
from torch.utils.data import DataLoader, TensorDataset

from mnist_lightning import ConvNet, DigitClassifier, ResNet18, load_model

# What Lightning warns of is said to the user; here it would end the fit.
pytestmark = pytest.mark.filterwarnings("ignore")

FEW = "running.Few"
EPOCH = 5  # steps: 80 images, 16 a batch
MODELS = {
    "ConvNet": (),
    "ResNet18": ("--model", "ResNet18", "--model.weights", "none", "--model.image_size", "28"),
}
THEIRS = ("lightning_logs/notes.txt", "metrics.csv", "config.yaml", "report.png", "checkpoints/best.ckpt")


class Case(NamedTuple):
    """A value of an option, the steps that a fit then takes, and what is typed beside it."""

    value: Any
    steps: int | None = EPOCH  # None: refused
    beside: str = ""
    resnet: int | None = -1  # the steps for ResNet18, where they are others


REFUSED = None


def callback(name: str, steps: int | None = EPOCH, resnet: int | None = -1, **arguments: Any) -> Case:
    return Case(name, steps, " ".join(f"--trainer.callbacks.{key} {value}" for key, value in arguments.items()), resnet)


OPTIONS: dict[str, list[Case]] = {
    "accelerator": [Case("cpu"), Case("auto"), Case("abacus", REFUSED)],
    "strategy": [Case("ddp"), Case("auto"), Case("deepspeed", REFUSED), Case("guess", REFUSED), Case("fsdp", REFUSED)],
    "devices": [Case(1), Case("auto"), Case(0, REFUSED)],
    "num_nodes": [Case(1), Case(0, REFUSED)],
    "precision": [Case("bf16-mixed"), Case("64"), Case("bf16-true"), Case("16-true"), Case("32"), Case("7", REFUSED)],
    "logger": [
        Case("false"),
        Case("true"),
        Case("CSVLogger", beside="--trainer.logger.save_dir csv"),
        Case("TensorBoardLogger", beside="--trainer.logger.save_dir board"),
        Case("Scribe", REFUSED),
        Case("[]"),
    ],
    "callbacks": [
        callback("EMAWeightAveraging"),
        callback("WeightAveraging"),
        callback("StochasticWeightAveraging", resnet=REFUSED, swa_lrs=0.1),
        callback("EarlyStopping", monitor="val/acc"),
        callback("EarlyStopping", monitor="train/loss"),
        callback("EarlyStopping", REFUSED, monitor="val/nope"),
        callback("ModelCheckpoint", monitor="val/loss"),
        callback("ModelCheckpoint", REFUSED, monitor="val/nope"),
        callback("LearningRateMonitor"),
        callback("DeviceStatsMonitor"),
        callback("ThroughputMonitor", batch_size_fn="builtins.len"),
        callback("GradientAccumulationScheduler", 3, scheduling="'{0: 2}'"),
        callback("Timer", duration="00:01:00:00"),
        callback("TQDMProgressBar"),
        callback("RichProgressBar"),
        callback("ModelSummary"),
        callback("RichModelSummary"),
        callback("OnExceptionCheckpoint", dirpath="."),
        callback("BatchSizeFinder", 2 * EPOCH, max_trials=3),
        callback("LearningRateFinder", REFUSED),
        callback("ModelPruning", pruning_fn="l1_unstructured", amount=0.5),
        callback("BackboneFinetuning", REFUSED, resnet=EPOCH),
        callback("GradualUnfreezing", REFUSED, resnet=EPOCH, layers="[0]"),
        callback("LambdaCallback"),
        callback("Bystander", REFUSED),
    ],
    "fast_dev_run": [Case("true", 0), Case(2, 0), Case("false")],
    "max_epochs": [Case(2, 2 * EPOCH), Case(0, 0), Case(-2, REFUSED), Case(-1, 7, "--trainer.max_steps 7")],
    "min_epochs": [Case(1), Case(2)],
    "max_steps": [Case(3, 3), Case(7, 7, "--trainer.max_epochs 9"), Case(0, 0), Case(-2, REFUSED)],
    "min_steps": [Case(2), Case(9)],
    "max_time": [Case("00:01:00:00"), Case("'{\"hours\": 1}'"), Case("00:00:00:00", 0), Case("soon", REFUSED)],
    "limit_train_batches": [Case(1, 1), Case(0.5, 2), Case(1.0), Case(99), Case(0, REFUSED), Case(-1, REFUSED)],
    "limit_val_batches": [Case(0), Case(1), Case(1.0), Case(0.1, REFUSED)],
    "limit_test_batches": [Case(0), Case(1), Case(1.0)],
    "limit_predict_batches": [Case(0), Case(1)],
    "overfit_batches": [Case(2, 2), Case(1.0), Case(0.0)],
    "val_check_interval": [
        Case(0.5),
        Case(2),
        Case(7, 2 * EPOCH, "--trainer.check_val_every_n_epoch null --trainer.max_epochs 2"),
        Case(99, REFUSED),
    ],
    "check_val_every_n_epoch": [Case(2), Case(2, 2 * EPOCH, "--trainer.max_epochs 2"), Case(0, REFUSED)],
    "num_sanity_val_steps": [Case(0), Case(2), Case(-1)],
    "log_every_n_steps": [Case(1), Case(0)],
    "enable_checkpointing": [Case("false"), Case("true")],
    "enable_progress_bar": [Case("true"), Case("false")],
    "enable_model_summary": [Case("false"), Case("true")],
    "accumulate_grad_batches": [Case(2, 3), Case(9, 1), Case(0, REFUSED)],
    "gradient_clip_val": [Case(0.1), Case(0)],
    "gradient_clip_algorithm": [Case("value", beside="--trainer.gradient_clip_val 0.1"), Case("scissors", REFUSED)],
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
    "default_root_dir": [Case("'a place'"), Case("elsewhere"), Case("s3://bucket/runs", REFUSED)],
    "enable_autolog_hparams": [Case("false"), Case("true")],
    "model_registry": [Case("null"), Case("mine")],
}


def test_every_option_of_this_lightning_has_a_row() -> None:
    assert set(OPTIONS) == set(inspect.signature(Trainer.__init__).parameters) - {"self"}


# Options whose first values leave the steps as they are: a quick fit has all of them, and each alone is slow.
TOGETHER = (
    *("devices", "num_nodes", "min_epochs", "min_steps", "max_time", "num_sanity_val_steps", "log_every_n_steps"),
    *("enable_progress_bar", "enable_model_summary", "gradient_clip_val", "deterministic", "benchmark"),
    *("inference_mode", "use_distributed_sampler", "detect_anomaly", "sync_batchnorm", "profiler"),
    *("reload_dataloaders_every_n_epochs", "default_root_dir", "enable_autolog_hparams", "model_registry"),
)
ALL = " ".join(f"--trainer.{option}={OPTIONS[option][0].value} {OPTIONS[option][0].beside}" for option in TOGETHER)
OPTIONS["accelerator"].insert(0, Case("cpu", beside=ALL))


def rows() -> Iterator[Any]:
    """All but an option's first value and the refused ones, with ConvNet, are slow."""
    for option, cases in OPTIONS.items():
        for number, case in enumerate(cases):
            for model in MODELS:
                first = number == 0 and option not in TOGETHER
                quick = model == "ConvNet" and (first or case.steps is REFUSED)
                name = f"{option}-{case.value}-{number}-{model}"
                marks = [] if quick else [pytest.mark.slow]
                for start, package in (("Rich", "rich"), ("DeviceStats", "psutil")):
                    if str(case.value).startswith(start) and find_spec(package) is None:
                        marks.append(pytest.mark.skip(reason=f"{package} isn't installed"))
                yield pytest.param(option, case, model, id=name, marks=marks)


@pytest.mark.parametrize(("option", "case", "model"), list(rows()))
def test_option_does_what_it_says_or_is_refused(
    option: str, case: Case, model: str, folder: Path, quiet: Callable
) -> None:
    for name in THEIRS:
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("somebody else's")
    typed = f"fit --data {FEW} --pictures false --trainer.max_epochs 1 --trainer.{option}={case.value} {case.beside}"
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as error:
        code = run([*shlex.split(typed), *MODELS[model]])
    printed = out.getvalue()
    assert {name: Path(name).read_text() for name in THEIRS} == dict.fromkeys(THEIRS, "somebody else's")
    steps = case.resnet if model == "ResNet18" and case.resnet != -1 else case.steps
    if steps is None:
        message = error.getvalue().partition("error: ")[2]
        assert (code, message.count("\n")) == (2, 3), error.getvalue()
        assert not list(Path().rglob("version_*"))
        return
    assert code == 0, error.getvalue()
    for path in re.findall(r"(?:^Run +|--logdir |--ckpt_path )('[^']*'|\S+)", printed, flags=re.M):
        assert Path(shlex.split(path)[0]).exists(), path
    checkpoints = {path.stem: path for path in Path().rglob("version_*/checkpoints/*.ckpt")}
    if not steps or (option, case.value) == ("enable_checkpointing", "false"):
        assert not checkpoints
        return
    assert {"best", "last"} <= set(checkpoints)
    assert torch.load(checkpoints["last"], weights_only=True)["global_step"] == steps
    if (option, case.value) == ("limit_test_batches", 0):
        assert re.search("^Test +not measured$", printed, flags=re.M)
        return
    said = re.search(r"^Test accuracy +(\S+) % on the 40 test images of Few$", printed, flags=re.M)
    assert said is not None, printed
    trainer = quiet(devices=1, precision=case.value if option == "precision" else "32")
    (results,) = trainer.test(load_model(checkpoints["best"]), datamodule=Few(), verbose=False)
    assert said[1] == f"{100 * results['test/acc']:.2f}"


@pytest.mark.parametrize("model", [
    pytest.param(ConvNet, id="ConvNet"),
    pytest.param(partial(ResNet18, "none", 28), id="ResNet18", marks=pytest.mark.slow),
])  # fmt: skip
@pytest.mark.parametrize(("settings", "steps"), [
    ({}, EPOCH),
    *(pytest.param(*row, marks=pytest.mark.slow) for row in [
        ({"max_steps": 3}, 3),
        ({"overfit_batches": 2}, 2),
        ({"precision": "bf16-mixed"}, EPOCH),
        ({"precision": "64-true"}, EPOCH),
        ({"max_epochs": 2}, 2 * EPOCH),
        ({"limit_train_batches": 1}, 1),
        ({"limit_val_batches": 0}, EPOCH),
        ({"accumulate_grad_batches": 2}, 3),
        ({"detect_anomaly": True}, EPOCH),
        ({"inference_mode": False}, EPOCH),
        ({"reload_dataloaders_every_n_epochs": 1}, EPOCH),
    ]),
])  # fmt: skip
def test_option_does_so_from_python_with_loaders_of_tensors(
    settings: dict[str, Any], steps: int, model: Callable[[], DigitClassifier], tmp_path: Path, quiet: Callable
) -> None:
    torch.manual_seed(0)
    (images, labels), (test_images, test_labels) = Few().load()
    loader = DataLoader(TensorDataset(images[:80], labels[:80]), batch_size=16, shuffle=True)
    val_loader = DataLoader(TensorDataset(images[80:], labels[80:]), batch_size=16)
    network, trainer = model(), quiet(**{"max_epochs": 1} | settings)
    trainer.fit(network, loader, val_loader)
    assert trainer.global_step == steps
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    (results,) = trainer.test(network, DataLoader(TensorDataset(test_images, test_labels), 7), verbose=False)
    again = load_model(tmp_path / "a.ckpt")
    with torch.no_grad(), trainer.precision_plugin.forward_context():
        right = again.to(network.dtype)(test_images).argmax(1) == test_labels
    assert results["test/acc"] == pytest.approx(right.float().mean().item())
