"""Parser: LightningCLI's, with errors that can be explained, and classes that start from their own defaults."""

import importlib
import inspect
import re
from collections.abc import Iterable
from enum import Enum
from typing import Any

import jsonargparse._typehints  # see forget_arguments
import torch
import yaml
from jsonargparse import Namespace, get_loader, set_loader
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.tuner import Tuner

from mnist_lightning.convnet import ConvNet
from mnist_lightning.data import MNISTDataModule
from mnist_lightning.photos import ImageFolder, Photos
from mnist_lightning.resnet import ResNet18

CLASSES: dict[str, tuple[type, list[type]]] = {  # that are known by their short names
    "model": (LightningModule, [ConvNet, ResNet18]),
    "data": (LightningDataModule, [MNISTDataModule, ImageFolder, Photos]),
}


class ParserError(ValueError):
    """A parser's report. Parsers are nested, and the outer one reads the inner one's: only the last is explained."""


class Parser(LightningArgumentParser):
    """Takes no abbreviated options, and raises instead of printing 45 lines."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> Any:
        raise ParserError(message) from ex


class CommandTrainer(Trainer):
    """Lightning's Trainer, with a method for each subcommand, and limits that are read as typed: 1 is one batch, 1.0 is
    all of them.

    Lightning's Optional[Union[int, float]] comes from a cache of typing, which gives the order that anybody in the
    process asked for first, and jsonargparse takes the first type that fits. `int | float | None` isn't cached.

    Args:
        limit_train_batches: how many training batches an epoch has, or which share of them.
        limit_val_batches: how many validation batches, or which share of them.
        limit_test_batches: how many test batches, or which share of them.
        limit_predict_batches: how many batches to predict, or which share of them.
    """

    def __init__(
        self,
        *,
        limit_train_batches: int | float | None = None,
        limit_val_batches: int | float | None = None,
        limit_test_batches: int | float | None = None,
        limit_predict_batches: int | float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            limit_train_batches=limit_train_batches,
            limit_val_batches=limit_val_batches,
            limit_test_batches=limit_test_batches,
            limit_predict_batches=limit_predict_batches,
            **kwargs,
        )

    def lr_find(self, model: LightningModule, datamodule: LightningDataModule, ckpt_path: str | None = None) -> Any:
        """Look for a learning rate in a hundred steps of growing ones (arXiv:1506.01186); nothing is trained.

        Args:
            ckpt_path: taken by no search: config files of other commands have it.
        """
        return Tuner(self).lr_find(model, datamodule=datamodule, update_attr=False)


def forget_arguments(parser_or_action: Any, before: Any, now: Any) -> None:
    """Where another class is named, drops the arguments of the one before.

    jsonargparse carries over those that the new class takes as well: ConvNet's learning rate to ResNet18, SGD's to
    AdamW, MNISTDataModule's batch size to a datamodule of one's own. It has no setting for that.
    """
    if not before or "init_args" not in before or before["class_path"] == now["class_path"]:
        return
    if class_of(before["class_path"]) is not class_of(now["class_path"]):
        before["init_args"] = Namespace()
        if "init_args" not in now:
            now["init_args"] = Namespace()


jsonargparse._typehints.discard_init_args_on_class_path_change = forget_arguments


def in_full_names(text: str) -> str:
    """ReduceLROnPlateau by the path of Lightning's class, which knows the metric to watch: torch has one of that name,
    too, and jsonargparse would refuse to choose."""
    return re.sub(r"(?<![\w.])ReduceLROnPlateau(?!\w)", "lightning.pytorch.cli.ReduceLROnPlateau", text)


load_yaml = get_loader("yaml")
# Timer's default interval is an Enum, which PyYAML wouldn't write into a config file.
yaml.SafeDumper.add_multi_representer(Enum, lambda dumper, member: dumper.represent_data(member.value))
set_loader("yaml", lambda text: load_yaml(in_full_names(text)), (yaml.YAMLError,))  # a config file's text


def class_of(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def option_names(parser: LightningArgumentParser) -> list[str]:
    return [option for action in parser._actions for option in action.option_strings]


def options_of(parsers: Iterable[LightningArgumentParser], words: list[str]) -> dict[str, str]:
    """Every option that exists, and the class that it belongs to; those of the classes that are typed as well."""
    owners: dict[str, str] = {}
    named = [cls for cls in map(class_named, words) if inspect.isclass(cls)]
    for key, (base, classes) in CLASSES.items():
        for cls in [*classes, *(cls for cls in named if issubclass(cls, base))]:
            more = {f"--{key}.{name}": cls.__name__ for name in inspect.signature(cls).parameters}
            owners = more | owners  # of two classes that have it, the first is named
    return {option: "" for parser in parsers for option in option_names(parser)} | owners


def class_named(word: str) -> Any:
    """The class that a word of the command line names by its path, as `mine.Net` or `--model=mine.Net`; else None."""
    path = re.fullmatch(r"(?:--.*=)?([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+)", word)
    try:
        return class_of(path[1]) if path else None
    except (ImportError, AttributeError):
        return None


def class_choices() -> dict[str, list[str]]:
    names = {key: [cls.__name__ for cls in classes] for key, (_, classes) in CLASSES.items()}
    return names | {"model.optimizer": dir(torch.optim), "model.scheduler": dir(torch.optim.lr_scheduler)}
