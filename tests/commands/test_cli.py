"""The command line, run in this process: what the commands print, write, and read back from checkpoints."""

import csv
import re
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from running import DIGITS, RUN, SHORT, Fit, accuracy, command, files, last, loaded, printed_config, process, refused
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torchvision.models import resnet18

import mnist_lightning
from mnist_lightning import load_model
from mnist_lightning.commands.cli import CLI, run
from mnist_lightning.runs.console import hush
from mnist_lightning.sources import load_digits

THE_DIGITS = "the 360 test images of scikit-learn's digits, not MNIST"
CONFIGS = Path(mnist_lightning.__file__).parents[1] / "configs"

# For a fit on tests/conftest.py's 640 images
ON_640 = (
    *("--data.val_size", "0.1", "--pictures", "false"),
    *("--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2"),
)

pytestmark = pytest.mark.usefixtures("folder")


def built(*args: object) -> CLI:
    """Runs a command; returns what was built for it."""
    hush()
    return CLI([str(arg) for arg in args])


def events(run_folder: Path) -> EventAccumulator:
    return EventAccumulator(str(run_folder)).Reload()


def points(run_folder: Path, tag: str) -> list[float]:
    return [point.value for point in events(run_folder).Scalars(tag)]


# ---- fit: what it says and leaves


def test_fit_ends_with_test_accuracy_run_dashboards_and_what_next(convnet_fit: Fit) -> None:
    number, *rest = convnet_fit.out.splitlines()[-4:]
    assert re.fullmatch(rf"Test accuracy  \d\d\.\d\d % on {THE_DIGITS}", number)
    assert float(accuracy(number)) > 40  # 10 by chance
    assert rest == [
        "Run            lightning_logs/ConvNet-digits/version_0",
        "Dashboards     tensorboard --logdir lightning_logs",
        "Your digits    python -m mnist_lightning predict --ckpt_path "
        "lightning_logs/ConvNet-digits/version_0/checkpoints/best.ckpt --data Photos --data.path PHOTO_OR_FOLDER",
    ]


def test_fit_says_how_many_parameters_it_trains(convnet_fit: Fit, resnet_fit: Fit) -> None:
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
    again = command("fit", "--config", convnet / "config.yaml", "--pictures", "false")
    assert accuracy(again) == accuracy(convnet_fit.out)
    config = Path(convnet.parent, "version_1", "config.yaml").read_text()
    assert config.replace("pictures: false", "pictures: true") == (convnet / "config.yaml").read_text()


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
    assert "WARNING: MNIST can't be had, so this run uses scikit-learn's 1,797 digits" in warning
    assert warning.count("WARNING") == 1 and f"got {server.url}" in warning and "404" in warning
    after = "WARNING: this was not MNIST, which could not be had, but scikit-learn's 1,797 digits."
    assert out.splitlines()[-1] == after and THE_DIGITS in out
    assert yaml.safe_load((RUN / "config.yaml").read_text())["data"]["init_args"]["source"] == "digits"
    assert last()["datamodule_hyper_parameters"]["source"] == "digits"


@pytest.mark.parametrize("settings", ["--data.val_size 0", "--data.val_size 0 --trainer.check_val_every_n_epoch 2"])
def test_best_of_a_fit_without_validation_is_its_end(settings: str) -> None:
    out = command("fit", *SHORT, "--trainer.max_epochs", 2, *settings.split())
    assert "val/acc" not in out
    best = loaded(RUN / "checkpoints" / "best.ckpt")
    assert best["global_step"] == last()["global_step"] == 4
    assert all(torch.equal(best["state_dict"][name], value) for name, value in last()["state_dict"].items())


def test_fit_works_in_a_thread_and_gives_the_signal_handlers_back() -> None:
    out: list[str] = []
    fit = ("fit", *SHORT, "--trainer.max_epochs", "1")
    thread = threading.Thread(target=lambda: out.append(command(*fit)))
    thread.start()
    thread.join()
    assert "Test accuracy" in out[0]
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    command(*fit)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


@pytest.mark.parametrize(("settings", "said"), [
    ("--trainer.fast_dev_run true", r"A trial run: no checkpoint, no test\."),
    ("--lr_find true", r"A learning rate to try: --model.optimizer.lr (\d\.\d+|\de-0[1-7]); nothing was trained\."),
])  # fmt: skip
def test_trial_leaves_nothing(settings: str, said: str, folder: Path) -> None:
    out = command("fit", *DIGITS, *settings.split())
    assert re.fullmatch(said, out.splitlines()[-1])
    assert files(folder) == set()


def test_printed_commands_can_be_pasted_where_a_path_has_a_space() -> None:
    out = command("fit", *SHORT, "--trainer.max_epochs", 1, "--trainer.default_root_dir", "my runs")
    assert "tensorboard --logdir 'my runs/lightning_logs'" in out
    assert "--ckpt_path 'my runs/lightning_logs/ConvNet-digits/version_0/checkpoints/best.ckpt' --data" in out


class Broken(mnist_lightning.ConvNet):
    """Fails in its third step."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.training and self.trainer.global_step == 2:
            raise ValueError("the user's own")
        return super().forward(images)


def test_exception_of_the_users_own_code_keeps_its_traceback_and_the_state(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="the user's own") as raised:
        run(["fit", "--model", f"{__name__}.Broken", *DIGITS])
    assert raised.traceback[-1].path == Path(__file__)
    folder = Path("lightning_logs", "Broken-digits", "version_0", "checkpoints")
    assert f"ValueError: the state is kept in {folder}/exception.ckpt\n" in capsys.readouterr().err
    assert loaded(folder / "exception.ckpt")["global_step"] == 2


# ---- fit: models, optimizers, schedules


@pytest.mark.parametrize("args", [
    ["--model=ResNet18"],
    ["--model", "mnist_lightning.resnet.ResNet18"],
    ["--model.class_path", "ResNet18"],
    ["--model", '{"class_path": "ResNet18"}'],
    ["--model", "model.yaml"],
    ["--config", "short.yaml"],
    ["--config=long.yaml", "--model.image_size=32"],
    ["--config", "convnet.yaml", "--config", "short.yaml"],
    ["--model", "ConvNet", "--model", "ResNet18"],
], ids=" ".join)  # fmt: skip
def test_resnet18_has_its_own_learning_rate(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """And not ConvNet's, which is the default model: jsonargparse carries the arguments over."""
    Path("short.yaml").write_text("model: ResNet18\n")
    Path("model.yaml").write_text("class_path: ResNet18\n")
    Path("long.yaml").write_text("model:\n  class_path: ResNet18\n  init_args:\n    image_size: 64\n")
    Path("convnet.yaml").write_text((CONFIGS / "convnet.yaml").read_text())
    model = printed_config(capsys, "fit", *args)["model"]
    assert model["class_path"].endswith(".ResNet18")
    assert model["init_args"]["optimizer"]["init_args"]["lr"] == 0.001


@pytest.mark.parametrize("option", ["--model.optimizer", "--model.init_args.optimizer"])
def test_optimizer_by_class_name_has_its_own_defaults_and_arguments(
    option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = (option, "AdamW", f"{option}.betas", "[0.8, 0.9]")
    chosen = printed_config(capsys, "fit", *typed)["model"]["init_args"]["optimizer"]
    assert chosen["class_path"] == "torch.optim.AdamW"
    arguments = {name: chosen["init_args"][name] for name in ("lr", "weight_decay", "betas")}
    assert arguments == {"lr": 1e-3, "weight_decay": 1e-2, "betas": [0.8, 0.9]}


@pytest.mark.parametrize("given", [
    ["--model.scheduler", "ReduceLROnPlateau", "--model.scheduler.monitor", "val/loss"], ["--config", "c.yaml"]
])  # fmt: skip
def test_reduce_on_plateau_is_lightnings_which_knows_its_metric(
    given: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    scheduler = "{class_path: ReduceLROnPlateau, init_args: {monitor: val/loss}}"
    Path("c.yaml").write_text(f"model: {{class_path: ConvNet, init_args: {{scheduler: {scheduler}}}}}")
    chosen = printed_config(capsys, "fit", *given)["model"]["init_args"]["scheduler"]
    assert chosen["class_path"] == "lightning.pytorch.cli.ReduceLROnPlateau"
    assert chosen["init_args"]["monitor"] == "val/loss"


def test_resnet18_trains_5_epochs_with_learning_rate_0001(resnet: Path, resnet_fit: Fit) -> None:
    assert "\nepoch 5/5 " in resnet_fit.out
    (group,) = last(resnet)["optimizer_states"][0]["param_groups"]
    assert (group["lr"], group["momentum"], group["params"]) == (0.001, 0.9, [0, 1])  # the head's weight and bias


def test_convnet_trains_10_epochs_with_learning_rate_001() -> None:
    assert "\nepoch 10/10 " in command("fit", *SHORT, "--trainer.limit_val_batches", 0)
    (group,) = last()["optimizer_states"][0]["param_groups"]
    assert (group["lr"], group["momentum"], len(group["params"])) == (0.01, 0.9, 8)


# ---- Config files


def test_print_config_is_a_config_for_every_command(convnet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = printed_config(capsys, "fit", "--model", "ResNet18", "--model.image_size", 32, "--data.source", "digits")
    Path("c.yaml").write_text(yaml.safe_dump(first))
    assert printed_config(capsys, "fit", "--config", "c.yaml") == first
    assert first["model"]["init_args"]["image_size"] == 32
    Path("c.yaml").write_text(yaml.safe_dump(printed_config(capsys, "fit", *DIGITS)))
    assert THE_DIGITS in command("test", "--ckpt_path", "best", "--config", "c.yaml")


@pytest.mark.parametrize("val_size", [0, 0.2, 5000])
def test_val_size_in_config_yaml_is_the_one_that_was_typed(val_size: float, folder: Path) -> None:
    command("fit", *SHORT, "--data.val_size", val_size, "--trainer.max_epochs", 1)
    for _ in range(2):
        written = yaml.safe_load((RUN / "config.yaml").read_text())["data"]["init_args"]["val_size"]
        assert (written, type(written)) == (val_size, type(val_size))
        shutil.move(RUN / "config.yaml", "c.yaml")
        shutil.rmtree("lightning_logs")
        command("fit", "--config", "c.yaml")


@pytest.mark.parametrize(("name", "model", "epochs"), [("convnet", "ConvNet", 10), ("resnet18", "ResNet18", 5)])
def test_shipped_config_is_the_default_recipe_on_mnist(
    name: str, model: str, epochs: int, capsys: pytest.CaptureFixture[str]
) -> None:
    shipped = printed_config(capsys, "fit", "--config", CONFIGS / f"{name}.yaml")
    assert shipped["data"]["init_args"]["batch_size"] == 64  # the default for MNIST
    shipped["data"]["init_args"]["batch_size"] = None
    default = printed_config(capsys, "fit", "--model", model, "--data.source", "mnist")
    assert (shipped["trainer"].pop("max_epochs"), default["trainer"].pop("max_epochs")) == (epochs, None)
    assert shipped == default


def test_value_typed_beside_a_config_wins(capsys: pytest.CaptureFixture[str]) -> None:
    given = ("--data.batch_size", 7, "--trainer.max_epochs", 3, "--model.optimizer.lr", 0.5)
    config = printed_config(capsys, "fit", "--config", CONFIGS / "convnet.yaml", *given)
    assert config["data"]["init_args"]["batch_size"] == 7
    assert config["trainer"]["max_epochs"] == 3
    assert config["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 0.5


# ---- validate, test, predict: a checkpoint alone is enough


def test_test_gives_the_accuracy_that_fit_printed(convnet: Path, convnet_fit: Fit) -> None:
    out = command("test", "--ckpt_path", "best", "--pictures", "false")
    assert out == "".join(convnet_fit.out.splitlines(keepends=True)[-4:-2])


def test_validate_gives_the_accuracy_that_the_epoch_had(convnet: Path) -> None:
    out = command("validate", "--ckpt_path", "last", "--pictures", "false")
    assert accuracy(out) == f"{100 * points(convnet, 'val/acc')[1]:.2f}"
    assert "on the 120 validation images of scikit-learn's digits, not MNIST" in out


def test_test_works_from_another_folder(
    convnet_fit: Fit, convnet: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    out = command("test", "--ckpt_path", folder / convnet / "checkpoints" / "best.ckpt")
    assert accuracy(out) == accuracy(convnet_fit.out)
    assert f"Run            ../{convnet}" in out
    assert files(folder / "elsewhere") == set()


def test_resnet18_is_tested_without_its_file_of_weights(resnet: Path, resnet_fit: Fit) -> None:
    out = command("test", "--ckpt_path", "best", "--trainer.limit_test_batches", 2)
    assert accuracy(out) == accuracy(resnet_fit.out)
    assert "WARNING" not in out
    torch.manual_seed(0)
    expected = resnet18().state_dict()
    state = last(resnet)["state_dict"]
    backbone = {name.removeprefix("backbone."): value for name, value in state.items() if "backbone." in name}
    assert set(expected) - set(backbone) == {"fc.weight", "fc.bias"}
    assert all(torch.equal(value, expected[name]) for name, value in backbone.items())


def test_test_needs_mnist_where_fit_needed_it(mnist_dir: str, folder: Path) -> None:
    fitted = command("fit", "--data.source", "mnist", "--data.data_dir", "data", *ON_640)
    assert accuracy(command("test", "--ckpt_path", "best")) == accuracy(fitted)
    shutil.move(mnist_dir, folder / "moved")
    args = ("test", "--ckpt_path", "best", "--data.mirrors", '["http://127.0.0.1:1"]')
    assert "or --data.source digits" in refused(*args)
    assert accuracy(command(*args, "--data.data_dir", "moved")) == accuracy(fitted)


@pytest.mark.parametrize("name", ["test", "validate"])
def test_results_go_into_the_run_of_the_checkpoint(name: str, convnet: Path, folder: Path) -> None:
    before = files(folder)
    out = command(name, "--ckpt_path", "best")
    new = files(folder) - before
    assert new and all(convnet in Path(path).parents for path in new)
    assert str(convnet) in out and before <= files(folder)


@pytest.mark.parametrize("name", ["test", "predict"])
def test_results_of_a_checkpoint_from_elsewhere_go_into_a_folder_beside_it(
    name: str, convnet: Path, folder: Path
) -> None:
    (folder / "downloads").mkdir()
    (convnet / "checkpoints" / "best.ckpt").rename(folder / "downloads" / "mine.ckpt")
    (folder / "downloads" / "metrics.csv").write_text("somebody's own")
    shutil.rmtree("lightning_logs")
    before = files(folder)
    out = command(name, "--ckpt_path", "downloads/mine.ckpt", "--pictures", "false")
    new = files(folder) - before
    assert new and all(path.startswith("downloads/mine-results/") for path in new)
    assert (folder / "downloads" / "metrics.csv").read_text() == "somebody's own"
    assert re.search(r"(Run|Predictions) +downloads/mine-results", out)


@pytest.mark.parametrize(("args", "images"), [
    ("validate --data.val_size 0", "validation images"),
    ("validate --trainer.limit_val_batches 0", "validation images"),
    ("test --trainer.limit_test_batches 0", "test images"),
])  # fmt: skip
def test_accuracy_on_no_images_is_refused(
    args: str, images: str, convnet: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*args.split(), "--ckpt_path", "best"]) == 2
    assert f"error: expected {images}\n       got none\n" in capsys.readouterr().err


def test_default_root_dir_beside_best_is_where_it_looks(convnet: Path) -> None:
    shutil.move("lightning_logs", "runs/lightning_logs")
    out = command("test", "--ckpt_path", "best", "--trainer.default_root_dir", "runs", "--pictures", "false")
    assert "Run            runs/lightning_logs/ConvNet-digits/version_0" in out


@pytest.mark.parametrize("limit", ["--trainer.limit_test_batches 0.5", "--trainer.limit_test_batches 1"])
def test_part_of_the_test_images_is_called_a_part(limit: str, convnet: Path) -> None:
    assert f"on a part of {THE_DIGITS}" in command("test", "--ckpt_path", "best", "--pictures", "false", *limit.split())


def test_one_is_one_batch_whatever_order_lightnings_types_are_in(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for part in ("train", "val", "test", "predict"):
        monkeypatch.setitem(Trainer.__init__.__annotations__, f"limit_{part}_batches", float | int | None)
    limits = [f"--trainer.limit_{part}_batches=1" for part in ("train", "val", "test", "predict")]
    trainer = printed_config(capsys, "fit", *limits, "--trainer.limit_val_batches=1.0")["trainer"]
    values = [trainer[f"limit_{part}_batches"] for part in ("train", "val", "test", "predict")]
    assert [(type(value), value) for value in values] == [(int, 1), (float, 1.0), (int, 1), (int, 1)]


def test_predictions_are_one_row_an_image_in_order(convnet: Path, convnet_fit: Fit) -> None:
    (convnet / "predictions.csv").write_text("old")
    assert command("predict", "--ckpt_path", "best") == f"Predictions    {convnet}/predictions.csv\n"
    with (convnet / "predictions.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["index", "label", "predicted", *(f"p{digit}" for digit in range(10))]
    assert [int(row[0]) for row in rows] == list(range(360))
    labels, predicted = torch.tensor([[int(row[1]), int(row[2])] for row in rows]).T
    images, expected = load_digits().test
    assert torch.equal(labels, expected)
    with torch.no_grad():
        probabilities = load_model(convnet / "checkpoints" / "best.ckpt")(images).softmax(1)
    found = torch.tensor([[float(value) for value in row[3:]] for row in rows])
    torch.testing.assert_close(found, probabilities, atol=1e-5, rtol=0)
    assert torch.equal(predicted, probabilities.argmax(1))
    assert f"{100 * (predicted == labels).double().mean():.2f}" == accuracy(convnet_fit.out)


# ---- What is typed beside a checkpoint wins, or is refused


def test_data_settings_typed_beside_a_checkpoint_win(convnet: Path, mnist_dir: str) -> None:
    mnist = ("--data.source", "mnist", "--data.data_dir", mnist_dir, "--data.val_size", 0.1)
    out = command("test", "--ckpt_path", "best", "--pictures", "false", *mnist)
    assert "on MNIST's 200 test images" in out
    out = command("validate", "--ckpt_path", "best", "--pictures", "false", "--data.val_size", 1000)
    assert "on the 24 validation images" in out
    Path("c.yaml").write_text(f"data: {{init_args: {{source: mnist, data_dir: {mnist_dir}, val_size: 0.1}}}}")
    out = command("test", "--ckpt_path", "best", "--config", "c.yaml", "--pictures", "false")
    assert "on MNIST's 200 test images" in out


def test_checkpoints_settings_are_used_not_the_defaults() -> None:
    settings = ("--data.batch_size", 16, "--data.split_seed", 3, "--model.optimizer", "Adam")
    command("fit", *SHORT, *settings, "--trainer.max_epochs", 1)
    again = built("predict", "--ckpt_path", "last", "--data.batch_size", 7)
    assert (again.datamodule.hparams["batch_size"], again.datamodule.hparams["split_seed"]) == (7, 3)
    assert again.datamodule.hparams["source"] == "digits"
    assert again.config["predict"]["model"]["init_args"]["optimizer"]["class_path"] == "torch.optim.Adam"


def test_image_size_typed_beside_a_checkpoint_wins_and_weights_are_refused(resnet: Path) -> None:
    settings = ("--ckpt_path", "best", "--model.image_size", 40, "--trainer.limit_test_batches", 2)
    assert built("test", *settings).model.image_size == 40
    message = refused("test", "--ckpt_path", "best", "--model.weights", "none")
    assert re.search(r"--model\.weights as in the checkpoint: .*weights\.pth got none leave it out", message)


# ---- TensorBoard


def test_tensorboard_gets_the_tags_of_the_design_and_the_numbers_that_were_printed(
    convnet: Path, convnet_fit: Fit
) -> None:
    tags = set(events(convnet).Tags()["scalars"])
    assert tags >= {"train/loss", "train/acc", "val/loss", "val/acc", "test/loss", "test/acc", "lr-SGD"}
    assert not {tag for tag in tags if "hp_metric" in tag}
    for tag in ("train/loss", "train/acc", "val/loss", "val/acc"):
        assert [f"{value:.4f}" for value in points(convnet, tag)] == re.findall(rf"{tag} (\S+)", convnet_fit.out)
    assert [f"{100 * value:.2f}" for value in points(convnet, "test/acc")] == [accuracy(convnet_fit.out)]
    assert 0.0 not in [value for tag in tags if "/" in tag for value in points(convnet, tag)]


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


@pytest.mark.slow
def test_new_process_finds_the_best_checkpoint(convnet: Path, convnet_fit: Fit) -> None:
    ended = process("test", "--ckpt_path", "best")
    assert ended.returncode == 0
    assert accuracy(ended.stdout) == accuracy(convnet_fit.out)
    assert "Warning" not in ended.stderr
