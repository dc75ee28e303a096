"""Command: what fit, validate, test, predict and lr_find share: the Trainer's loggers, plugins and callbacks."""

from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelPruning, ModelSummary, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.plugins.io import CheckpointIO

from mnist_lightning.commands.settings import without_instances
from mnist_lightning.loader import ImagesDataModule
from mnist_lightning.runs.checkpoints import WholeCheckpointIO
from mnist_lightning.runs.checks import Checks
from mnist_lightning.runs.console import ParameterCount, progress
from mnist_lightning.runs.saved import Saved


class Command:
    """A command of the Trainer: settled once all is parsed, built once model and data are, then called.

    Args:
        name: of the subcommand, as it was typed.
        settings: what is typed, before what config files say, what the checkpoint says, and the defaults.
        saved: the checkpoint that is named.
        saved_settings: what the checkpoint says of its run.
        parser: the subcommand's, which writes settings as plain values.
        opened: what is closed when the command ends, however it does.
    """

    stage: str  # as Lightning's setup(stage) has it
    trains = False  # starts without a checkpoint; with one it goes on with its run
    measures = False  # and logs what it measured
    needs_labels = True
    alone = False  # takes no checkpoint, and none of the settings that say how long to train

    def __init__(
        self,
        name: str,
        settings: Any,
        saved: Saved | None,
        saved_settings: dict[str, Any],
        parser: LightningArgumentParser,
        opened: ExitStack,
    ) -> None:
        self.name, self.settings, self.saved, self.saved_settings = name, settings, saved, saved_settings
        self.parser, self.opened = parser, opened
        self.results: dict[str, float] = {}
        self.exit_code = 0

    def settle(self) -> None:
        """Fills in the settings that follow from others."""
        trainer = self.settings.trainer
        if trainer.default_root_dir:
            trainer.default_root_dir = str(Path(trainer.default_root_dir).expanduser())
        if self.saved is not None:
            self.settings.ckpt_path = str(self.saved.path)

    def build(self, model: LightningModule, data: LightningDataModule) -> None:
        """Takes the model and the data, gets what they need, then makes the folder: what fails leaves no trace."""
        self.model, self.data = model, data
        if str(self.settings.trainer.precision) in ("64", "64-true"):
            model.double()  # Lightning does so after it has loaded a checkpoint's weights, and would round them
        if isinstance(data, ImagesDataModule):
            data.setup(self.stage)  # before there is any file

    def __call__(self, trainer: Trainer, **kwargs: Any) -> None:
        """Runs, and prints what came out.

        Args:
            kwargs: what the Trainer's method of that name takes: model, datamodule, ckpt_path.
        """
        raise NotImplementedError

    # The Trainer

    def options(self, given: Any, callbacks: list[Callback]) -> dict[str, Any]:
        """The Trainer's arguments, beside those that were typed.

        Args:
            given: those that were typed, built.
            callbacks: those of this command.
        """
        everything = [*callbacks, *as_list(given["callbacks"])]
        options: dict[str, Any] = {"logger": self.loggers(given["logger"]), "plugins": self.plugins(given["plugins"])}
        if not any(isinstance(callback, ProgressBar) for callback in everything):
            options["enable_progress_bar"] = False
        if not any(isinstance(callback, Checkpoint) for callback in everything):
            options["enable_checkpointing"] = False  # Lightning would add a ModelCheckpoint of its own
        return options

    def logger(self) -> Logger | None:
        """The project's own, for commands that have one."""
        return None

    def loggers(self, wanted: Any) -> Any:
        """The project's own where none is named; beside it those of a list; else what the user says."""
        named = wanted not in (None, True) and not (isinstance(wanted, list) and wanted)
        ours = None if named else self.logger()
        return (wanted or False) if ours is None else [ours, *as_list(wanted)]

    def plugins(self, wanted: Any) -> list[Any]:
        plugins = as_list(wanted)
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins.append(WholeCheckpointIO(self.saved))
        if SLURMEnvironment.detect() and not any(isinstance(plugin, SLURMEnvironment) for plugin in plugins):
            plugins.append(SLURMEnvironment(auto_requeue=False))  # it would resume into a new run; use --ckpt_path last
        return plugins

    def callbacks(self, given: Any) -> list[Callback]:
        """What a command has beside the user's callbacks: the user's own bar and summary replace it."""
        theirs = as_list(given["callbacks"])
        callbacks: list[Callback] = [Checks()]
        if not any(isinstance(callback, ProgressBar) for callback in theirs):
            callbacks.append(progress(given["enable_progress_bar"]))
        summary = given["enable_model_summary"] is not False
        if summary and not any(isinstance(callback, ModelSummary) for callback in theirs):
            callbacks.append(ParameterCount())
        optimizer = self.settings.model.get("init_args", {}).get("optimizer")
        flattens = isinstance(optimizer, Namespace) and optimizer.class_path.endswith(".LBFGS")
        if flattens or any(isinstance(callback, ModelPruning) for callback in theirs):
            self.model.to(memory_format=torch.contiguous_format)  # torch can't flatten channels_last weights for these
        return callbacks

    @cached_property
    def plain_settings(self) -> dict[str, Any]:
        """All that repeats the run, as plain values: for config.yaml, each checkpoint and the dashboard."""
        plain = without_instances(yaml.safe_load(self.parser.dump(self.settings, skip_none=False)))
        return {**plain, "ckpt_path": None}

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """What the model and the data were built with, for the dashboard."""
        named = [self.plain_settings[key].get("init_args") or {} for key in ("data", "model")]
        return {name: value for init_args in named for name, value in init_args.items()}


def as_list(value: Any) -> list[Any]:
    """What may be None, one thing or several, as a list."""
    if value is None or isinstance(value, bool):
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]
