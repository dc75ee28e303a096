"""Saved: a checkpoint's content. Its file is read once, and only this module knows its keys.

Beside Lightning's own keys a checkpoint holds `class_path` (which a DigitClassifier writes itself), and of a run by the
command line `mnist_lightning`, its settings, `example_input`, `class_names`, and what `Progress` says.
"""

import importlib
import io
import math
import os
import re
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from lightning.pytorch import Callback
from torch import Tensor

from mnist_lightning.classifier import DigitClassifier
from mnist_lightning.errors import UserError
from mnist_lightning.files import load_safely
from mnist_lightning.runs.classes import names_or_numbers
from mnist_lightning.runs.folder import run_of

REMEDY = "give --ckpt_path best, last or another file."
EXPECTED = "a checkpoint of this project"
KNOWN = ("mnist_lightning.", "lightning.", "torch.", "torchvision.")  # whose classes any file may name
BUILT = ("callbacks", "logger", "plugins", "profiler", "strategy")  # settings of the Trainer that may be classes
CODE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")  # the path of a class or a function
PATHS = ("_instantiator", "_class_path", "weights")  # hyperparameters that look like one: Lightning's own, and a file
LARGEST_IMAGE = 2**26  # numbers in one image of a checkpoint's example


class Example(NamedTuple):
    """What one image was like that the model was trained on."""

    shape: tuple[int, ...]
    dtype: str  # as "uint8"

    def __str__(self) -> str:
        return f"{self.dtype} (B, {', '.join(map(str, self.shape))})"

    def plain(self) -> dict[str, Any]:
        """As a checkpoint holds it."""
        return {"shape": list(self.shape), "dtype": self.dtype}

    @property
    def torch_dtype(self) -> torch.dtype:
        return vars(torch)[self.dtype]

    @property
    def is_square_in_colour(self) -> bool:
        """As ImageFolder gives pictures: uint8 (3, S, S)."""
        return self.dtype == "uint8" and self.shape == (3, *self.shape[-1:] * 2)


MNIST_EXAMPLE = Example((1, 28, 28), "uint8")


class Saved:
    """A checkpoint of this project, read without running anything in it.

    Args:
        path: the file.

    Raises:
        UserError: there is no such file, it is damaged, or it isn't a checkpoint of this project.

    Attributes:
        path: the file.
        content: all that it holds, as Lightning wants it.
        state_dict: the weights.
        settings: of its run, as config.yaml has them; {} if it was trained from Python.
        step: the optimizer steps that were taken before.
        class_path: of the model; None if that is no DigitClassifier.
        class_names: what the classes are called; [] if nobody said.
        example: what images it was trained on.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        content = load_safely(self.path, EXPECTED, REMEDY)
        self.content: dict[str, Any] = content if isinstance(content, dict) else {}
        self.settings = self._get("mnist_lightning", {}, has_classes)
        class_path = self.content.get("class_path")
        self.class_path = class_path if isinstance(class_path, str) else None
        if not (self.settings or self.class_path) or not isinstance(self.content.get("state_dict"), dict):
            raise UserError(EXPECTED, f"{path}, which is something else", REMEDY)
        self.state_dict: dict[str, Any] = self.content["state_dict"]
        self.step: int = self._get("global_step", 0, lambda value: isinstance(value, int))
        names, seen = self._pictures()
        self.class_names: list[str] = self._get("class_names", names, is_list_of_names)
        example = self._get("example_input", seen, is_example)
        self.example = Example(tuple(example["shape"]), example["dtype"])

    @property
    def tells_its_images(self) -> bool:
        """Whether `example` is what was seen in training, not MNIST's form for want of anything better."""
        return bool(self.data_name) or "example_input" in self.content

    @property
    def logged_step(self) -> int:
        """The last step that may have been logged before.

        Raises:
            UserError: somebody has edited what Lightning counts.
        """
        try:
            return int(self.content["loops"]["fit_loop"]["epoch_loop.state_dict"]["_batches_that_stepped"])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError("a checkpoint to go on from", f"{self.path}, without its loops' counts", REMEDY) from error

    @property
    def can_be_resumed(self) -> bool:
        states = self.content.get("optimizer_states")
        return isinstance(states, list) and len(states) > 0

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """Of the model, as it was built."""
        return public(self.content.get("hyper_parameters"))

    @property
    def data_hyperparameters(self) -> dict[str, Any]:
        return public(self.content.get("datamodule_hyper_parameters"))

    @property
    def data_name(self) -> str:
        """The datamodule's class; "" if it is unknown."""
        named = (self.settings.get("data") or {}).get("class_path", "").rpartition(".")[2]
        return named or next((name for name in ("ImageFolder", "MNISTDataModule") if name in self.content), "")

    def is_of_its_run(self, resuming: bool = False) -> bool:
        """Whether it lies in a run's folder whose config.yaml names the same classes; else it may be anybody's.

        Args:
            resuming: whether all that the settings build has to be the same, callbacks and loggers too; else the
                classes of model and data.
        """
        run = run_of(self.path)
        if run is None or not self.settings:
            return False
        try:
            config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            return False
        return has_classes(config) and classes_of(config, resuming) == classes_of(self.settings, resuming)

    def state_of(self, callback: Callback) -> dict[str, Any]:
        """What a callback kept; {} if it kept nothing."""
        return self.content.get("callbacks", {}).get(callback.state_key) or {}

    def names(self, count: int) -> list[str]:
        """A name for each of `count` classes: the checkpoint's, or their numbers."""
        return names_or_numbers(self.class_names, count)

    def model(self) -> DigitClassifier:
        """The model, of the class and with the hyperparameters that it was trained with: on the CPU, in eval mode.

        Raises:
            UserError: it isn't a DigitClassifier, its class isn't to be imported from this file, or has changed since.
        """
        if self.class_path is None:
            got, remedy = f"{self.path}, of another LightningModule", "make its class a DigitClassifier."
            raise UserError("a checkpoint of a DigitClassifier", got, remedy)
        module, _, name = self.class_path.rpartition(".")
        if not (self.class_path.startswith(KNOWN) or module in sys.modules or self.is_of_its_run()):
            remedy = f"leave it in its run's folder; or, if you trust it, import {module} first, from Python."
            raise UserError("a checkpoint of classes that are known here", f"{self.path}, of {self.class_path}", remedy)
        remedy = "install that class's package, or the version of this one that wrote the checkpoint."
        buffer = io.BytesIO()
        torch.save({**self.content, "hyper_parameters": self._trusted_hyperparameters()}, buffer)
        buffer.seek(0)
        try:
            cls = getattr(importlib.import_module(module), name)
            if not issubclass(cls, DigitClassifier):
                raise TypeError(f"{self.class_path} is no DigitClassifier")
            return cls.load_from_checkpoint(buffer, map_location="cpu", weights_only=True).eval()
        except (ImportError, AttributeError, TypeError, ValueError, RuntimeError) as error:  # KeyError: of our own code
            reason = str(error).strip().splitlines()
            got = f"{self.path}, of {self.class_path}: {' '.join(reason[:2])}"
            raise UserError("a checkpoint that fits its class as it is now", got, remedy) from error

    def _trusted_hyperparameters(self) -> dict[str, Any]:
        """Of a file that may be anybody's, those that name no class or function, which Lightning would build."""
        given = self.content.get("hyper_parameters")
        known: dict[str, Any] = given if isinstance(given, dict) else {}
        if "_instantiator" not in known or self.is_of_its_run():
            return known
        taken = {name: value for name, value in known.items() if name in PATHS or not names_code(value)}
        if left_out := sorted(known.keys() - taken):
            print(f"Not taken from {self.path}, for it isn't its run's: {', '.join(left_out)}.")
        return taken

    def _pictures(self) -> tuple[list[str], dict[str, Any]]:
        """The classes and the form of an ImageFolder's pictures, also after a fit from Python; else MNIST's form."""
        state = self.content.get("ImageFolder")
        size: Any = self.data_hyperparameters.get("size")
        names: Any = state.get("class_names") if isinstance(state, dict) else None
        seen = Example((3, size, size), "uint8").plain()
        return (list(names), seen) if is_list_of_names(names) and is_example(seen) else ([], MNIST_EXAMPLE.plain())

    def _get(self, key: str, default: Any, valid: Any) -> Any:
        """A value that somebody may have edited."""
        value = self.content.get(key, default)
        if value is not default and not valid(value):
            raise UserError(f"a valid {key} in the checkpoint", f"{self.path}: {value!r}"[:300], REMEDY)
        return value


@dataclass
class Progress:
    """What a run keeps in a checkpoint beside Lightning's own, to go on as if nothing had stopped it.

    Attributes:
        generators: the states of all random generators.
        frozen: the names of the parameters that are not trained.
        processes: how many there were.
        gradients: by parameter, of each process: those that wait for the optimizer's step.
        plateaus: which ReduceLROnPlateau are about to step, and what they look at.
    """

    generators: dict[str, Any] | None = None
    frozen: list[str] | None = None
    processes: int | None = None
    gradients: dict[str, Tensor] = field(default_factory=dict)
    plateaus: dict[int, float] = field(default_factory=dict)

    @classmethod
    def of(cls, checkpoint: dict[str, Any]) -> "Progress":
        """What a checkpoint holds of it; TypeError if somebody has edited that."""
        known = cls(**{name.name: checkpoint[name.name] for name in fields(cls) if name.name in checkpoint})
        kinds = ("generators", dict), ("frozen", list), ("processes", int), ("gradients", dict), ("plateaus", dict)
        for name, kind in kinds:
            if not isinstance(vars(known)[name], (kind, type(None))):
                raise TypeError(f"{name} is no {kind.__name__}")
        return known


def save_run(
    checkpoint: dict[str, Any],
    settings: dict[str, Any],
    progress: Progress,
    example: Example | None,
    class_names: list[str],
) -> None:
    """Adds what a run knows to a checkpoint that Lightning is about to write."""
    checkpoint |= {"mnist_lightning": settings, **vars(progress)}
    if example is not None:
        checkpoint["example_input"] = example.plain()
    if class_names:
        checkpoint["class_names"] = class_names


def is_in_mid_epoch(checkpoint: dict[str, Any]) -> bool:
    """Whether it was saved between two batches of an epoch."""
    batches = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    return batches["current"]["ready"] > 0 and not batches["is_last_batch"]


def complete_epoch(checkpoint: dict[str, Any], validated_each: int | None) -> None:
    """Counts an epoch as completed that was saved at its end.

    Where --trainer.max_steps is given, Lightning doesn't, and the resumed fit would begin with an epoch of no batches.

    Args:
        validated_each: after so many epochs there is a validation; None if there is none, or it comes at other times.
    """
    loop = checkpoint["loops"]["fit_loop"]
    epochs, batches = loop["epoch_progress"], loop["epoch_loop.batch_progress"]
    if epochs["current"]["processed"] == epochs["current"]["completed"] + 1:
        for count in epochs.values():
            count["completed"] += 1
        batches["current"] = dict.fromkeys(batches["current"], 0)
        batches["is_last_batch"] = False
        if validated_each and (epochs["current"]["completed"] + 1) % validated_each == 0:
            # Lightning takes the start of an epoch with a validation for its end, and counts a step.
            loop["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1


def public(hyperparameters: Any) -> dict[str, Any]:
    """Hyperparameters without what LightningCLI adds to them."""
    known = hyperparameters if isinstance(hyperparameters, dict) else {}
    return {name: value for name, value in known.items() if not str(name).startswith("_")}


def has_classes(settings: Any) -> bool:
    """Whether settings name a model, and whatever classes they name, by text and with arguments by name."""
    if not isinstance(settings, dict) or "model" not in settings:
        return False
    named = [settings[key] for key in ("model", "data") if settings.get(key)]
    return isinstance(settings.get("trainer", {}), dict) and all(
        isinstance(each, dict)
        and isinstance(each.get("class_path"), str)
        and isinstance(each.get("init_args") or {}, dict)
        for each in named
    )


def classes_of(settings: dict[str, Any], resuming: bool) -> list[Any]:
    """What settings build, not what a longer resume may change: the numbers."""
    trainer = settings.get("trainer", {})
    return [settings["model"], settings.get("data"), *(trainer.get(name) for name in BUILT if resuming)]


def names_code(value: Any) -> bool:
    """Whether a value may be the path of a class or a function, or holds one."""
    return isinstance(value, (dict, list)) or (isinstance(value, str) and bool(CODE.fullmatch(value)))


def is_list_of_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def is_example(value: Any) -> bool:
    if not isinstance(value, dict) or value.keys() != {"shape", "dtype"} or not isinstance(value["shape"], list):
        return False
    sizes = all(isinstance(size, int) and size > 0 for size in value["shape"])
    dtype = isinstance(value["dtype"], str) and isinstance(vars(torch).get(value["dtype"]), torch.dtype)
    return sizes and dtype and math.prod(value["shape"]) <= LARGEST_IMAGE
