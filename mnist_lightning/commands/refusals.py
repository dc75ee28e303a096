"""What is refused before anything is written: once all is parsed, and once model and data are built.

What only training can show is refused by runs/checks.py, and what a class can't be built with by the class itself. A
paragraph gives a reason: what was expected, what there is, what to do. The first that holds is said.
"""

import copy
import inspect
import json
import os
import sys
from collections.abc import Iterable, Iterator
from enum import Enum
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder, ModelPruning, StochasticWeightAveraging
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities.model_helpers import is_overridden

from mnist_lightning.classifier import DigitClassifier
from mnist_lightning.commands.command import Command, as_list
from mnist_lightning.commands.messages import unfit
from mnist_lightning.commands.parser import class_of
from mnist_lightning.errors import Reason
from mnist_lightning.photos import Photos
from mnist_lightning.runs.classes import named_classes
from mnist_lightning.runs.saved import MNIST_EXAMPLE, Saved

ALONE: dict[str, Any] = {  # settings of the Trainer that looking for a learning rate makes itself
    "fast_dev_run": False, "accumulate_grad_batches": 1, "overfit_batches": 0, "max_steps": -1, "max_time": None,
    "barebones": False,
}  # fmt: skip
LEAST: dict[str, int] = {  # of the Trainer's numbers those that Lightning takes below what makes sense
    "limit_train_batches": 0, "accumulate_grad_batches": 0, "check_val_every_n_epoch": 0, "val_check_interval": 0,
    "num_sanity_val_steps": -1, "log_every_n_steps": 0, "gradient_clip_val": 0,
}  # fmt: skip
POSITIVE = ("limit_train_batches", "accumulate_grad_batches", "check_val_every_n_epoch", "val_check_interval")


def untrusted(saved: Saved, left_out: Iterable[str]) -> Iterator[Reason]:
    """Classes of a checkpoint from elsewhere that nobody has named: without them it means nothing."""
    for key in sorted({"model", "data"} & set(left_out), reverse=True):
        path = saved.settings.get(key, {}).get("class_path", saved.class_path)
        remedy = f"if you trust the file, name its class: --{key} {path}."
        yield "a checkpoint of classes that are known here", f"{saved.path}, of {path}", remedy


def typed(command: Command) -> Iterator[Reason]:
    """Of what was typed, read from files and found in the checkpoint, before anything is built."""
    settings, saved = command.settings, command.saved
    trainer = settings.trainer

    if settings.lr_find and not command.trains:
        yield "--lr_find with a new fit", command.name, "leave out one of the two."
    if saved is not None and command.alone:
        yield "--lr_find with a new fit", "--ckpt_path as well", "leave out one of the two."
    if saved is not None and command.trains and not saved.can_be_resumed:
        got = f"{saved.path}, which holds the weights alone"
        yield "a checkpoint to go on from", got, "start a new run, without --ckpt_path."
    if saved is not None and command.trains and not saved.settings:
        got = f"{saved.path}, which was trained from Python"
        remedy = "resume it from Python: trainer.fit(model, data, ckpt_path=...)."
        yield "a checkpoint that tells its optimizer and its other settings", got, remedy
    for key in ("model", "data"):
        for name in nulls(settings[key]):
            yield f"a value for --{key}.{name}", "null", "leave it out to have the default."
    if saved is not None:
        yield from what_cannot_win(settings, command.saved_settings, command.trains)

    if class_of(settings.data.class_path) is Photos and command.needs_labels:
        remedy = "use Photos with predict; leave out --data to have MNIST."
        yield f"images with labels to {command.name}", "Photos, which have none", remedy
    if class_of(settings.data.class_path) is Photos and saved is not None and saved.example != MNIST_EXAMPLE:
        got, remedy = f"one of {saved.example}", "give your own datamodule: --data CLASS."
        if saved.example.is_square_in_colour:
            remedy = "give --data ImageFolder."
        yield "a model of uint8 images (B, 1, 28, 28) for Photos", got, remedy

    if "://" in str(trainer.default_root_dir):
        got, remedy = trainer.default_root_dir, "give a folder, and copy the run when it is done."
        yield "--trainer.default_root_dir on this machine", got, remedy
    if saved is None and not command.trains:
        yield f"a checkpoint to {command.name}", "none", "add --ckpt_path FILE, or best or last for the newest run."
    if not command.trains:
        if trainer.barebones:
            what, does = ("metrics", "logs") if command.measures else ("files", "writes")
            yield f"{what} to {command.name} with", f"--trainer.barebones true, which {does} none", "leave it out."
        return

    for callback in as_list(trainer.callbacks) if saved is not None else []:
        if (cls := class_of(callback.class_path)) in (BatchSizeFinder, LearningRateFinder):
            remedy = "start a new run with what it found, and without it."
            yield "a run to go on with", f"{cls.__name__}, which would begin it anew", remedy
    job = next(Path(trainer.default_root_dir or ".").expanduser().glob("hpc_ckpt_*.ckpt"), None)
    if saved is None and job is not None and SLURMEnvironment.detect():
        got = f"{job}, which Lightning would resume from without a word"
        yield "no checkpoint of another job here", got, "move it away, or give it as --ckpt_path."
    for name, least in LEAST.items():
        value = trainer[name]
        if isinstance(value, (int, float)) and (value < least or value == 0 and name in POSITIVE):
            said = "above 0" if name in POSITIVE else f"of {least} and more"
            yield f"--trainer.{name} {said}", str(value), "give a larger number, or leave it out."
    for name, value in ALONE.items() if command.alone else ():
        if trainer[name] != value:
            yield "lr_find alone", f"--trainer.{name} {trainer[name]} as well", "leave one out."


def nulls(given: Any) -> Iterator[str]:
    """The arguments of a class that are null and may not be: the parser takes null for any of them."""
    cls = class_of(given.class_path)
    try:
        kinds = get_type_hints(cls.__init__)
    except NameError:  # names that are imported for type checkers alone
        return
    for name, parameter in inspect.signature(cls).parameters.items():
        if given.get("init_args", {}).get(name, "") is None and parameter.default is not None:
            if kinds.get(name, Any) is not Any and NoneType not in get_args(kinds[name]):
                yield name


def what_cannot_win(settings: Any, saved: dict[str, Any], resuming: bool) -> Iterator[Reason]:
    """Typed values that the checkpoint's content would silently beat."""
    if resuming and settings.seed_everything != saved.get("seed_everything", settings.seed_everything):
        got = str(settings.seed_everything)
        yield f"--seed_everything as in the run: {saved['seed_everything']}", got, "leave it out."
    for key in ("model", "data"):
        if key not in saved:
            continue
        now, then = (json.loads(json.dumps(of[key], default=plain)) for of in (settings.as_dict(), saved))
        same = now["class_path"] == then["class_path"] or is_class(then["class_path"], class_of(now["class_path"]))
        if not same and (key == "model" or resuming):
            remedy = f"leave out --{key}, or change it."
            yield f"a checkpoint of {now['class_path']}", f"one of {then['class_path']}", remedy
        for name, value in now.get("init_args", {}).items() if same else ():
            was = (then.get("init_args") or {}).get(name, value)
            # A folder that the data was moved to.
            moved = name != "source" and isinstance(value, str) and os.path.isdir(value)
            free = key == "data" and (name in ("data_dir", "mirrors") or moved)
            fixed = (resuming and not free) or (key, name) == ("model", "weights")
            if fixed and value != was:
                remedy = "leave it out; to train with another value start a new run, without --ckpt_path."
                yield f"--{key}.{name} as in the checkpoint: {was}", str(value), remedy


def built(
    model: LightningModule, data: LightningDataModule, callbacks: Iterable[Callback], command: Command
) -> Iterator[Reason]:
    """Of model, data and callbacks, before anything is written."""
    saved, names = command.saved, named_classes(data)
    if command.trains and names and isinstance(model, DigitClassifier) and model.num_classes != len(names):
        got = f"--model.num_classes {model.num_classes}"
        yield f"a model of {len(names)} classes, as the data has", got, "leave it out: it follows the data."

    if saved is not None and command.measures and names and isinstance(model, DigitClassifier):
        known = saved.class_names
        others = [name for name in names if name not in known] if known else names
        if others and (known or len(names) != model.num_classes):
            expected = f"classes that the model knows: {', '.join(saved.names(model.num_classes)[:10])}"
            yield expected, f"{', '.join(others[:10])} in {type(data).__name__}", "give data of those."

    later = ("configure_model", "setup", "on_load_checkpoint")  # where layers or names may come from
    base = DigitClassifier if isinstance(model, DigitClassifier) else LightningModule
    if saved is not None and not any(is_overridden(hook, model, base) for hook in later):
        try:
            copy.deepcopy(model).load_state_dict(saved.state_dict, strict=model.strict_loading)
        except (RuntimeError, AttributeError) as error:  # AttributeError: of a name that is no text
            yield unfit(error, f"{saved.path}, ")

    # What a checkpoint can't hold of a callback: the resumed fit would end as another one.
    if saved is None or not command.trains:
        return
    for callback in callbacks:
        got, remedy = "", "start a new run, or use --trainer.callbacks null."
        if isinstance(callback, ModelPruning):
            got = "ModelPruning, whose masks and first weights are in no checkpoint"
        elif isinstance(callback, StochasticWeightAveraging) and saved.state_of(callback).get("n_averaged"):
            got = "StochasticWeightAveraging after it began, which would begin its learning rates anew"
        if got:
            yield "a run that can be resumed exactly", got, remedy


def is_class(path: str, cls: type) -> bool:
    """Whether a class path means a class that is known here, by whichever of its paths."""
    module, _, name = path.rpartition(".")
    return module in sys.modules and vars(sys.modules[module]).get(name) is cls


def plain(value: Any) -> str:
    """As a config file has it: an Enum, a path; and a default that may be a function."""
    return value.name if isinstance(value, Enum) else str(value)
