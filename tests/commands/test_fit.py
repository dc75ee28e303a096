"""fit: what it says and leaves; and --ckpt_path, by which a run goes on as if it had never ended."""

import itertools
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Timer
from running import (
    DIGITS,
    ON_640,
    RUN,
    SHORT,
    THE_DIGITS,
    Fit,
    accuracy,
    command,
    files,
    last,
    loaded,
    points,
    rows,
    run,
)

QUICK = ("--pictures", "false")
FEW = ("--data", "running.Few", *QUICK, "--trainer.max_epochs", 1)

pytestmark = pytest.mark.usefixtures("folder")


def versions() -> list[str]:
    return sorted(str(path.relative_to("lightning_logs")) for path in Path("lightning_logs").glob("*/version_*"))


# ---- A new run


def test_it_ends_with_test_accuracy_run_dashboards_and_what_next(convnet_fit: Fit) -> None:
    number, *rest = convnet_fit.out.splitlines()[-4:]
    assert re.fullmatch(rf"Test accuracy  \d\d\.\d\d % on {THE_DIGITS}", number)
    assert float(accuracy(number)) > 40  # 10 by chance
    assert rest == [
        "Run            lightning_logs/ConvNet-digits/version_0",
        "Dashboards     tensorboard --logdir lightning_logs",
        "Your digits    python -m mnist_lightning predict --ckpt_path "
        "lightning_logs/ConvNet-digits/version_0/checkpoints/best.ckpt --data Photos --data.path PHOTO_OR_FOLDER",
    ]


def test_fit_on_pictures_names_what_it_left_out_and_says_what_next(pictures_fit: Fit) -> None:
    assert "Left out: 2 of the pictures, which can't be read" in pictures_fit.out
    assert "  bees/broken.jpg: no picture that Pillow reads" in pictures_fit.out
    number, *_, yours = pictures_fit.out.splitlines()[-4:]
    assert re.fullmatch(r"Test accuracy  \S+ % on the 6 test pictures of ImageFolder", number)
    assert float(accuracy(number)) > 80  # 50 by chance
    assert yours.endswith("/best.ckpt --data ImageFolder --data.path PICTURE_OR_FOLDER")


def test_it_says_how_many_parameters_it_trains(convnet_fit: Fit, resnet_fit: Fit) -> None:
    assert "421,642 trainable of 421,642 parameters" in convnet_fit.out.splitlines()
    assert "5,130 trainable of 11,181,642 parameters" in resnet_fit.out.splitlines()


def test_run_folder_holds_config_checkpoints_and_events(convnet: Path) -> None:
    names = files(convnet)
    assert {name for name in names if "events.out.tfevents" not in name and "/test " not in name} == {
        *("checkpoints/best.ckpt", "checkpoints/last.ckpt", "config.yaml"),
        *("metrics.csv", "report.png", "projector_config.pbtxt"),
    }
    assert any("events.out.tfevents" in name for name in names)
    scores = list(zip(points(convnet, "val/acc"), points(convnet, "val/loss"), strict=True))
    best = max(range(2), key=lambda epoch: (scores[epoch][0], -scores[epoch][1]))
    assert (loaded(convnet / "checkpoints" / "best.ckpt")["epoch"], last()["epoch"]) == (best, 1)


def test_config_of_a_run_repeats_it(convnet: Path, convnet_fit: Fit) -> None:
    again = command("fit", "--config", convnet / "config.yaml", *QUICK)
    assert accuracy(again) == accuracy(convnet_fit.out)
    config = Path(convnet.parent, "version_1", "config.yaml").read_text()
    assert config.replace("pictures: false", "pictures: true") == (convnet / "config.yaml").read_text()


def test_convnet_trains_10_epochs_at_001_and_resnet18_5_epochs_at_0001(resnet: Path, resnet_fit: Fit) -> None:
    assert "\nepoch 10/10 " in command("fit", *SHORT, "--trainer.limit_val_batches", 0)
    (group,) = last()["optimizer_states"][0]["param_groups"]
    assert (group["lr"], group["momentum"], len(group["params"])) == (0.01, 0.9, 8)
    assert "\nepoch 5/5 " in resnet_fit.out
    (group,) = last(resnet)["optimizer_states"][0]["param_groups"]
    assert (group["lr"], group["momentum"], group["params"]) == (0.001, 0.9, [0, 1])  # the head's weight and bias


def test_auto_takes_mnist_where_it_is_and_the_run_is_called_by_its_model_alone(mnist_dir: str) -> None:
    out = command("fit", "--data.data_dir", mnist_dir, *ON_640)
    assert re.search(r"Test accuracy  \S+ % on MNIST's 200 test images\nRun +lightning_logs/ConvNet/version_0\n", out)
    assert "-digits" not in out and "WARNING" not in out
    config = yaml.safe_load(Path("lightning_logs/ConvNet/version_0/config.yaml").read_text())
    assert config["data"]["init_args"]["source"] == "mnist"


def test_auto_falls_back_to_digits_loudly_before_and_after(server: Any, capsys: pytest.CaptureFixture[str]) -> None:
    out = command("fit", "--data.mirrors", f'["{server.url}"]', *ON_640)
    assert server.requests != []
    warning = capsys.readouterr().err
    assert re.search("WARNING: MNIST .*, so this run uses scikit-learn's 1,797 digits", warning)
    assert warning.count("WARNING") == 1 and f"got {server.url}" in warning and "404" in warning
    assert re.match("WARNING: this was not MNIST, .*, but scikit-learn's 1,797 digits.", out.splitlines()[-1])
    assert THE_DIGITS in out
    assert yaml.safe_load((RUN / "config.yaml").read_text())["data"]["init_args"]["source"] == "digits"
    assert last()["datamodule_hyper_parameters"]["source"] == "digits"


@pytest.mark.parametrize("settings", ["--data.val_size 0", "--data.val_size 0 --trainer.check_val_every_n_epoch 2"])
def test_best_of_a_fit_without_validation_is_its_end(settings: str) -> None:
    out = command("fit", *SHORT, "--trainer.max_epochs", 2, *settings.split())
    assert "val/acc" not in out
    best = loaded(RUN / "checkpoints" / "best.ckpt")
    assert best["global_step"] == last()["global_step"] == 4
    assert all(torch.equal(best["state_dict"][name], value) for name, value in last()["state_dict"].items())


def test_trial_run_leaves_nothing(folder: Path) -> None:
    out = command("fit", *DIGITS, "--trainer.fast_dev_run", "true")
    assert out.splitlines()[-1] == "A trial run: no checkpoint, no test."
    assert files(folder) == set()


def test_printed_commands_can_be_pasted_where_a_path_has_a_space() -> None:
    out = command("fit", *SHORT, "--trainer.max_epochs", 1, "--trainer.default_root_dir", "my runs")
    assert "tensorboard --logdir 'my runs/lightning_logs'" in out
    assert "--ckpt_path 'my runs/lightning_logs/ConvNet-digits/version_0/checkpoints/best.ckpt' --data" in out


def test_run_that_failed_after_an_epoch_keeps_what_it_measured() -> None:
    typed = ("--trainer.max_epochs", 2, "--trainer.enable_checkpointing", "false")
    with pytest.raises(RuntimeError, match="of one's own"):
        command("fit", *FEW, *typed, "--trainer.callbacks", "foreign_project.extras.FailsLater")
    assert len(list(Path("lightning_logs").rglob("metrics.csv"))) == 1


@pytest.mark.filterwarnings("ignore")  # Lightning's, of a model without some of its steps
@pytest.mark.parametrize(("typed", "steps"), [
    ("--trainer.max_epochs 3 --trainer.val_check_interval 2 --trainer.callbacks EarlyStopping "
     "--trainer.callbacks.monitor val/acc --trainer.callbacks.mode max --trainer.callbacks.stopping_threshold -1", 2),
    ("--model foreign_project.models.Stops", 3),
    ("--model foreign_project.models.TwoOptimizers --monitor val/loss --monitor_mode min --trainer.max_steps 3", 4),
    ("--data foreign_project.data.Odd --data.kind stream --trainer.max_steps 4 --model.scheduler OneCycleLR "
     "--model.scheduler.max_lr 0.1", 4),
])  # fmt: skip
def test_fit_that_stops_in_mid_epoch_has_its_last(typed: str, steps: int) -> None:
    command("fit", *FEW, *typed.split())
    (path,) = Path("lightning_logs").rglob("last.ckpt")
    assert loaded(path)["global_step"] == steps


# ---- A run that goes on


def test_resumed_run_goes_on_in_its_folder(convnet: Path) -> None:
    out = command("fit", "--ckpt_path", "last", "--trainer.max_epochs", 3, *QUICK)
    assert "epoch 3/3" in out and "epoch 2/3" not in out
    assert versions() == ["ConvNet-digits/version_0"]
    assert [row["step"] for row in rows(convnet / "metrics.csv") if row["val/acc"]] == ["20", "41", "62"]
    assert last()["epoch"] == 2
    config = yaml.safe_load((convnet / "config.yaml").read_text())
    assert (config["trainer"]["max_epochs"], config["ckpt_path"]) == (3, None)  # what repeats the whole run


def test_newest_run_is_resumed_whatever_its_model(convnet: Path, resnet: Path) -> None:
    command("fit", "--ckpt_path", "last", "--trainer.max_epochs", 6, "--trainer.limit_val_batches", 0, *QUICK)
    assert versions() == ["ConvNet-digits/version_0", "ResNet18-digits/version_0"]
    assert (last()["epoch"], last(resnet)["epoch"]) == (1, 5)


def test_callbacks_of_ones_own_go_on_too() -> None:
    kept = "--trainer.callbacks+=ModelCheckpoint --trainer.callbacks.monitor=val/loss"
    command("fit", *SHORT, "--trainer.max_epochs", 2, *kept.split())
    command("fit", "--ckpt_path", "last", "--trainer.max_epochs", 3, *QUICK)
    (epoch,) = (path.stem for path in (RUN / "checkpoints").glob("epoch*"))  # of all three the one with the lowest loss
    assert epoch == "epoch=2-step=6"


def test_fit_by_steps_goes_on_after_an_epoch_as_the_whole_one() -> None:
    halving = "--model.scheduler StepLR --model.scheduler.step_size 1 --model.scheduler.gamma 0.5".split()
    command("fit", *SHORT, *halving, "--trainer.max_steps", 4)
    command("fit", *SHORT, *halving, "--trainer.max_steps", 2)
    command("fit", "--ckpt_path", "last", "--trainer.max_steps", 4, *QUICK)
    whole, resumed = (last(RUN.with_name(name))["state_dict"] for name in ("version_0", "version_1"))
    assert all(torch.equal(value, whole[name]) for name, value in resumed.items())


def test_fit_with_a_function_among_its_settings_is_repeated_by_its_config() -> None:
    pruned = "--trainer.callbacks+=ModelPruning --trainer.callbacks.pruning_fn=l1_unstructured"
    command("fit", *SHORT, "--trainer.max_epochs", 1, *pruned.split())
    command("fit", "--config", RUN / "config.yaml", *QUICK)


def test_run_that_early_stopping_ended_has_ended() -> None:
    stopping = "--trainer.callbacks EarlyStopping --trainer.callbacks.monitor val/acc --trainer.callbacks.mode max"
    command("fit", *SHORT, "--trainer.max_epochs", 3, *stopping.split(), "--trainer.callbacks.stopping_threshold", 0.01)
    again = command("fit", "--ckpt_path", "last", *QUICK)
    assert "already ended, at step 2: nothing was trained. EarlyStopping ended it: to train longer, leave it" in again
    command("fit", "--ckpt_path", "last", "--trainer.callbacks", "null", *QUICK)
    assert last()["global_step"] == 6


def test_run_that_had_already_ended_says_so_and_how_to_go_on(convnet: Path, convnet_fit: Fit) -> None:
    before = (convnet / "checkpoints" / "best.ckpt").read_bytes()
    out = command("fit", "--ckpt_path", "last", *QUICK)
    assert "This run had already ended, at step 42: nothing was trained." in out
    assert "give a larger --trainer.max_epochs" in out
    assert accuracy(out) == accuracy(convnet_fit.out)
    assert (convnet / "checkpoints" / "best.ckpt").read_bytes() == before


def test_copied_run_names_its_own_folder(convnet: Path) -> None:
    shutil.copytree(convnet, "copy")
    said = command("fit", "--ckpt_path", "copy/checkpoints/last.ckpt", "--trainer.max_epochs", 3, *QUICK)
    assert "Run            copy\n" in said and "tensorboard --logdir copy\n" in said


def test_refused_fit_leaves_the_kept_state_of_a_failed_one(convnet: Path) -> None:
    kept = convnet / "checkpoints" / "exception.ckpt"
    shutil.copy(convnet / "checkpoints" / "last.ckpt", kept)
    before = kept.read_bytes()
    longer = ["--trainer.max_epochs", "3", "--trainer.val_check_interval", "99"]
    assert run(["fit", "--ckpt_path", str(kept), *longer]) == 2
    assert kept.read_bytes() == before


@pytest.mark.parametrize("cut", ["--trainer.max_steps 26", "--trainer.max_time 00:00:00:05"])
def test_fit_that_was_cut_short_has_best_and_last_and_goes_on_with_the_steps_that_are_missing(
    cut: str, convnet_fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = itertools.count()
    monkeypatch.setattr(Timer, "time_elapsed", lambda *_: next(clock))  # a second more each time that it is looked at
    out = command("fit", *DIGITS, "--data.batch_size", 64, "--trainer.max_epochs", 2, *cut.split())
    assert f"--ckpt_path {RUN}/checkpoints/best.ckpt" in out
    best, step = loaded(RUN / "checkpoints" / "best.ckpt")["global_step"], last()["global_step"]
    assert (best, step) == (21, 26) if "steps" in cut else 0 < best == step < 21
    command("fit", "--ckpt_path", "last", "--trainer.max_steps", -1, "--trainer.max_time", "null", *QUICK)
    whole = last(convnet_fit.root / RUN)
    assert last()["global_step"] == whole["global_step"] == 42
    assert all(torch.equal(value, whole["state_dict"][name]) for name, value in last()["state_dict"].items())
    assert versions() == ["ConvNet-digits/version_0"]


def forget(path: Path) -> None:
    """Makes a checkpoint's model one that has learnt nothing."""
    content = loaded(path)
    content["state_dict"] = {name: torch.zeros_like(value) for name, value in content["state_dict"].items()}
    torch.save(content, path)


@pytest.mark.parametrize("root", [".", "moved"])
def test_worse_epoch_after_resuming_does_not_replace_the_best(root: str, convnet: Path) -> None:
    if root == "moved":
        shutil.move("lightning_logs", "moved/lightning_logs")
    checkpoints = root / RUN / "checkpoints"
    before = (checkpoints / "best.ckpt").read_bytes()
    forget(checkpoints / "last.ckpt")
    settings = ("--trainer.max_epochs", 3, "--trainer.limit_train_batches", 2, "--trainer.default_root_dir", root)
    command("fit", "--ckpt_path", "last", *settings, *QUICK)
    assert (checkpoints / "best.ckpt").read_bytes() == before
    assert last(root / RUN)["epoch"] == 2


def test_copy_of_last_alone_gets_a_best_even_of_a_worse_epoch(convnet: Path) -> None:
    (convnet / "checkpoints" / "last.ckpt").rename("last.ckpt")
    forget(Path("last.ckpt"))
    settings = ("--trainer.max_epochs", 3, "--trainer.limit_train_batches", 2, "--trainer.default_root_dir", "new")
    command("fit", "--ckpt_path", "last.ckpt", *settings, *QUICK)
    assert len(list(Path("new").rglob("best.ckpt"))) == 1
