"""A fit that is stopped and resumed ends as one that nothing stopped, to the last bit, whatever it trains with.

Each row is a command; each place is where it stops: between two optimizer steps, at an epoch's last batch, and right
after the checkpoint of an epoch's end, as by a kill. In one process and on few images, so that a row takes a second;
test_reliability.py kills real processes.
"""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from running import command, loaded, plain, refused, rows

from mnist_lightning import load_model
from mnist_lightning.commands.cli import run

slow = pytest.mark.slow
pytestmark = [
    pytest.mark.reliability,
    # Lightning's own, about what a row asks for.
    pytest.mark.filterwarnings(r"ignore:(The provided params to be frozen)"),
]

USUAL = """fit --data running.Few --data.augment 1 --pictures false --seed_everything 3 --trainer.max_epochs 3
    --trainer.limit_test_batches 1 --trainer.accelerator cpu --trainer.callbacks+=faults.Fault""".split()
TINY = "--model foreign_project.models.Tiny"
SCHEDULE = TINY + " --model.scheduler"
PLATEAU = SCHEDULE + ".class_path ReduceLROnPlateau --model.scheduler.patience 0 --model.scheduler.threshold 0.9"
CALLBACK = TINY + " --trainer.callbacks+="
STEPS = "--trainer.max_epochs -1 --trainer.max_steps 14"
RESNET = "--model ResNet18 --model.weights none --model.image_size 28"
UNFREEZING = "--trainer.callbacks+=BackboneFinetuning --trainer.callbacks.unfreeze_backbone_at_epoch=1"

ROWS = {
    "nothing": TINY,
    "dropout": "--model faults.WithDropout",
    "gradients clipped": f"{TINY} --trainer.gradient_clip_val 0.1",
    "deterministic": f"{TINY} --trainer.deterministic true",
    "bf16-mixed": f"{TINY} --trainer.precision bf16-mixed",
    "bf16-true": f"{TINY} --trainer.precision bf16-true",
    "64-true": f"{TINY} --trainer.precision 64-true",
    "Adam": f"{TINY} --model.optimizer Adam --model.optimizer.lr 0.01 --model.optimizer.amsgrad true",
    "LBFGS": f"{TINY} --model.optimizer LBFGS --model.optimizer.lr 0.1",
    "a part of the batches": f"{TINY} --trainer.limit_train_batches 4 --trainer.limit_val_batches 1",
    "the same batches": f"{TINY} --trainer.overfit_batches 4",
    "new loaders": f"{TINY} --trainer.reload_dataloaders_every_n_epochs 1",
    "without validation": f"{TINY} --trainer.limit_val_batches 0",
    # When it validates
    "validated in mid-epoch": f"{TINY} --trainer.val_check_interval 2",
    "validated twice an epoch": f"{TINY} --trainer.val_check_interval 0.5",
    "validated each batch": f"{TINY} --trainer.val_check_interval 1",
    "validated across epochs": f"{TINY} --trainer.val_check_interval 3 --trainer.check_val_every_n_epoch null",
    "validated each second epoch": f"{TINY} --trainer.check_val_every_n_epoch 2",
    # When it steps, and ends
    "so many steps": f"{TINY} {STEPS}",
    "so many steps, validated each second epoch": f"{TINY} {STEPS} --trainer.check_val_every_n_epoch 2",
    "so many steps, validated across epochs": f"{TINY} {STEPS} --trainer.val_check_interval 3 "
    "--trainer.check_val_every_n_epoch null",
    "so many steps, without validation": f"{TINY} {STEPS} --trainer.limit_val_batches 0",
    "gathered": f"{TINY} --trainer.accumulate_grad_batches 2",
    "gathered, a group left over": f"{TINY} --trainer.accumulate_grad_batches 4 --trainer.gradient_clip_val 0.1",
    "gathered, OneCycleLR": f"{SCHEDULE} OneCycleLR --model.scheduler.max_lr 1 --trainer.accumulate_grad_batches 2",
    "gathered, validated in mid-epoch": f"{TINY} --trainer.accumulate_grad_batches 2 --trainer.val_check_interval 1",
    "gathered by epoch": f"{CALLBACK}GradientAccumulationScheduler --trainer.callbacks.scheduling={{\"0\":1,\"1\":2}}",
    "two optimizers by hand": "--model faults.TwoOptimizers",
    # Schedules of torch
    "ConstantLR": f"{SCHEDULE} ConstantLR --model.scheduler.total_iters 2",
    "CosineAnnealingLR": f"{SCHEDULE} CosineAnnealingLR --model.scheduler.T_max 3",
    "CosineAnnealingWarmRestarts": f"{SCHEDULE} CosineAnnealingWarmRestarts --model.scheduler.T_0 2",
    "CyclicLR": f"{SCHEDULE} CyclicLR --model.scheduler.base_lr 0.01 --model.scheduler.max_lr 1 "
    "--model.scheduler.step_size_up 4",
    "ExponentialLR": f"{SCHEDULE} ExponentialLR --model.scheduler.gamma 0.5",
    "LinearLR": f"{SCHEDULE} LinearLR",
    "MultiStepLR": f"{SCHEDULE} MultiStepLR --model.scheduler.milestones [1,2]",
    "OneCycleLR": f"{SCHEDULE} OneCycleLR --model.scheduler.max_lr 1",
    "PolynomialLR": f"{SCHEDULE} PolynomialLR",
    "StepLR": f"{SCHEDULE} StepLR --model.scheduler.step_size 1",
    "ReduceLROnPlateau": f"{PLATEAU} --model.scheduler.monitor val/loss",
    "ReduceLROnPlateau, validated in mid-epoch": f"{PLATEAU} --model.scheduler.monitor val/loss "
    "--trainer.val_check_interval 2",
    "ReduceLROnPlateau, validated each second epoch": f"{PLATEAU} --model.scheduler.monitor val/loss "
    "--trainer.check_val_every_n_epoch 2",
    "ReduceLROnPlateau, validated across epochs": f"{PLATEAU} --model.scheduler.monitor val/loss "
    "--trainer.val_check_interval 3 --trainer.check_val_every_n_epoch null",
    "ReduceLROnPlateau of the training loss": f"{PLATEAU} --model.scheduler.monitor train/loss",
    # Made of several, or of a function: by the model's own code
    "ChainedScheduler": "--model faults.Scheduled --model.made_of ChainedScheduler",
    "LambdaLR": "--model faults.Scheduled --model.made_of LambdaLR",
    "SequentialLR": "--model faults.Scheduled --model.made_of SequentialLR",
    # Callbacks of Lightning
    "EMAWeightAveraging": f"{CALLBACK}EMAWeightAveraging --trainer.callbacks.decay=0.9",
    "WeightAveraging": f"{CALLBACK}WeightAveraging",
    "EarlyStopping": f"{CALLBACK}EarlyStopping --trainer.callbacks.monitor=val/loss --trainer.callbacks.min_delta=9 "
    "--trainer.callbacks.patience=2",
    "BackboneFinetuning": f"--model faults.WithBackbone {UNFREEZING}",
    # ResNet18
    "kept features": RESNET + " --data.augment 0",
    "GradualUnfreezing": f"{RESNET} --model.trainable_layers 1 --trainer.callbacks+=GradualUnfreezing "
    "--trainer.callbacks.layers=[0,1]",
    "ResNet18, BackboneFinetuning": f"{RESNET} {UNFREEZING} --data.augment 0",
}  # fmt: skip
PLACES = ("on_train_batch_end 7 SIGTERM", "on_train_batch_end 10 SIGTERM", "on_train_epoch_start 2 fail")
QUICK = {
    ("gathered, a group left over", PLACES[0]), ("ReduceLROnPlateau", PLACES[0]), ("ReduceLROnPlateau", PLACES[2]),
    ("BackboneFinetuning", PLACES[0]), ("validated in mid-epoch", PLACES[0]), ("two optimizers by hand", PLACES[0]),
    ("EarlyStopping", PLACES[1]),
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Path]]:
    """By row: the folder of the run that nothing stopped."""
    known: dict[str, Path] = {}

    def fitted(row: str) -> Path:
        if row not in known:
            root = tmp_path_factory.mktemp("whole")
            command(*USUAL, *ROWS[row].split(), "--trainer.default_root_dir", root)
            (known[row],) = root.glob("lightning_logs/*/version_0")
        return known[row]

    yield fitted


def stop(row: str, place: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stops a fit of a row in the current folder; returns its run."""
    with monkeypatch.context() as patch, pytest.raises((SystemExit, RuntimeError), match="143|the fault of this test"):
        patch.setenv("FAULT", place)
        run([*USUAL, *row.split()])
    (folder,) = Path().glob("lightning_logs/*/version_0")
    return folder


def state(folder: Path, name: str) -> dict[str, Any]:
    """All of a checkpoint that a fit goes on with."""
    content = loaded(folder / "checkpoints" / f"{name}.ckpt")
    others = ("callbacks", "loops", "mnist_lightning")
    stopping = [value for key, value in content["callbacks"].items() if key.startswith("EarlyStopping")]
    return plain({key: value for key, value in content.items() if key not in others} | {"stopping": stopping})


def measured(folder: Path) -> list[dict[str, str]]:
    """What metrics.csv says of epochs and of the test, and under which steps."""
    told = ("val", "test", "train/loss", "train/acc")
    found = [{key: value for key, value in row.items() if value and key.startswith(told) and key != "train/loss_step"}
             | {"step": row["step"]} for row in rows(folder / "metrics.csv")]
    return [row for row in found if len(row) > 1]


@pytest.mark.parametrize(("row", "place"), [
    pytest.param(row, place, marks=() if (row, place) in QUICK else slow) for row in ROWS for place in PLACES
])  # fmt: skip
def test_stopped_and_resumed_is_the_whole_fit(
    row: str, place: str, whole: Callable[[str], Path], folder: Path, monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:  # fmt: skip
    undisturbed = whole(row)
    stopped = stop(ROWS[row], place, monkeypatch)
    command("fit", "--ckpt_path", "last", "--pictures", "false")
    for name in ("last", "best"):
        one, other = state(stopped, name), state(undisturbed, name)
        assert one.keys() == other.keys()
        for part, value in one.items():
            assert value == other[part], (name, part)
    assert measured(stopped) == measured(undisturbed)
    record_property("tried", f"Stopped in mid-epoch, after its last batch or at its end: {len(ROWS)} recipes")


@pytest.mark.parametrize(("callback", "got"), [
    ("ModelPruning --trainer.callbacks.pruning_fn=l1_unstructured", "ModelPruning, whose masks and first weights"),
    ("StochasticWeightAveraging --trainer.callbacks.swa_lrs=0.01 --trainer.callbacks.swa_epoch_start=1",
     "StochasticWeightAveraging after it began"),
])  # fmt: skip
def test_what_cannot_be_resumed_exactly_is_refused(
    callback: str, got: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop(f"{CALLBACK}{callback}", PLACES[0], monkeypatch)
    message = refused("fit", "--ckpt_path", "last")
    assert f"expected a run that can be resumed exactly got {got}" in message
    assert "start a new run, or use --trainer.callbacks null" in message
    command("fit", "--ckpt_path", "last", "--trainer.callbacks", "null", "--pictures", "false")


@pytest.mark.parametrize("batch", [1, 7])
def test_other_number_of_processes_is_refused_in_mid_epoch(
    batch: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = stop(TINY, f"on_train_batch_end {batch} SIGTERM", monkeypatch) / "checkpoints" / "last.ckpt"
    torch.save({**loaded(path), "processes": 2}, path)
    message = refused("fit", "--ckpt_path", "last")
    assert "expected as many processes as before the stop in mid-epoch: 2 got 1" in message


def test_averaging_that_has_not_begun_is_resumed_exactly(
    whole: Callable[[str], Path], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = f"{CALLBACK}StochasticWeightAveraging --trainer.callbacks.swa_lrs=0.01 --trainer.callbacks.swa_epoch_start=2"
    monkeypatch.setitem(ROWS, "averaged", row)
    undisturbed = whole("averaged")
    stopped = stop(row, "on_train_batch_end 3 SIGTERM", monkeypatch)
    command("fit", "--ckpt_path", "last", "--pictures", "false")
    assert state(stopped, "last") == state(undisturbed, "last")


def test_run_of_version_0_2_goes_on_to_its_end(folder: Path) -> None:
    """It was stopped at step 26 of 42, by the code of commit 0d05a6a; weights of another processor are only close."""
    run = Path("lightning_logs", "Tiny-digits", "version_0")
    shutil.copytree(Path(__file__).parent / "fixtures" / "version_0_2", run)
    assert load_model(run / "checkpoints" / "best.ckpt").head.weight.shape == (10, 49)
    command("fit", "--ckpt_path", "last", "--pictures", "false")
    resumed = loaded(run / "checkpoints" / "last.ckpt")
    settings = "--data.source digits --data.augment 1 --data.batch_size 64 --seed_everything 5 --pictures false"
    schedule = "--model.scheduler OneCycleLR --model.scheduler.max_lr 0.2 --trainer.max_epochs 2"
    command("fit", *f"{TINY} {settings} {schedule} --trainer.accelerator cpu".split())
    undisturbed = loaded(run.with_name("version_1") / "checkpoints" / "last.ckpt")
    assert resumed["global_step"] == undisturbed["global_step"] == 42
    for name, value in undisturbed["state_dict"].items():
        torch.testing.assert_close(resumed["state_dict"][name], value)
