"""Settings: of a config file, of a checkpoint, as they are typed; what is typed overrides, or is refused."""

import shutil
import sys
from collections.abc import Iterator
from contextlib import suppress
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
    run,
)
from torch.optim import Adam

from mnist_lightning import ConvNet, load_model
from mnist_lightning.errors import UserError

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


@pytest.mark.parametrize("config_first", [True, False])
def test_value_typed_beside_a_config_wins_wherever_it_stands(
    config_first: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--data.batch_size", 7, "--trainer.max_epochs=3", "--model.optimizer.lr", 0.5]
    file = ["--config", CONFIGS / "convnet.yaml"]
    config = printed_config(capsys, "fit", *(file + given if config_first else given + file))
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


# ---- Checkpoints from elsewhere: whoever wrote them may name any function


TRAP = """
import pathlib
pathlib.Path("sprung").touch()  # whoever imports this module has been caught
from mnist_lightning import ConvNet as Net, MNISTDataModule as Data
from torch.optim import SGD as Optimizer
from lightning.pytorch.callbacks import Timer as Watch
from lightning.pytorch.strategies import SingleDeviceStrategy as Strategy
def function(*args, **kwargs): pathlib.Path("sprung").touch()
"""


@pytest.fixture
def trap(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    Path("trap.py").write_text(TRAP)
    monkeypatch.syspath_prepend(Path.cwd())
    yield
    sys.modules.pop("trap", None)


def edited(run_folder: Path, path: Path, key: str, value: Any) -> dict[str, Any]:
    """Writes the run's last checkpoint to `path`, with one of its settings changed; returns the settings."""
    content = loaded(run_folder / "checkpoints" / "last.ckpt")
    *outer, last_key = key.split(".")
    place = content["mnist_lightning"]
    for name in outer:
        place = place[name]
    place[last_key] = value
    torch.save(content, path)
    return content["mnist_lightning"]


ELSEWHERE = {"dirpath": "elsewhere", "every_n_train_steps": 1}
TRAPS = [
    ("trainer.callbacks", [{"class_path": "trap.Watch"}]),
    ("trainer.callbacks", "trap.Watch"),
    ("trainer.callbacks", [{"class_path": "LambdaCallback", "init_args": {"on_train_start": "trap.function"}}]),
    ("trainer.callbacks", [{"class_path": "ModelCheckpoint", "init_args": ELSEWHERE}]),
    ("trainer.logger", {"class_path": "CSVLogger", "init_args": {"save_dir": "elsewhere"}}),
    ("trainer.profiler", {"class_path": "SimpleProfiler", "init_args": {"dirpath": "elsewhere", "filename": "a"}}),
    ("trainer.plugins", [{"class_path": "trap.Watch"}]),
    ("trainer.strategy", "trap.Strategy"),
    ("trainer.strategy", {"class_path": "trap.Strategy"}),
    ("data.class_path", "trap.Data"),
    ("model.class_path", "trap.Net"),
    ("data.class_path", "lightning.pytorch.demos.mnist_datamodule.MNISTDataModule"),  # would download
    ("model.init_args.optimizer", {"class_path": "trap.Optimizer", "init_args": {"lr": 0.1}}),
    ("model.init_args.optimizer", "trap.function"),
    ("model.init_args.scheduler", {"class_path": "trap.function"}),
    ("model.init_args.optimizer", {"class_path": "torch.hub.load", "init_args": {"repo_or_dir": "a/b", "model": "c"}}),
    ("data.init_args.data_dir", "elsewhere"),
    ("data.init_args.mirrors", ["http://127.0.0.1:1"]),
]


@pytest.mark.parametrize(("key", "value"), TRAPS, ids=str)
@pytest.mark.parametrize("name", ["fit", "test"])
def test_what_a_strangers_checkpoint_names_is_left_out_and_said(
    name: str, key: str, value: Any, convnet: Path, trap: None, capsys: pytest.CaptureFixture[str]
) -> None:
    edited(convnet, Path("stranger.ckpt"), key, value)
    longer = ("--trainer.max_epochs", "3", "--trainer.limit_train_batches", "1", "--trainer.default_root_dir", "mine")
    code = run([name, "--ckpt_path", "stranger.ckpt", *QUICK, *(longer if name == "fit" else ())])
    out, error = capsys.readouterr()
    assert not Path("sprung").exists() and not Path("elsewhere").exists() and "Error" not in error
    if name == "fit" or not key.startswith("trainer"):
        assert "Not taken from stranger.ckpt, for it isn't its run's" in out
    assert code in (0, 2)


def test_module_of_a_strangers_checkpoint_is_not_the_files_own_name(convnet: Path, trap: None) -> None:
    edited(convnet, Path("trap.ckpt"), "model.class_path", "trap.Net")
    assert "if you trust the file, name its class: --model trap.Net." in refused("test", "--ckpt_path", "trap.ckpt")
    assert not Path("sprung").exists()


def test_class_that_a_config_file_names_is_taken(convnet: Path, trap: None) -> None:
    edited(convnet, Path("stranger.ckpt"), "model.class_path", "trap.Net")
    Path("own.yaml").write_text("model: trap.Net\n")
    assert "Not taken" not in command("test", "--ckpt_path", "stranger.ckpt", "--config", "own.yaml", *QUICK)


@pytest.mark.parametrize("name", ["fit", "test"])
def test_class_that_is_typed_is_taken_from_a_strangers_checkpoint(name: str, convnet: Path, trap: None) -> None:
    edited(convnet, Path("stranger.ckpt"), "model.class_path", "trap.Net")
    assert run([name, "--ckpt_path", "stranger.ckpt", "--model", "trap.Net", *QUICK]) == 0
    assert Path("sprung").exists()


def test_runs_own_checkpoint_brings_its_classes(convnet: Path, trap: None) -> None:
    """Found as best or last, or beside a config.yaml that says the same; not beside one that says otherwise."""
    path = convnet / "checkpoints" / "last.ckpt"
    settings = edited(convnet, path, "trainer.callbacks", [{"class_path": "trap.Watch"}])
    command("fit", "--ckpt_path", path, "--trainer.max_epochs", 3, "--trainer.limit_train_batches", 1, *QUICK)
    assert not Path("sprung").exists()
    edited(convnet, path, "trainer.callbacks", [{"class_path": "trap.Watch"}])
    (convnet / "config.yaml").write_text(yaml.safe_dump(settings))
    command("fit", "--ckpt_path", path, "--trainer.max_epochs", 4, "--trainer.limit_train_batches", 1, *QUICK)
    assert Path("sprung").exists()


LIGHTNINGS = {
    "_instantiator": "lightning.pytorch.cli.instantiate_module", "_class_path": "mnist_lightning.convnet.ConvNet"
}  # fmt: skip


@pytest.mark.parametrize("read", [
    load_model, lambda path: run(["export", "--ckpt_path", path, "--output", "a.pt2"]),
], ids=["load_model", "export"])  # fmt: skip
@pytest.mark.parametrize("edit", [
    {"class_path": "trap.Net"}, {"hyper_parameters": {"_instantiator": "trap.function", "_class_path": "trap.Net"}},
    {"hyper_parameters": {"optimizer": "trap.function"}},
    {"hyper_parameters": {**LIGHTNINGS, "optimizer": {"class_path": "trap.Optimizer"}}},
    {"hyper_parameters": {**LIGHTNINGS, "optimizer": "trap.function"}},
])  # fmt: skip
def test_model_of_a_strangers_checkpoint_imports_nothing(read: Any, edit: Any, convnet: Path, trap: None) -> None:
    content = loaded(convnet / "checkpoints" / "last.ckpt")
    torch.save({**content, **edit}, "stranger.ckpt")
    with suppress(UserError):
        read("stranger.ckpt")
    assert not Path("sprung").exists()
