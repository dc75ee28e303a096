"""A learning-rate schedule as Lightning takes it, with what only the fit knows: its length, what it watches."""

import math
import sys
from functools import partial
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.cli import ReduceLROnPlateau
from lightning.pytorch.utilities.types import LRSchedulerConfigType
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR

from mnist_lightning.errors import UserError


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
