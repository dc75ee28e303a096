"""validate and test: a checkpoint alone is enough; where the results go; on which images an accuracy was measured."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from running import ON_640, THE_DIGITS, Fit, accuracy, command, files, last, points, printed_config, refused, run
from torchvision.models import resnet18

from mnist_lightning import ImageFolder, ResNet18
from mnist_lightning.commands.evaluate import say_results

QUICK = ("--pictures", "false")

pytestmark = pytest.mark.usefixtures("folder")


def test_test_gives_the_accuracy_that_fit_printed(convnet: Path, convnet_fit: Fit) -> None:
    out = command("test", "--ckpt_path", "best", *QUICK)
    assert out == "".join(convnet_fit.out.splitlines(keepends=True)[-4:-2])


def test_validate_gives_the_accuracy_that_the_epoch_had(convnet: Path) -> None:
    out = command("validate", "--ckpt_path", "last", *QUICK)
    assert accuracy(out) == f"{100 * points(convnet, 'val/acc')[1]:.2f}"
    assert "on the 120 validation images of scikit-learn's digits, not MNIST" in out


def test_pictures_are_split_and_tested_as_in_their_fit(pictures: Path, pictures_fit: Fit) -> None:
    (line,) = re.findall("^Test accuracy .*$", pictures_fit.out, re.MULTILINE)
    assert command("test", "--ckpt_path", "best", *QUICK).splitlines() == [line, f"Run            {pictures}"]


def test_whatever_else_a_model_measures_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    for results in ({"test/acc": 0.5, "test/loss": 1.0, "test/f1": 0.25}, {"test/loss": 1.0}, {}):
        say_results(results, "test", "9 images")
    said = "Test accuracy  50.00 % on 9 images\nTest           test/f1 0.2500\n"
    assert capsys.readouterr().out == f"{said}Test           test/loss 1.0000\nTest           not measured\n"


class Mine(ImageFolder):
    """A class of its own, as a person may write one."""


def test_pictures_are_read_in_the_size_of_the_model_whatever_class_read_them_in_training(
    pictures: Path, quiet: Callable[..., Trainer], capsys: pytest.CaptureFixture[str]
) -> None:
    mine = ("--data", f"{__name__}.Mine", "--data.path", "photos", "--data.size", 32, "--model.weights", "none")
    command("fit", "--model", "ResNet18", *mine, "--trainer.max_epochs", 1, "--pictures", "false")
    for data in ("ImageFolder", "mnist_lightning.ImageFolder"):
        config = printed_config(capsys, "predict", "--ckpt_path", "best", "--data", data, "--data.path", "photos")
        assert config["data"]["init_args"]["size"] == 32
    trainer = quiet(max_steps=1)
    trainer.fit(ResNet18(weights="none", num_classes=2), ImageFolder("photos", size=40))
    trainer.save_checkpoint("python.ckpt")
    capsys.readouterr()
    config = printed_config(capsys, "test", "--ckpt_path", "python.ckpt", "--data.path", "photos")
    assert config["data"]["init_args"]["size"] == 40


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
    out = command(name, "--ckpt_path", "downloads/mine.ckpt", *QUICK)
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
    out = command("test", "--ckpt_path", "best", "--trainer.default_root_dir", "runs", *QUICK)
    assert "Run            runs/lightning_logs/ConvNet-digits/version_0" in out


@pytest.mark.parametrize(("typed", "said"), [
    ("--trainer.limit_test_batches 0.5", f"on a part of {THE_DIGITS}"),
    ("--trainer.limit_test_batches 1", f"on a part of {THE_DIGITS}"),
    ("--data foreign_project.data.Odd --data.kind stream", "on the test images of Odd"),
    ("--data foreign_project.data.Named --trainer.limit_test_batches 1", "on a part of the test images of Named"),
])  # fmt: skip
def test_part_of_the_test_images_is_called_a_part(typed: str, said: str, convnet: Path) -> None:
    assert said in command("test", "--ckpt_path", "best", *QUICK, *typed.split())
