"""The parser: classes by short names, with defaults of their own; what it knows of jsonargparse and Lightning."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningCLI
from running import CONFIGS, printed_config

from mnist_lightning import ConvNet, MNISTDataModule
from mnist_lightning.commands.parser import Parser, option_names

pytestmark = pytest.mark.usefixtures("folder")


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


CARRIES_OVER = """
from jsonargparse import ArgumentParser
class Default:
    def __init__(self, size: int = 64): pass
class Own(Default):
    def __init__(self, size: int = 8): pass
parser = ArgumentParser()
parser.add_subclass_arguments(Default, "data")
parser.set_defaults({"data": {"class_path": "__main__.Default"}})
print(parser.parse_args(["--data", "__main__.Own"]).data.init_args.size)
"""


def test_jsonargparse_gives_a_class_the_arguments_of_the_one_before() -> None:
    """In a process where nothing has replaced its function. If it stops doing so, `forget_arguments` can go."""
    command = [sys.executable, "-W", "ignore", "-c", CARRIES_OVER]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "64\n"


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


def test_one_is_one_batch_whatever_order_lightnings_types_are_in(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for part in ("train", "val", "test", "predict"):
        monkeypatch.setitem(Trainer.__init__.__annotations__, f"limit_{part}_batches", float | int | None)
    limits = [f"--trainer.limit_{part}_batches=1" for part in ("train", "val", "test", "predict")]
    trainer = printed_config(capsys, "fit", *limits, "--trainer.limit_val_batches=1.0")["trainer"]
    values = [trainer[f"limit_{part}_batches"] for part in ("train", "val", "test", "predict")]
    assert [(type(value), value) for value in values] == [(int, 1), (float, 1.0), (int, 1), (int, 1)]


def test_parser_lists_its_options() -> None:
    """Of nested groups too; jsonargparse has no public way to ask for them."""
    parser = Parser()
    parser.add_lightning_class_args(MNISTDataModule, "data")
    assert {"--help", "--data.batch_size", "--data.val_size"} <= set(option_names(parser))


def test_lightnings_command_line_lets_the_checkpoint_win_over_what_is_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If it stops doing so, the override of `_parse_ckpt_path` can go."""

    class ParsesOnly(LightningCLI):
        def before_instantiate_classes(self) -> None:
            raise RuntimeError(f"label_smoothing {self.config.test.model.label_smoothing}")

    monkeypatch.setattr(sys, "argv", ["test"])
    checkpoint = tmp_path / "some.ckpt"
    torch.save({"hyper_parameters": {"label_smoothing": 0.1}}, checkpoint)
    typed = ["test", "--model.label_smoothing", "0.2", "--ckpt_path", str(checkpoint)]
    with pytest.raises(RuntimeError, match="^label_smoothing 0.1$"):
        ParsesOnly(ConvNet, MNISTDataModule, args=typed, auto_configure_optimizers=False, seed_everything_default=0)
