"""An exception that ended a command, in three lines if a person can mend its cause: expected, got, remedy."""

import os
import sys
from pathlib import Path
from pickle import PicklingError
from traceback import walk_tb

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from mnist_lightning.commands.explain import LOOK_UP, cause
from mnist_lightning.errors import UserError
from mnist_lightning.runs.folder import shown_path

OURS = {"mnist_lightning", "lightning", "lightning_utilities", "torch", "torchmetrics", "jsonargparse", "__main__"}
OURS |= {"tensorboard", "numpy", "matplotlib", "PIL", "yaml", "fsspec", "tqdm", "filelock", "pooch"}
REFUSING = (
    *("lightning.", "torch.optim.", "torch.nn.parallel.", "torch.distributed.", "torch.cuda.", "jsonargparse."),
    "multiprocessing.",  # what it can't send to a process
)
REFUSALS = (
    *(MisconfigurationException, ModuleNotFoundError, ValueError, TypeError, RuntimeError, AttributeError),
    *(ArithmeticError, AssertionError, PicklingError),
)
UNFIT = "Error(s) in loading state_dict for "  # how torch begins to say that


def explain_exception(error: Exception) -> UserError | None:
    """The three lines for what Lightning, an optimizer of torch, or the system refuses; None for all else.

    An exception that went through code of the user's own keeps its traceback.
    """
    told = str(error)
    while isinstance(error.__cause__, Exception) and modules_of(error)[-1].startswith("jsonargparse"):
        error = error.__cause__  # what a class said when it was built, without jsonargparse's words around it
    modules = modules_of(error)
    if isinstance(error, UserError):
        return error
    if isinstance(error, TypeError) and "positional argument" in told and "__init__()" not in told:
        return None  # a function of the user's own that doesn't take what Lightning passes
    if any(name.partition(".")[0] not in OURS | sys.stdlib_module_names for name in modules):
        return None
    if isinstance(error, BrokenPipeError):
        return None  # no file
    if isinstance(error, OSError):
        names = [name for name in (error.filename, error.filename2) if name and isinstance(name, (str, bytes, Path))]
        shown = " and ".join(shown_path(Path(os.fsdecode(name))) for name in names)  # TensorBoard's are bytes
        got = f"{error.strerror or error}" + (f": {shown}" if shown else "")
        return UserError("to read and write the run's files", got, "choose another place, or mend it.")
    if told.startswith("Expected more than 1 value per channel"):  # BatchNorm
        return UserError("two images or more in each training batch", "one", "change --data.batch_size or train_size.")
    if isinstance(error, AttributeError) and modules[-1] == "torch.nn.modules.module":
        modules.pop()  # where a module says that it has no such attribute; who asked for it is the question
    if isinstance(error, RuntimeError) and told.startswith(UNFIT):
        return unfit(error)
    if isinstance(error, REFUSALS) and modules[-1].startswith(REFUSING):
        reason = cause(told) if modules[-1].startswith("jsonargparse.") else str(error) or type(error).__name__
        return UserError("settings that fit together", " ".join(reason.split())[:300], LOOK_UP)
    return None


def unfit(error: RuntimeError, path: str = "") -> UserError:
    """The three lines for torch's report of weights that don't fit a model."""
    got = path + " ".join(str(error).removeprefix(UNFIT).split())[:300]
    remedy = "build the model with the settings of its run: leave out --model options."
    return UserError("a checkpoint that fits the model as it is built now", got, remedy)


def modules_of(error: Exception) -> list[str]:
    """The modules that an exception went through, from the outermost call to the one that raised it."""
    return [frame.f_globals.get("__name__", "") for frame, _ in walk_tb(error.__traceback__)]
