"""Messages: what jsonargparse, Lightning, torch and the system say, in three lines: expected, got, remedy."""

import difflib
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from pickle import PicklingError
from traceback import walk_tb

from mnist_lightning.errors import UserError
from mnist_lightning.runs.folder import shown_path

COMMAND_NAMES = "fit, validate, test, predict, lr_find, export, demo"
LOOK_UP = "python -m mnist_lightning fit --help lists the options, fit --model.help ConvNet those of a model."
KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "list": "a list"}
SKIPPED = "Does not validate|Subtypes|Errors:|Expected a|Not of type|Subclass types|a class path|a dict|Problem|Given"


def explain(
    message: str, options: Mapping[str, str], classes: Mapping[str, list[str]], look_up: str = LOOK_UP
) -> UserError:
    """The three lines for a parser's message.

    Args:
        message: jsonargparse's report.
        options: every option that exists, with its dashes, and the class that it belongs to ("" for the rest).
        classes: the class names that an option takes, as {"model": ["ConvNet", "ResNet18"]}.
        look_up: the remedy where there is none better.
    """
    key = ".".join(dict.fromkeys(re.findall(r'Parser key "([^"]+)"', message)))  # from outside: model, optimizer, lr
    number = re.search("Expected a <class '(int|float)'>", message)  # it may be written as a path to one, too
    if match := re.search(r"unrecognized arguments: ([^\s=]+)|Option '(.+?)' is not accepted|option '(.+)'", message):
        option = match[1] or (f"--{key}.{match[2]}" if match[2] else f"--{match[3]}")
        owner = options.get(option)
        remedy = f"it belongs to {owner}: add --{option[2:].split('.')[0]} {owner}." if owner else ""
        return UserError("an option that exists here", option, remedy or did_you_mean(option, options, look_up))
    if match := re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message):
        names = match[2].replace("'", "").split(", ")
        return UserError(f"one of {', '.join(names)}", match[1], did_you_mean(match[1], names, look_up))
    if (match := re.search(r"dot import path string: (.*)", message)) and not number:
        names = classes.get(key, [])
        shown = f": {', '.join(names)}" if 0 < len(names) < 5 else ", by its name"
        remedy = did_you_mean(match[1], names, look_up)
        if key == "data" and Path(match[1]).is_dir():
            remedy = f"pictures in folders by class? --data ImageFolder --data.path {match[1]}"
        return UserError(f"a class for --{key}{shown}", match[1], remedy)
    if match := re.search(r"arguments are required: (.*)", message):
        name = match[1].split(",")[0]
        if not key:
            return UserError(f"--{name.rpartition('.')[2]}", "nothing", look_up)
        return UserError(f"{match[1]} beside --{key}", "nothing", f"add --{key}.{name} VALUE.")
    if match := re.search(r"argument (--\S+): expected one argument", message):
        return UserError(f"a value after {match[1]}", "nothing", look_up)
    if "subcommand" in message:
        example = "for example: python -m mnist_lightning fit --model ConvNet"
        return UserError(f"a command: {COMMAND_NAMES}", "none", example)
    if not key:
        return UserError("a valid command line or config file", " ".join(message.split())[:300], look_up)
    values = re.findall(r"(?:Got|Given) value: (?!NestedArg)(.*)|val=(.*)\)$", message)
    given = "".join(values[0]).strip("'")[:100] if values else ""
    if reason := cause(message):
        return UserError(f"a valid --{key}", f"{given}: {reason}" if given else reason, look_up)
    return UserError(f"--{key} to be {kind(message)}", given, look_up)


def look_up(words: list[str]) -> str:
    """Where the options of the command that is typed are listed; of fit, if none is."""
    name = words[0] if words and words[0] in COMMAND_NAMES.split(", ") else "fit"
    return LOOK_UP.replace("fit ", f"{name} ")


def name_whole_option(message: str, typed: list[str]) -> str:
    """A parser's report of an option without a value, by its whole name: argparse says --data of --data.batch_size."""
    if match := re.search(r"argument (?:-\w/)?(--[^\s:/]+)\S*: expected one argument", message):
        bare = (word for word, then in zip(typed, [*typed[1:], "--"]) if then.startswith("--") and "=" not in word)
        name = next((word for word in bare if word == match[1] or word.startswith(f"{match[1]}.")), match[1])
        return f"argument {name}: expected one argument"
    return message


def cause(message: str) -> str:
    """The innermost line of a nested report; "" if that says nothing but which types were expected."""
    lines = re.sub(r'Parser key ".*?": *', "", message).splitlines()
    telling = [line for line in lines if not re.match(rf"[\s-]*({SKIPPED}|$)", line)]
    return max(telling, key=lambda line: len(line) - len(line.lstrip(" -")), default="").strip(" -")[:300]


def did_you_mean(word: str, known: Mapping[str, str] | list[str], look_up: str = LOOK_UP) -> str:
    """Suggests the closest known word, or says where to look them up."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {close[0]}?" if close else look_up


def kind(message: str) -> str:
    if choices := dict.fromkeys(re.findall(r"Expected a typing.Literal\[(.*?)\]", message)):
        return "one of " + ", ".join(choices).replace("'", "")
    found = []
    pattern = r"Expected a <class '(?!NoneT)(\w+)'>|(?:literal for|string to) (int|float)|conform to restriction (.*)"
    for expected, literal, bounds in re.findall(pattern, message):
        kind = expected or literal
        found.append(f"a number {bounds.replace('v', '')}" if bounds else KINDS.get(kind, kind))
    return " or ".join(dict.fromkeys(found)) or "valid"


# ---- Exceptions

OURS = {"mnist_lightning", "lightning", "lightning_utilities", "torch", "torchmetrics", "torchvision", "jsonargparse"}
OURS |= {"__main__", "tensorboard", "numpy", "matplotlib", "PIL", "yaml", "fsspec", "tqdm", "filelock", "pooch"}
OURS |= {"packaging"}  # by which Lightning reads a checkpoint's version
REFUSING = (
    *("lightning.", "torch.optim.", "torch.nn.parallel.", "torch.distributed.", "torch.cuda.", "jsonargparse."),
    *("multiprocessing.", "pathlib"),  # what it can't send to a process; a home folder that there isn't
)
REFUSALS = (
    *(ModuleNotFoundError, ValueError, TypeError, RuntimeError, AttributeError, ArithmeticError, AssertionError),
    PicklingError,
)
RESTORING = "lightning.pytorch.trainer.connectors.checkpoint_connector"
UNFIT = "Error(s) in loading state_dict for "  # how torch begins to say that


def explain_exception(error: Exception) -> UserError | None:
    """The three lines for what Lightning, an optimizer of torch, or the system refuses; None for all else.

    An exception that went through code of the user's own keeps its traceback.
    """
    # Here, for this file is imported before torch is.
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

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
    if RESTORING in modules and isinstance(error, (LookupError, TypeError, ValueError, AttributeError)):
        got = f"one in which something is missing or edited: {error}"
        return UserError("a checkpoint that can be resumed", got[:300], "give --ckpt_path another one.")
    if isinstance(error, AttributeError) and modules[-1] == "torch.nn.modules.module":
        modules.pop()  # where a module says that it has no such attribute; who asked for it is the question
    if isinstance(error, RuntimeError) and told.startswith(UNFIT):
        return UserError(*unfit(error))
    if isinstance(error, (MisconfigurationException, *REFUSALS)) and modules[-1].startswith(REFUSING):
        reason = cause(told) if modules[-1].startswith("jsonargparse.") else str(error) or type(error).__name__
        return UserError("settings that fit together", " ".join(reason.split())[:300], LOOK_UP)
    return None


def unfit(error: Exception, path: str = "") -> tuple[str, str, str]:
    """The three lines for torch's report of weights that don't fit a model."""
    got = path + " ".join(str(error).removeprefix(UNFIT).split())[:300]
    remedy = "build the model with the settings of its run: leave out --model options."
    return "a checkpoint that fits the model as it is built now", got, remedy


def modules_of(error: Exception) -> list[str]:
    """The modules that an exception went through, from the outermost call to the one that raised it."""
    return [frame.f_globals.get("__name__", "") for frame, _ in walk_tb(error.__traceback__)]
