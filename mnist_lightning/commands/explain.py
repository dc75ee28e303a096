"""What jsonargparse says of a wrong command line in 45 lines, said in three: expected, got, remedy."""

import difflib
import re
from collections.abc import Mapping

from mnist_lightning.errors import UserError

COMMANDS = "fit, validate, test, predict, export, demo"
LOOK_UP = "python -m mnist_lightning fit --help lists the options, fit --model.help ConvNet those of a model."
KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "NoneType": "null"}


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
    key = ".".join(re.findall(r'Parser key "([^"]+)"', message))  # from the outside in: model, optimizer, lr
    unknown = re.search(r"unrecognized arguments: ([^\s=]+)|Option '(.+?)' is not accepted|option '(.+)'", message)
    if unknown:
        option = unknown[1] or (f"--{key}.{unknown[2]}" if unknown[2] else f"--{unknown[3]}")
        if owner := options.get(option):
            remedy = f"it belongs to {owner}: add --{option[2:].split('.')[0]} {owner}."
        else:
            remedy = did_you_mean(option, options, look_up)
        return UserError("an option that exists here", option, remedy)
    if match := re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message):
        names = match[2].replace("'", "").split(", ")
        return UserError(f"one of {', '.join(names)}", match[1], did_you_mean(match[1], names, look_up))
    if match := re.search(r"dot import path string: (.*)|Import path (?:does not|is not).*", message):
        got = match[1] or _given(message)
        names = classes.get(key, [])
        expected = f"a class for --{key}" + (f": {', '.join(names)}" if 0 < len(names) < 5 else ", by its name")
        if key.endswith((".lr", "size")):  # a number may be written as a path to one, too
            return UserError(f"a number for --{key}", got, look_up)
        return UserError(expected, got, did_you_mean(got, names, look_up))
    if match := re.search(r"arguments are required: (?:\w+\.)?(\w+)$", message):
        return UserError(f"--{match[1]}", "nothing", look_up)
    if match := re.search(r"arguments are required: (.*)", message):
        return UserError(f"{match[1]} beside --{key}", "nothing", f"add --{key}.{match[1].split(',')[0]} VALUE.")
    if match := re.search(r"argument (--\S+): expected one argument", message):
        return UserError(f"a value after {match[1]}", "nothing", look_up)
    if match := re.search(r"Path is not a file: '(.*)'", message):
        return UserError("a config file", f"a folder: {match[1]}", "the project's own are in configs/.")
    if match := re.search(r"File does not exist: '(.*)'", message):
        return UserError("a config file", f"no such file: {match[1]}", "the project's own are in configs/.")
    if "parsing config" in message or "Unexpected config" in message or "codec can't decode" in message:
        got = re.sub(r"\s+", " ", message)
        return UserError("a config file in YAML, as --print_config prints it", got, "mend that place.")
    if "subcommand" in message:
        remedy = "for example: python -m mnist_lightning fit --model ConvNet"
        return UserError(f"a command: {COMMANDS}", "none", remedy)
    if key:
        return UserError(f"--{key} to be {_kind(message)}", _given(message), look_up)
    return UserError("a valid command line", re.sub(r"\s+", " ", message)[:300], look_up)


def did_you_mean(word: str, known: Mapping[str, str] | list[str], look_up: str = LOOK_UP) -> str:
    """The nearest of the known words as a question, else where to look them up."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {close[0]}?" if close else look_up


def _given(message: str) -> str:
    for pattern in (r"NestedArg\(key='.*?', val=(.*)\)", r"Got value: (.*)", r"Given value: (.*)", r"(.*)\s*$"):
        if match := re.search(pattern, message):
            return match[1].strip("' ")[:200]
    return message


def _kind(message: str) -> str:
    if match := re.search(r"conform to restriction (.*)", message):
        return "a number " + match[1].replace("v", "")
    if choices := re.findall(r"Expected a typing.Literal\[(.*?)\]", message):
        return "one of " + ", ".join(choices).replace("'", "")
    if "invalid literal for int" in message:
        return KINDS["int"]
    kinds = dict.fromkeys(re.findall(r"Expected a <class '(\w+)'>", message))
    return " or ".join(KINDS.get(kind, kind) for kind in kinds if kind != "NoneType") or "valid"
