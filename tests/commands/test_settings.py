"""Settings: of a config file, of a checkpoint, as they are typed; what is typed overrides, or is refused."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from running import (
    CONFIGS,
    DIGITS,
    RUN,
    SHORT,
    THE_DIGITS,
    Few,
    command,
    files,
    last,
    loaded,
    printed_config,
    refused,
)
from torch.optim import Adam

from mnist_lightning import ConvNet, load_model

QUICK = ("--pictures", "false")

pytestmark = pytest.mark.usefixtures("folder")


# ---- Config files


def test_print_config_is_a_config_for_every_command(convnet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = printed_config(capsys, "fit", "--model", "ResNet18", "--model.image_size", 32, "--data.source", "digits")
    Path("c.yaml").write_text(yaml.safe_dump(first))
    assert printed_config(capsys, "fit", "--config", "c.yaml") == first
    assert first["model"]["init_args"]["image_size"] == 32
    Path("c.yaml").write_text(yaml.safe_dump(printed_config(capsys, "fit", *DIGITS)))
    assert THE_DIGITS in command("test", "--ckpt_path", "best", "--config", "c.yaml")


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


# ---- Checkpoints. What is refused beside one is in test_refusals.py


def test_data_settings_typed_beside_a_checkpoint_win(convnet: Path, mnist_dir: str) -> None:
    mnist = ("--data.source", "mnist", "--data.data_dir", mnist_dir, "--data.val_size", 0.1)
    assert "on MNIST's 200 test images" in command("test", "--ckpt_path", "best", *QUICK, *mnist)
    out = command("validate", "--ckpt_path", "best", *QUICK, "--data.val_size", 1000)
    assert "on the 24 validation images" in out
    Path("c.yaml").write_text(f"data: {{init_args: {{source: mnist, data_dir: {mnist_dir}, val_size: 0.1}}}}")
    assert "on MNIST's 200 test images" in command("test", "--ckpt_path", "best", "--config", "c.yaml", *QUICK)


def test_checkpoints_settings_are_used_not_the_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    settings = ("--data.batch_size", 16, "--data.split_seed", 3, "--model.optimizer", "Adam")
    command("fit", *SHORT, *settings, "--trainer.max_epochs", 1)
    again = printed_config(capsys, "predict", "--ckpt_path", "last", "--data.batch_size", 7)
    used = {name: again["data"]["init_args"][name] for name in ("batch_size", "split_seed", "source")}
    assert used == {"batch_size": 7, "split_seed": 3, "source": "digits"}
    assert again["model"]["init_args"]["optimizer"]["class_path"] == "torch.optim.Adam"


def test_image_size_typed_beside_a_checkpoint_wins(resnet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = printed_config(capsys, "test", "--ckpt_path", "best", "--model.image_size", 40)
    assert config["model"]["init_args"]["image_size"] == 40


@pytest.mark.parametrize("by", ["a path from inside", "a link", "a copy"])
def test_settings_of_a_run_hold_however_its_checkpoint_is_named(
    by: str, convnet: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its Trainer's, too: it ends after 2 epochs, not 10. The files are where the run is; a copy starts a new one."""
    (folder / "elsewhere").mkdir()
    checkpoint = folder / convnet / "checkpoints" / "last.ckpt"
    monkeypatch.chdir(checkpoint.parent if by == "a path from inside" else folder / "elsewhere")
    if by == "a link":
        Path("last.ckpt").symlink_to(checkpoint)
    elif by == "a copy":
        shutil.copy(checkpoint, "last.ckpt")
    before = files(folder)
    assert "This run had already ended, at step 42" in command("fit", "--ckpt_path", "last.ckpt", *QUICK)
    run = folder / "elsewhere" / RUN if by == "a copy" else folder / convnet
    new = {folder / path for path in files(folder) - before}
    assert new and all(run in path.parents for path in new)


@pytest.mark.filterwarnings(r"ignore:\s*Unable to serialize instance")
def test_optimizer_that_the_command_line_cannot_write_down_comes_back_with_its_class() -> None:
    command("fit", "--model", "foreign_project.models.Unannotated", *SHORT, "--trainer.max_epochs", 1)
    command("validate", "--ckpt_path", "last", *QUICK)
    command("fit", "--ckpt_path", "last", "--trainer.max_epochs", 2, *QUICK)
    (path,) = Path("lightning_logs").rglob("last.ckpt")
    assert loaded(path)["optimizer_states"][0]["param_groups"][0]["lr"] == 0.002
    assert load_model(path).optimizer([torch.nn.Parameter(torch.zeros(1))]).param_groups[0]["lr"] == 0.002


def test_run_from_python_with_an_optimizer_of_its_own_is_not_resumed_with_the_default_one(quiet: Any) -> None:
    trainer = quiet(max_epochs=1)
    trainer.fit(ConvNet(optimizer=lambda params: Adam(params)), Few())
    trainer.save_checkpoint("adam.ckpt")
    said = refused("fit", "--ckpt_path", "adam.ckpt", "--trainer.max_epochs", 2, "--data", "running.Few")
    assert "optimizer" in said and "from Python" in said


@pytest.mark.filterwarnings("ignore")  # Lightning's, of the same loader for training and validation
def test_folder_that_the_data_moved_to_is_taken_and_none_other() -> None:
    rooted = ("--data", "foreign_project.data.Rooted", "--data.root")
    command("fit", *rooted, "here", *QUICK, "--trainer.max_epochs", 1)
    Path("there").mkdir()
    command("fit", "--ckpt_path", "last", "--data.root", "there", "--trainer.max_epochs", 2)
    assert last(Path("lightning_logs", "ConvNet", "version_0"))["epoch"] == 1
    message = refused("fit", "--ckpt_path", "last", "--data.root", "elsewhere")
    assert "--data.root as in the checkpoint: there got elsewhere" in message


@pytest.mark.parametrize("val_size", [0, 0.2, 5000])
def test_val_size_in_config_yaml_is_the_one_that_was_typed(val_size: float, folder: Path) -> None:
    command("fit", *SHORT, "--data.val_size", val_size, "--trainer.max_epochs", 1)
    for _ in range(2):
        written = yaml.safe_load((RUN / "config.yaml").read_text())["data"]["init_args"]["val_size"]
        assert (written, type(written)) == (val_size, type(val_size))
        shutil.move(RUN / "config.yaml", "c.yaml")
        shutil.rmtree("lightning_logs")
        command("fit", "--config", "c.yaml")
