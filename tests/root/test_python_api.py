"""The package from Python, without the command line: with a plain lightning.Trainer, as the README shows it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_project.data import Odd
from lightning.pytorch import Trainer
from torchvision.models import resnet18

import mnist_lightning
from mnist_lightning.classifier import DigitClassifier
from mnist_lightning.commands.cli import run
from mnist_lightning.convnet import ConvNet
from mnist_lightning.data import MNISTDataModule
from mnist_lightning.errors import UserError
from mnist_lightning.photos import ImageFolder, Photos
from mnist_lightning.photos.classify import load_model
from mnist_lightning.resnet import ResNet18

pytestmark = pytest.mark.usefixtures("folder")


def test_package_gives_its_names() -> None:
    given = {name: getattr(mnist_lightning, name) for name in mnist_lightning.__all__}
    classes = (ConvNet, DigitClassifier, ImageFolder, MNISTDataModule, Photos, ResNet18)
    assert given == {"load_model": load_model} | {cls.__name__: cls for cls in classes}
    with pytest.raises(AttributeError, match="has no attribute 'ConvNets'"):
        mnist_lightning.ConvNets


def test_five_lines_train_and_test_and_the_command_line_reads_their_checkpoint(
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = ConvNet()
    data = MNISTDataModule(source="digits")
    trainer = Trainer(max_epochs=1, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False)
    trainer.fit(model, data)
    (results,) = trainer.test(model, data)
    assert results["test/acc"] > 0.2  # 0.1 by chance
    capsys.readouterr()
    assert run(["test", "--ckpt_path", trainer.checkpoint_callback.best_model_path]) == 0
    assert f"Test accuracy  {100 * results['test/acc']:.2f} % on the 360 test images" in capsys.readouterr().out


def test_resnet18_trains_with_a_plain_trainer_and_its_file_of_weights_may_go(quiet: Callable) -> None:
    torch.save(resnet18().state_dict(), "weights.pth")
    model = ResNet18(weights=Path("weights.pth"), image_size=28)
    data = MNISTDataModule(source="digits", data_dir=Path("data"), batch_size=64)
    trainer = quiet(max_epochs=1, limit_train_batches=2, limit_test_batches=1)
    trainer.fit(model, data)
    Path("weights.pth").unlink()
    trainer.save_checkpoint("resnet.ckpt")
    settings = torch.load("resnet.ckpt", weights_only=True)  # the two Paths are plain strings there
    names = settings["hyper_parameters"]["weights"], settings["datamodule_hyper_parameters"]["data_dir"]
    assert names == ("weights.pth", "data")
    (results,) = trainer.test(model, data, verbose=False)
    (again,) = trainer.test(load_model("resnet.ckpt"), data, verbose=False)
    assert again == pytest.approx(results, rel=1e-4)


@pytest.mark.parametrize("data", ["loaders", "a datamodule"])
@pytest.mark.filterwarnings("ignore")  # Lightning's, of the same loader for training and validation
def test_data_of_ones_own_trains_it_too(data: str, quiet: Callable) -> None:
    model, own = ConvNet(), Odd()
    trainer = quiet(max_epochs=1)
    trainer.fit(model, *((own.loader(), own.loader()) if data == "loaders" else (own,)))
    assert trainer.global_step == 5
    assert trainer.callback_metrics["val/acc"] > 0
    (results,) = trainer.test(model, own, verbose=False)
    assert results["test/acc"] == pytest.approx(trainer.callback_metrics["test/acc"].item())
    trainer.save_checkpoint("own.ckpt")
    assert run(["test", "--ckpt_path", "own.ckpt", "--data.source", "digits"]) == 0


def test_fits_in_one_process_dont_disturb_one_another(quiet: Callable) -> None:
    data = MNISTDataModule(source="digits", batch_size=16, train_size=160, val_size=400)
    states, losses = [], []
    for _ in range(2):
        torch.manual_seed(0)
        model = ConvNet()
        quiet(max_epochs=1).fit(model, data)
        states.append({name: value.clone() for name, value in model.state_dict().items()})
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    for _ in range(2):
        trainer = quiet(max_epochs=1)
        trainer.fit(model, data)  # the same model goes on
        losses.append(trainer.callback_metrics["train/loss"])
    assert losses[1] < losses[0]


@pytest.mark.parametrize("model", [ConvNet, lambda: ResNet18("none", 28)], ids=["ConvNet", "ResNet18"])
def test_validate_test_predict_and_fit_follow_each_other_in_any_order(model: Callable, quiet: Callable) -> None:
    data, network = MNISTDataModule(source="digits"), model()
    trainer = quiet(max_epochs=1, limit_train_batches=2, limit_predict_batches=1, num_sanity_val_steps=2)
    if isinstance(network, ResNet18):
        network.load_pretrained()
    for command in ("validate", "predict", "test", "fit", "validate", "fit", "test"):
        getattr(trainer, command)(network, datamodule=data)


@pytest.mark.parametrize(("content", "got"), [
    ({"state_dict": {}, "class_path": "mnist_lightning.gone.Model"}, "some.ckpt, of mnist_.*gone.Model: No module"),
    ({"state_dict": {}, "class_path": "torch.nn.Linear"}, "is no DigitClassifier"),
])  # fmt: skip
def test_load_model_explains_what_it_cannot_load(content: Any, got: str) -> None:
    torch.save(content, "some.ckpt")
    with pytest.raises(UserError, match=got):
        load_model("some.ckpt")


@pytest.mark.parametrize(("build", "message"), [
    (lambda: MNISTDataModule("fashion"), "expected a source: auto, mnist or digits\ngot 'fashion'"),
    (lambda: ResNet18(trainable_layers=9), "expected trainable_layers from 0 to 5\ngot 9"),
])  # fmt: skip
def test_source_and_layers_that_are_none_are_refused_from_python_too(build: Callable, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build()
