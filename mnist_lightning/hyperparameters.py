"""Hyperparameters as plain values for a checkpoint; a learning-rate schedule, with what only the fit knows."""

import inspect
import math
import sys
from collections.abc import Mapping
from enum import Enum
from functools import partial
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import ReduceLROnPlateau
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import LRSchedulerConfigType
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR

from mnist_lightning.errors import UserError

FROM_PYTHON = "a Python function, which a checkpoint can't hold"


def make_hyperparameters_plain(module: LightningModule | LightningDataModule) -> None:
    """Saves a module's hyperparameters anew, as a checkpoint can hold them.

    From the command line they are plain data; from Python they may be functions and paths, which a checkpoint that
    loads with weights_only=True can't hold.

    Raises:
        UserError: one of them isn't a value that its annotation allows.
    """
    plain = plain_hyperparameters(type(module), module.hparams)
    refuse_out_of_range(type(module), plain)
    module.hparams.clear()
    module.save_hyperparameters(plain)


def plain_hyperparameters(cls: type, given: Mapping[str, Any]) -> dict[str, Any]:
    bases = [base for base in cls.__mro__ if "__init__" in vars(base)]
    defaults = [parameter.default for base in bases for parameter in inspect.signature(base).parameters.values()]
    plain: dict[str, Any] = {}
    for name, value in given.items():
        if isinstance(value, str) and value == FROM_PYTHON:
            rank_zero_warn(f"The checkpoint's {name} was {FROM_PYTHON}: pass {name}= to train this model further.")
        if str(value).startswith("Unable to serialize instance"):
            continue  # LightningCLI's words for a default that can't be saved: the class has it
        if isinstance(value, Enum):
            plain[name] = value.name  # as the command line has it
        elif isinstance(value, np.generic):
            plain[name] = value.item()
        elif not callable(value):
            plain[name] = str(value) if isinstance(value, Path) else value
        elif not any(value is default for default in defaults):
            plain[name] = FROM_PYTHON
    return plain


def refuse_out_of_range(cls: type, values: Mapping[str, Any]) -> None:
    """Raises UserError if a number or a word isn't among those that this package's annotations of a class's `__init__`
    allow. The command line has checked them; from Python nobody has."""
    known: set[str] = set()  # arguments of the classes so far: a subclass may give a name another meaning
    for base in (base for base in cls.__mro__ if "__init__" in vars(base)):
        names = inspect.signature(base).parameters.keys() - known
        known |= names
        hints = get_type_hints(vars(base)["__init__"]) if base.__module__.startswith(f"{__package__}.") else {}
        for name in names & hints.keys() & values.keys():
            hint, value = hints[name], values[name]
            kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
            reasons = [reason for kind in kinds if (reason := why_not(kind, value))]
            if len(reasons) == len(kinds):
                remedy = f"give {cls.__name__} another {name}."
                raise UserError(f"a valid {name}", f"{value!r}: {'; '.join(reasons)}", remedy)


def why_not(kind: Any, value: Any) -> str:
    """Why a value can't be of a kind of number, a Literal, or None; "" if it can, or if the kind is another one."""
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        return "" if value in choices else f"not one of {', '.join(map(str, choices))}"
    if kind is NoneType:
        return "" if value is None else "not None"
    if isinstance(kind, type) and issubclass(kind, (int, float)):
        try:
            kind(value)
        except (ValueError, TypeError) as error:
            return str(error)
    return ""


def refuse_lost(**hyperparameters: Any) -> None:
    """Raises UserError if one of them was FROM_PYTHON when the checkpoint was written."""
    for name, value in hyperparameters.items():
        if isinstance(value, str) and value == FROM_PYTHON:
            raise UserError(f"the {name} to train with", FROM_PYTHON, f"pass {name}= when you load the model.")


def schedule_config(
    scheduler: Any, optimizer: Optimizer, factors: tuple[float, ...], model: LightningModule
) -> LRSchedulerConfigType:
    """A learning-rate schedule as Lightning takes it: when it steps, and for ReduceLROnPlateau what it watches.

    Args:
        scheduler: builds the schedule.
        factors: of the optimizer's groups, see schedule_arguments.
        model: in the fit, if there is one.
    """
    schedule = scheduler(optimizer, **schedule_arguments(scheduler, factors, model))
    by_batch = isinstance(schedule, (OneCycleLR, CyclicLR))  # torch's documentation: made to step after each batch
    config: LRSchedulerConfigType = {"scheduler": schedule, "interval": "step" if by_batch else "epoch"}
    if isinstance(schedule, ReduceLROnPlateau):
        config["monitor"] = schedule.monitor
        if schedule.monitor.startswith("val"):  # which exists only after a validation
            config["frequency"] = model.trainer.check_val_every_n_epoch or 1
    return config


def schedule_arguments(scheduler: Any, factors: tuple[float, ...], model: LightningModule) -> dict[str, Any]:
    """What a schedule named on the command line lacks: its length, and a rate for each of several groups.

    Args:
        scheduler: builds the schedule; a partial if it comes from the command line.
        factors: each group's learning rate as a share of the one that was asked for.
        model: in the fit, if there is one.

    Raises:
        UserError: the schedule needs the fit's length, and the fit has none.
    """
    given = scheduler.keywords if isinstance(scheduler, partial) else {}
    filled: dict[str, Any] = {
        name: [given[name] * factor for factor in factors]  # OneCycleLR and CyclicLR ignore the groups' own rates
        for name in ("max_lr", "base_lr")
        if len(factors) > 1 and isinstance(given.get(name), (int, float))
    }
    if "total_steps" in given and not (given["total_steps"] or given.get("epochs")):
        # A resumed schedule brings its length along. To ask for it then would make Lightning forget the place in the
        # epoch: https://github.com/Lightning-AI/pytorch-lightning/issues/20550
        steps = sys.maxsize if model.trainer.ckpt_path else model.trainer.estimated_stepping_batches
        if steps in (math.inf, -1):  # -1: of a stream, whose length nobody knows
            remedy = "give --trainer.max_epochs, or --trainer.max_steps where the data is a stream."
            raise UserError("a fit of known length for this schedule", "none", remedy)
        filled["total_steps"] = int(steps)
    return filled
