"""The command line, run in this process: what the commands print, write, and read back from checkpoints."""

import csv
import io
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torchvision.models import resnet18

import mnist_lightning
from mnist_lightning.commands.cli import CLI, run
from mnist_lightning.runs.console import hush

DIGITS = "the 360 test images of scikit-learn's digits, not MNIST"
SHORT = ("--data.source", "digits", "--trainer.limit_train_batches", "2", "--trainer.limit_test_batches", "2")


def enter(folder: Path, cache: Path, patch: pytest.MonkeyPatch) -> None:
    patch.chdir(folder)
    patch.setattr(sys, "argv", ["mnist_lightning"])  # LightningCLI warns of pytest's own arguments
    patch.setenv("XDG_CACHE_HOME", str(cache))


@pytest.fixture(autouse=True)
def in_an_empty_folder(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter(tmp_path, tmp_path_factory.mktemp("cache"), monkeypatch)


def command(*args: object) -> str:
    """Runs a command, which has to succeed; returns what it printed."""
    with redirect_stdout(io.StringIO()) as out:
        assert run([str(arg) for arg in args]) == 0
    return out.getvalue()


def built(*args: object) -> CLI:
    """Runs a command; returns what was built for it."""
    hush()
    with redirect_stdout(io.StringIO()):
        return CLI([str(arg) for arg in args])


def refused(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """Runs a command that has to be refused; returns the message in one line."""
    assert run([str(arg) for arg in args]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: expected ") and message.count("\n") == 3
    return " ".join(message.split())


def accuracy(output: str) -> str:
    return re.search(r"accuracy\s+(\S+) %", output)[1]


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def loaded(checkpoint: Path) -> dict[str, Any]:
    return torch.load(checkpoint, weights_only=True)


class Fit(NamedTuple):
    root: Path  # holds lightning_logs
    out: str


def fit(folder: Path, *args: object) -> Fit:
    root = folder / "root"
    root.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        enter(root, folder / "cache", patch)
        return Fit(root, command("fit", *args))


@pytest.fixture(scope="module")
def convnet_fit(tmp_path_factory: pytest.TempPathFactory) -> Fit:
    settings = ("--data.source", "digits", "--trainer.max_epochs", 2, "--trainer.log_every_n_steps", 10)
    return fit(tmp_path_factory.mktemp("convnet"), *settings)


@pytest.fixture(scope="module")
def resnet_fit(tmp_path_factory: pytest.TempPathFactory) -> Fit:
    """A fit of ResNet18 with its own number of epochs. Its file of weights is gone afterwards."""
    folder = tmp_path_factory.mktemp("resnet")
    weights = folder / "weights.pth"
    torch.manual_seed(0)
    torch.save(resnet18().state_dict(), weights)
    fitted = fit(folder, "--model", "ResNet18", "--model.weights", weights, "--model.image_size", 28, *SHORT)
    weights.unlink()
    return fitted


@pytest.fixture
def convnet(convnet_fit: Fit, tmp_path: Path) -> Path:
    """The test's own copy of ConvNet's run; lightning_logs is in the current folder."""
    shutil.copytree(convnet_fit.root, tmp_path, dirs_exist_ok=True)
    return Path("lightning_logs", "ConvNet-digits", "version_0")


@pytest.fixture
def resnet(resnet_fit: Fit, tmp_path: Path) -> Path:
    shutil.copytree(resnet_fit.root, tmp_path, dirs_exist_ok=True)
    return Path("lightning_logs", "ResNet18-digits", "version_0")


# ---- fit: what it says and leaves


def test_fit_ends_with_test_accuracy_run_dashboards_and_what_next(convnet_fit: Fit) -> None:
    number, *rest = convnet_fit.out.splitlines()[-4:]
    assert re.fullmatch(rf"Test accuracy  \d\d\.\d\d % on {DIGITS}", number)
    assert rest == [
        "Run            lightning_logs/ConvNet-digits/version_0",
        "Dashboards     tensorboard --logdir lightning_logs",
        "Your digits    python -m mnist_lightning predict --ckpt_path "
        "lightning_logs/ConvNet-digits/version_0/checkpoints/best.ckpt --data Photos --data.path photo.png",
    ]


def test_fit_learns(convnet_fit: Fit) -> None:
    assert float(accuracy(convnet_fit.out)) > 40  # 10 by chance


@pytest.mark.parametrize(("name", "line"), [
    ("convnet_fit", "421,642 trainable of 421,642 parameters"),
    ("resnet_fit", "5,130 trainable of 11,181,642 parameters"),
])  # fmt: skip
def test_fit_says_how_many_parameters_it_trains(name: str, line: str, request: pytest.FixtureRequest) -> None:
    assert line in request.getfixturevalue(name).out.splitlines()


def test_run_folder_holds_config_checkpoints_and_events(convnet: Path) -> None:
    names = files(convnet)
    assert {name for name in names if "events.out.tfevents" not in name and "test digits" not in name} == {
        *("checkpoints/best.ckpt", "checkpoints/last.ckpt", "config.yaml"),
        *("metrics.csv", "report.png", "projector_config.pbtxt"),
    }
    assert any("events.out.tfevents" in name for name in names)


def test_best_is_the_epoch_with_the_highest_validation_accuracy(convnet: Path) -> None:
    scores = [point.value for point in events(convnet).Scalars("val/acc")]
    assert loaded(convnet / "checkpoints" / "best.ckpt")["epoch"] == scores.index(max(scores))
    assert loaded(convnet / "checkpoints" / "last.ckpt")["epoch"] == len(scores) - 1


def test_config_of_a_run_repeats_it(convnet: Path, convnet_fit: Fit) -> None:
    again = command("fit", "--config", convnet / "config.yaml")
    assert accuracy(again) == accuracy(convnet_fit.out)
    assert Path(convnet.parent, "version_1", "config.yaml").read_text() == (convnet / "config.yaml").read_text()


def test_run_on_mnist_is_called_by_its_model_alone(mnist_dir: str) -> None:
    limits = ("--trainer.max_epochs", 1, "--trainer.limit_train_batches", 2)
    out = command("fit", "--data.source", "mnist", "--data.data_dir", mnist_dir, *limits)
    assert re.search(r"Test accuracy  \S+ % on MNIST's 200 test images\nRun +lightning_logs/ConvNet/version_0\n", out)
    assert "-digits" not in out and "WARNING" not in out


def test_auto_takes_mnist_where_it_is(mnist_dir: str) -> None:
    limits = ("--trainer.max_epochs", 1, "--trainer.limit_train_batches", 2)
    assert "on MNIST's 200 test images" in command("fit", "--data.data_dir", mnist_dir, *limits)
    config = yaml.safe_load(Path("lightning_logs/ConvNet/version_0/config.yaml").read_text())
    assert config["data"]["init_args"]["source"] == "mnist"


def test_auto_falls_back_to_digits_loudly_before_and_after(server: Any, capsys: pytest.CaptureFixture[str]) -> None:
    limits = ("--trainer.max_epochs", 1, "--trainer.limit_train_batches", 2)
    out = command("fit", "--data.mirrors", f'["{server.url}"]', *limits)
    assert server.probes != []
    before = "WARNING: MNIST can't be had, so this run uses scikit-learn's 1,797 digits instead.\n"
    assert capsys.readouterr().err.startswith(before)
    after = "WARNING: this was not MNIST, which could not be had, but scikit-learn's 1,797 digits."
    assert out.splitlines()[-1] == after and DIGITS in out
    folder = Path("lightning_logs", "ConvNet-digits", "version_0")
    assert yaml.safe_load((folder / "config.yaml").read_text())["data"]["init_args"]["source"] == "digits"
    content = loaded(folder / "checkpoints" / "last.ckpt")
    assert content["datamodule_hyper_parameters"]["source"] == "digits"


def test_last_is_the_last_epoch_even_where_it_was_not_the_best() -> None:
    # BUG at the time of writing: ModelCheckpoint(save_last=True) saves last.ckpt only together with a better best.ckpt.
    command("fit", *SHORT, "--trainer.max_epochs", 4, "--model.optimizer.lr", 0)  # never better than at first
    checkpoints = Path("lightning_logs/ConvNet-digits/version_0/checkpoints")
    assert loaded(checkpoints / "best.ckpt")["epoch"] < 3
    assert (loaded(checkpoints / "last.ckpt")["epoch"], loaded(checkpoints / "last.ckpt")["global_step"]) == (3, 8)


def test_val_size_0_keeps_the_last_epoch() -> None:
    out = command("fit", *SHORT, "--trainer.max_epochs", 2, "--data.val_size", 0)
    assert "val/acc" not in out
    checkpoints = Path("lightning_logs/ConvNet-digits/version_0/checkpoints")
    best, last = loaded(checkpoints / "best.ckpt"), loaded(checkpoints / "last.ckpt")
    assert (best["epoch"], last["epoch"]) == (1, 1)
    assert all(torch.equal(best["state_dict"][name], value) for name, value in last["state_dict"].items())


def test_fit_without_checkpoints_tests_the_model_as_it_is() -> None:
    limits = ("--trainer.max_epochs", 1, "--trainer.enable_checkpointing", "false")
    assert "Test accuracy" in command("fit", *SHORT, *limits)
    assert not Path("lightning_logs/ConvNet-digits/version_0/checkpoints").exists()


def test_fit_without_logging_still_trains() -> None:
    # BUG at the time of writing: ZeroDivisionError, of a number of steps that is 0 by choice.
    assert "Test accuracy" in command("fit", *SHORT, "--trainer.max_epochs", 1, "--trainer.log_every_n_steps", 0)


def test_fit_gives_the_signal_handlers_back() -> None:
    # BUG at the time of writing: SIGTERM keeps Lightning's handler, which Interruption.teardown puts back after
    # Lightning has taken it off; nothing but SIGKILL then ends the process, pytest's too.
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    command("fit", *SHORT, "--trainer.max_epochs", 1)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_fast_dev_run_leaves_nothing(tmp_path: Path) -> None:
    out = command("fit", "--data.source", "digits", "--trainer.fast_dev_run", "true")
    assert out.endswith("fast_dev_run: no checkpoint, no test.\n")
    assert files(tmp_path) == []


def test_lr_find_names_a_rate_and_leaves_nothing(tmp_path: Path) -> None:
    out = command("fit", "--lr_find", "true", "--data.source", "digits")
    rate = float(re.search(r"A learning rate to try: --model.optimizer.lr (\S+); nothing was trained.\n$", out)[1])
    assert 1e-8 < rate < 1
    assert files(tmp_path) == []


def test_bf16_mixed_trains(capsys: pytest.CaptureFixture[str]) -> None:
    # BUG at the time of writing: Lightning's model summary warns that it counts megabytes in 32 bits.
    out = command("fit", *SHORT, "--trainer.max_epochs", 1, "--trainer.precision", "bf16-mixed")
    assert "Test accuracy" in out


# ---- fit: models, optimizers, schedules


def printed_config(capsys: pytest.CaptureFixture[str], *args: object) -> dict[str, Any]:
    with pytest.raises(SystemExit) as ended:
        run([str(arg) for arg in args])
    assert ended.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize("args", [
    ["--model", "ResNet18"],
    ["--model=ResNet18"],
    ["--model", "mnist_lightning.resnet.ResNet18"],
    ["--model.class_path", "ResNet18"],  # BUG at the time of writing: ConvNet's 0.01
    ["--config", "short.yaml"],
    ["--config", "long.yaml"],
    ["--config=long.yaml", "--model.image_size=32"],
    ["--model", "ConvNet", "--model", "ResNet18"],
], ids=" ".join)  # fmt: skip
def test_resnet18_has_its_own_learning_rate(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """And not ConvNet's, which is the default model: jsonargparse carries the arguments over."""
    Path("short.yaml").write_text("model: ResNet18\n")
    Path("long.yaml").write_text("model:\n  class_path: ResNet18\n  init_args:\n    image_size: 64\n")
    model = printed_config(capsys, "fit", *args, "--print_config")["model"]
    assert model["class_path"].endswith(".ResNet18")
    assert model["init_args"]["optimizer"]["init_args"]["lr"] == 0.001


def test_resnet18_trains_5_epochs_with_learning_rate_0001(resnet: Path, resnet_fit: Fit) -> None:
    assert "\nepoch 5/5 " in resnet_fit.out
    (group,) = loaded(resnet / "checkpoints" / "last.ckpt")["optimizer_states"][0]["param_groups"]
    assert (group["lr"], group["momentum"], group["params"]) == (0.001, 0.9, [0, 1])  # the head's weight and bias


def test_convnet_trains_10_epochs_with_learning_rate_001() -> None:
    out = command("fit", *SHORT)
    assert "\nepoch 10/10 " in out
    content = loaded(Path("lightning_logs/ConvNet-digits/version_0/checkpoints/last.ckpt"))
    (group,) = content["optimizer_states"][0]["param_groups"]
    assert (group["lr"], group["momentum"], len(group["params"])) == (0.01, 0.9, 8)


@pytest.mark.parametrize(("settings", "steps"), [
    ("--trainer.max_epochs 3", 6), ("--trainer.max_steps 3", 3), ("--trainer.max_steps 3 --trainer.max_epochs 1", 2)
])  # fmt: skip
def test_typed_length_of_the_fit_wins(settings: str, steps: int) -> None:
    command("fit", *SHORT, *settings.split())
    content = loaded(Path("lightning_logs/ConvNet-digits/version_0/checkpoints/last.ckpt"))
    assert content["global_step"] == steps


def test_optimizer_by_class_name_gets_its_arguments() -> None:
    settings = ("--model.optimizer", "AdamW", "--model.optimizer.lr", "1e-3", "--model.optimizer.betas", "[0.8, 0.9]")
    command("fit", *SHORT, "--trainer.max_epochs", 1, *settings)
    content = loaded(Path("lightning_logs/ConvNet-digits/version_0/checkpoints/last.ckpt"))
    (group,) = content["optimizer_states"][0]["param_groups"]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (1e-3, (0.8, 0.9), 0.01)
    assert content["hyper_parameters"]["optimizer"]["class_path"] == "torch.optim.AdamW"


def test_optimizer_by_class_name_has_its_own_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    # BUG at the time of writing: AdamW gets SGD's lr 0.01 and weight_decay 0.0, which jsonargparse carries over.
    config = printed_config(capsys, "fit", "--model.optimizer", "AdamW", "--print_config")
    chosen = config["model"]["init_args"]["optimizer"]
    assert chosen["class_path"] == "torch.optim.AdamW"
    assert (chosen["init_args"]["lr"], chosen["init_args"]["weight_decay"]) == (1e-3, 1e-2)


@pytest.mark.parametrize(("settings", "steps", "total"), [
    ("", 6, 6),
    ("--trainer.accumulate_grad_batches 2", 4, 4),  # the third batch of an epoch makes a step of its own
    ("--trainer.max_steps 5", 5, 5),
    ("--trainer.max_steps 50", 6, 6),  # BUG at the time of writing: 50, though the epochs end before
    ("--trainer.limit_train_batches 0.1", 4, 4),  # of 21 batches
    ("--model.scheduler.total_steps 9", 6, 9),
    ("--model.scheduler.epochs 2 --model.scheduler.steps_per_epoch 4", 6, 8),
])  # fmt: skip
def test_onecycle_steps_after_each_batch_to_the_end_of_the_fit(settings: str, steps: int, total: int) -> None:
    schedule = ("--model.scheduler", "OneCycleLR", "--model.scheduler.max_lr", "0.1")
    command("fit", *SHORT, "--trainer.limit_train_batches", 3, "--trainer.max_epochs", 2, *schedule, *settings.split())
    state = loaded(Path("lightning_logs/ConvNet-digits/version_0/checkpoints/last.ckpt"))["lr_schedulers"][0]
    assert (state["last_epoch"], state["total_steps"]) == (steps, total)


def test_steplr_steps_after_each_epoch() -> None:
    schedule = ("--model.scheduler", "StepLR", "--model.scheduler.step_size", 1, "--model.scheduler.gamma", 0.5)
    command("fit", *SHORT, "--trainer.max_epochs", 3, *schedule)
    run_folder = Path("lightning_logs/ConvNet-digits/version_0")
    state = loaded(run_folder / "checkpoints" / "last.ckpt")["lr_schedulers"][0]
    assert (state["last_epoch"], state["step_size"]) == (3, 1)
    assert [point.value for point in events(run_folder).Scalars("lr-SGD")] == pytest.approx([0.01, 0.005, 0.0025])


def test_reduce_on_plateau_watches_what_it_is_told() -> None:
    # BUG at the time of writing: refused, "expected --model.scheduler to be valid".
    schedule = ("--model.scheduler", "ReduceLROnPlateau", "--model.scheduler.monitor", "val/loss")
    command("fit", *SHORT, "--trainer.max_epochs", 2, *schedule)
    run_folder = Path("lightning_logs/ConvNet-digits/version_0")
    (state,) = loaded(run_folder / "checkpoints" / "last.ckpt")["lr_schedulers"]
    losses = [point.value for point in events(run_folder).Scalars("val/loss")]
    assert state["best"] in [pytest.approx(min(losses[:1])), pytest.approx(min(losses))]


def test_print_config_is_a_config(capsys: pytest.CaptureFixture[str]) -> None:
    args = ("--model", "ResNet18", "--model.image_size", 32, "--data.source", "digits", "--print_config")
    first = printed_config(capsys, "fit", *args)
    Path("c.yaml").write_text(yaml.safe_dump(first))
    assert printed_config(capsys, "fit", "--config", "c.yaml", "--print_config") == first
    assert first["model"]["init_args"]["image_size"] == 32


@pytest.mark.parametrize("name", ["convnet", "resnet18"])
def test_shipped_config_is_the_default_recipe_on_mnist(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(mnist_lightning.__file__).parents[1] / "configs" / f"{name}.yaml"
    shipped = printed_config(capsys, "fit", "--config", path, "--print_config")
    model = {"convnet": "ConvNet", "resnet18": "ResNet18"}[name]
    default = printed_config(capsys, "fit", "--model", model, "--data.source", "mnist", "--print_config")
    assert shipped["trainer"].pop("max_epochs") == {"convnet": 10, "resnet18": 5}[name]
    del default["trainer"]["max_epochs"]
    assert shipped == default


def test_value_typed_beside_a_config_wins(capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(mnist_lightning.__file__).parents[1] / "configs" / "convnet.yaml"
    given = ("--data.batch_size", 7, "--trainer.max_epochs", 3, "--model.optimizer.lr", 0.5)
    config = printed_config(capsys, "fit", "--config", path, *given, "--print_config")
    assert config["data"]["init_args"]["batch_size"] == 7
    assert config["trainer"]["max_epochs"] == 3
    assert config["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 0.5


# ---- validate, test, predict: a checkpoint alone is enough


@pytest.mark.parametrize("which", ["best", "lightning_logs/ConvNet-digits/version_0/checkpoints/best.ckpt"])
def test_test_gives_the_accuracy_that_fit_printed(which: str, convnet: Path, convnet_fit: Fit) -> None:
    assert command("test", "--ckpt_path", which) == "".join(convnet_fit.out.splitlines(keepends=True)[-4:-2])


def test_validate_gives_the_accuracy_that_the_epoch_had(convnet: Path) -> None:
    points = [point.value for point in events(convnet).Scalars("val/acc")]
    out = command("validate", "--ckpt_path", "last")
    assert accuracy(out) == f"{100 * points[-1]:.2f}"
    assert "on the 120 validation images of scikit-learn's digits, not MNIST" in out


def test_test_works_from_another_folder(
    convnet_fit: Fit, convnet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    out = command("test", "--ckpt_path", tmp_path / convnet / "checkpoints" / "best.ckpt")
    assert accuracy(out) == accuracy(convnet_fit.out)
    assert f"Run            ../{convnet}" in out
    assert files(tmp_path / "elsewhere") == []


def test_resnet18_is_tested_without_its_file_of_weights(resnet: Path, resnet_fit: Fit) -> None:
    out = command("test", "--ckpt_path", "best", "--trainer.limit_test_batches", 2)
    assert accuracy(out) == accuracy(resnet_fit.out)
    assert "WARNING" not in out


def test_backbone_in_a_checkpoint_is_the_one_of_its_weights(resnet: Path) -> None:
    torch.manual_seed(0)
    expected = resnet18().state_dict()
    state = loaded(resnet / "checkpoints" / "last.ckpt")["state_dict"]
    backbone = {name.removeprefix("backbone."): value for name, value in state.items() if "backbone." in name}
    assert set(expected) - set(backbone) == {"fc.weight", "fc.bias"}
    assert all(torch.equal(value, expected[name]) for name, value in backbone.items())


def test_test_needs_mnist_where_fit_needed_it(
    mnist_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limits = ("--trainer.max_epochs", 1, "--trainer.limit_train_batches", 2)
    fitted = command("fit", "--data.source", "mnist", "--data.data_dir", "data", *limits)
    assert accuracy(command("test", "--ckpt_path", "best")) == accuracy(fitted)
    shutil.move(mnist_dir, tmp_path / "moved")
    args = ("test", "--ckpt_path", "best", "--data.mirrors", '["http://127.0.0.1:1"]')
    assert "or --data.source digits" in refused(capsys, *args)
    assert accuracy(command(*args, "--data.data_dir", "moved")) == accuracy(fitted)


@pytest.mark.parametrize("name", ["test", "validate", "predict"])
def test_results_go_into_the_run_of_the_checkpoint(name: str, convnet: Path, tmp_path: Path) -> None:
    before = set(files(tmp_path))
    out = command(name, "--ckpt_path", "best")
    new = set(files(tmp_path)) - before
    assert new and all(convnet in Path(path).parents for path in new)
    assert str(convnet) in out
    assert before <= set(files(tmp_path))


@pytest.mark.parametrize(("args", "images"), [
    ("validate --data.val_size 0", "validation images"),
    ("validate --trainer.limit_val_batches 0", "validation images"),
    ("test --trainer.limit_test_batches 0", "test images"),
])  # fmt: skip
def test_accuracy_on_no_images_is_refused(
    args: str, images: str, convnet: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # BUG at the time of writing: KeyError.
    assert re.search(f"expected .*{images}.* got none", refused(capsys, *args.split(), "--ckpt_path", "best"))


@pytest.mark.parametrize("name", ["test", "predict"])
def test_checkpoint_from_elsewhere_writes_beside_itself(name: str, convnet: Path, tmp_path: Path) -> None:
    (tmp_path / "downloads").mkdir()
    (convnet / "checkpoints" / "best.ckpt").rename(tmp_path / "downloads" / "mine.ckpt")
    shutil.rmtree("lightning_logs")
    before = set(files(tmp_path))
    out = command(name, "--ckpt_path", "downloads/mine.ckpt")
    new = set(files(tmp_path)) - before
    assert new and all(Path("downloads") in Path(path).parents for path in new)
    assert re.search(r"(Run|Predictions) +downloads", out)


def test_last_is_the_newest_runs(convnet: Path) -> None:
    command("fit", *SHORT, "--trainer.max_epochs", 1)
    assert "version_1" in command("test", "--ckpt_path", "last")


def test_model_beside_best_picks_the_newest_run_of_that_model(convnet: Path, resnet: Path) -> None:
    out = command("test", "--ckpt_path", "best", "--model", "ConvNet")
    assert "Run            lightning_logs/ConvNet-digits" in out


def test_default_root_dir_beside_best_is_where_it_looks(convnet: Path, tmp_path: Path) -> None:
    shutil.copytree("lightning_logs", "runs/lightning_logs")
    shutil.rmtree("lightning_logs")
    out = command("test", "--ckpt_path", "best", "--trainer.default_root_dir", "runs")
    assert "Run            runs/lightning_logs/ConvNet-digits/version_0" in out


# ---- What is typed beside a checkpoint wins, or is refused


def test_data_settings_typed_beside_a_checkpoint_win(convnet: Path, mnist_dir: str) -> None:
    out = command("test", "--ckpt_path", "best", "--data.source", "mnist", "--data.data_dir", mnist_dir)
    assert "on MNIST's 200 test images" in out
    assert "on the 24 validation images" in command("validate", "--ckpt_path", "best", "--data.val_size", 1000)
    typed = built("predict", "--ckpt_path", "best", "--data.batch_size", 7)
    assert typed.datamodule.hparams["batch_size"] == 7
    assert typed.datamodule.hparams["source"] == "digits"  # untyped: the checkpoint's


def test_config_beside_a_checkpoint_wins(convnet: Path, mnist_dir: str) -> None:
    Path("data.yaml").write_text(f"data:\n  init_args:\n    source: mnist\n    data_dir: {mnist_dir}\n")
    assert "on MNIST's 200 test images" in command("test", "--ckpt_path", "best", "--config", "data.yaml")


def test_checkpoints_settings_are_used_not_the_defaults(convnet_fit: Fit) -> None:
    settings = ("--data.batch_size", 16, "--data.split_seed", 3, "--model.optimizer", "Adam")
    command("fit", *SHORT, *settings, "--trainer.max_epochs", 1)
    again = built("test", "--ckpt_path", "last")
    assert (again.datamodule.hparams["batch_size"], again.datamodule.hparams["split_seed"]) == (16, 3)
    assert again.config["test"]["model"]["init_args"]["optimizer"]["class_path"] == "torch.optim.Adam"


def test_image_size_typed_beside_a_checkpoint_wins(resnet: Path) -> None:
    settings = ("--ckpt_path", "best", "--model.image_size", 40, "--trainer.limit_test_batches", 2)
    assert built("test", *settings).model.image_size == 40


def test_other_model_beside_a_checkpoint_is_refused(convnet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, "test", "--ckpt_path", convnet / "checkpoints" / "best.ckpt", "--model", "ResNet18")
    assert re.search(r"ResNet18 got .*ConvNet.* leave out --model", message)


def test_weights_beside_a_checkpoint_are_refused(resnet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, "test", "--ckpt_path", "best", "--model.weights", "none")
    assert re.search(r"--model\.weights as in the checkpoint: .*weights\.pth got none leave it out", message)


def test_checkpoint_whose_shapes_differ_is_refused_by_name(convnet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = convnet / "checkpoints" / "best.ckpt"
    content = loaded(path)
    content["state_dict"]["fc2.bias"] = torch.zeros(11)
    torch.save(content, path)
    assert re.search(r"fits ConvNet .* differs at fc2\.bias \(11,\)", refused(capsys, "test", "--ckpt_path", "best"))


def test_part_of_the_test_images_is_called_a_part(convnet: Path) -> None:
    out = command("test", "--ckpt_path", "best", "--trainer.limit_test_batches", 0.5)
    assert f"on a part of {DIGITS}" in out


def test_one_batch_is_called_a_part(convnet: Path) -> None:
    # BUG at the time of writing: one batch, the int 1, passes for 1.0, all of them.
    assert f"on a part of {DIGITS}" in command("test", "--ckpt_path", "best", "--trainer.fast_dev_run", "true")


# ---- predict


def test_predictions_are_one_row_an_image_in_order(convnet: Path, convnet_fit: Fit) -> None:
    out = command("predict", "--ckpt_path", "best")
    assert out == f"Predictions    {convnet}/predictions.csv\n"
    with (convnet / "predictions.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["index", "label", "predicted", *(f"p{digit}" for digit in range(10))]
    assert [int(row[0]) for row in rows] == list(range(360))
    labels = torch.tensor([int(row[1]) for row in rows])
    predicted = torch.tensor([int(row[2]) for row in rows])
    probabilities = torch.tensor([[float(value) for value in row[3:]] for row in rows])
    assert torch.equal(labels, mnist_lightning.sources.load_digits().test.labels)
    assert torch.equal(predicted, probabilities.argmax(1))
    assert (probabilities.sum(1) - 1).abs().max() < 1e-5
    assert f"{100 * (predicted == labels).double().mean():.2f}" == accuracy(convnet_fit.out)


def test_predict_again_replaces_the_file(convnet: Path) -> None:
    (convnet / "predictions.csv").write_text("old")
    command("predict", "--ckpt_path", "best")
    assert len((convnet / "predictions.csv").read_text().splitlines()) == 361


# ---- Resuming


def test_fit_resumes_the_newest_run_in_its_folder(convnet: Path, tmp_path: Path) -> None:
    # BUG at the time of writing: Lightning warns that the folder of the checkpoints changed (from its absolute path to
    # the relative one) and forgets the best score.
    out = command("fit", "--ckpt_path", "last", "--trainer.max_epochs", 3)
    assert "epoch 3/3" in out and "epoch 2/3" not in out
    assert [path.name for path in convnet.parent.iterdir()] == ["version_0"]
    assert [point.step for point in events(convnet).Scalars("val/acc")] == [20, 41, 62]
    assert loaded(convnet / "checkpoints" / "last.ckpt")["epoch"] == 2


@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # the BUG above shows here in what is kept
@pytest.mark.parametrize("moved", [False, True])
def test_worse_epoch_after_resuming_does_not_replace_the_best(moved: bool, tmp_path: Path) -> None:
    command("fit", "--data.source", "digits", "--trainer.max_epochs", 1)
    if moved:
        shutil.move("lightning_logs", "runs/lightning_logs")
    root = "runs" if moved else "."
    checkpoints = Path(root, "lightning_logs/ConvNet-digits/version_0/checkpoints")
    before = (checkpoints / "best.ckpt").read_bytes()
    content = loaded(checkpoints / "last.ckpt")
    content["state_dict"] = {name: torch.zeros_like(value) for name, value in content["state_dict"].items()}
    torch.save(content, checkpoints / "last.ckpt")  # goes on from a model that has forgotten everything
    settings = ("--trainer.max_epochs", 2, "--trainer.limit_train_batches", 2, "--trainer.default_root_dir", root)
    command("fit", "--ckpt_path", "last", *settings)
    assert (checkpoints / "best.ckpt").read_bytes() == before
    assert loaded(checkpoints / "last.ckpt")["epoch"] == 1


def test_config_beside_last_resumes_the_run_that_it_came_from(convnet: Path) -> None:
    # BUG at the time of writing: looks for a run called mnist_lightning.convnet.ConvNet.
    resumed = built("predict", "--config", convnet / "config.yaml", "--ckpt_path", "last")
    assert resumed.config["predict"]["ckpt_path"] == str(convnet / "checkpoints" / "last.ckpt")


@pytest.mark.parametrize(("option", "value"), [
    ("--data.batch_size", 32), ("--data.val_size", 10), ("--data.split_seed", 4), ("--model.optimizer.lr", 0.5)
])  # fmt: skip
def test_resuming_with_another_setting_is_refused(
    option: str, value: float, convnet: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(capsys, "fit", "--ckpt_path", "last", "--trainer.max_epochs", 3, option, value)
    assert re.search(rf"expected {option.removesuffix('.lr')} as in the checkpoint.* start a new run", message)


# ---- TensorBoard


def events(run_folder: Path) -> EventAccumulator:
    return EventAccumulator(str(run_folder)).Reload()


def test_tensorboard_gets_the_tags_of_the_design(convnet: Path) -> None:
    tags = set(events(convnet).Tags()["scalars"])
    assert tags >= {"train/loss", "train/acc", "val/loss", "val/acc", "test/loss", "test/acc", "lr-SGD"}
    assert not {tag for tag in tags if "hp_metric" in tag}


def test_tensorboard_gets_the_numbers_that_were_printed(convnet: Path, convnet_fit: Fit) -> None:
    recorded = events(convnet)
    printed = re.findall(r"val/acc (\S+)", convnet_fit.out)
    assert [f"{point.value:.4f}" for point in recorded.Scalars("val/acc")] == printed
    assert [f"{100 * point.value:.2f}" for point in recorded.Scalars("test/acc")] == [accuracy(convnet_fit.out)]
    measured = [tag for tag in recorded.Tags()["scalars"] if "/" in tag]
    assert 0.0 not in [point.value for tag in measured for point in recorded.Scalars(tag)]


def test_printed_training_accuracy_is_that_epochs(convnet: Path, convnet_fit: Fit) -> None:
    printed = re.findall(r"epoch \d+/2 .*train/acc (\S+)", convnet_fit.out)
    assert [f"{point.value:.4f}" for point in events(convnet).Scalars("train/acc")] == printed


def test_tensorboard_joins_hyperparameters_to_val_and_test_accuracy(convnet: Path) -> None:
    contents = events(convnet).PluginTagToContent("hparams")
    data = {tag: HParamsPluginData.FromString(content) for tag, content in contents.items()}
    experiment = data["_hparams_/experiment"].experiment
    assert {info.name.tag for info in experiment.metric_infos} == {"val/acc", "test/acc"}
    shown = data["_hparams_/session_start_info"].session_start_info.hparams
    assert shown["batch_size"].number_value == 64
    assert shown["source"].string_value == "digits"
    assert shown["optimizer/lr"].number_value == 0.01


# ---- The command in a process of its own


def in_a_process(*args: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(mnist_lightning.__file__).parents[1])}
    arguments = [sys.executable, "-m", "mnist_lightning", *args]
    return subprocess.run(arguments, env=environment, text=True, capture_output=True)


def test_new_process_finds_the_best_checkpoint(convnet: Path, convnet_fit: Fit) -> None:
    ended = in_a_process("test", "--ckpt_path", "best")
    assert ended.returncode == 0
    assert accuracy(ended.stdout) == accuracy(convnet_fit.out)
    assert "Warning" not in ended.stderr


def test_error_in_a_process_is_exit_code_2_and_three_lines() -> None:
    # BUG at the time of writing: "Seed set to 0" and "GPU available: False, used: False" come before.
    ended = in_a_process("fit", "--data.source", "digits", "--model", "ResNet18", "--model.weights", "nowhere.pth")
    assert ended.returncode == 2
    lines = r"error: expected .*\n +got no such file: nowhere\.pth\n +give --model\.weights .*\n"
    assert re.fullmatch(lines, ended.stderr)
    assert ended.stdout == ""
