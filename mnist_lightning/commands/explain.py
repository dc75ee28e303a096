"""What jsonargparse says of a wrong command line in 45 lines, said in three: expected, got, remedy."""

import difflib
import re
from collections.abc import Mapping

from mnist_lightning.errors import UserError

COMMANDS = "fit, validate, test, predict, export, demo"
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
        return UserError(f"a class for --{key}{shown}", match[1], did_you_mean(match[1], names, look_up))
    if match := re.search(r"arguments are required: (.*)", message):
        name = match[1].split(",")[0]
        if not key:
            return UserError(f"--{name.rpartition('.')[2]}", "nothing", look_up)
        return UserError(f"{match[1]} beside --{key}", "nothing", f"add --{key}.{name} VALUE.")
    if match := re.search(r"argument (--\S+): expected one argument", message):
        return UserError(f"a value after {match[1]}", "nothing", look_up)
    if "subcommand" in message:
        return UserError(f"a command: {COMMANDS}", "none", "for example: python -m mnist_lightning fit --model ConvNet")
    if not key:
        return UserError("a valid command line or config file", " ".join(message.split())[:300], look_up)
    values = re.findall(r"(?:Got|Given) value: (?!NestedArg)(.*)|val=(.*)\)$", message)
    given = "".join(values[0]).strip("'")[:100] if values else ""
    if reason := cause(message):
        return UserError(f"a valid --{key}", f"{given}: {reason}" if given else reason, look_up)
    return UserError(f"--{key} to be {kind(message)}", given, look_up)


def cause(message: str) -> str:
    """The innermost line of a nested report; "" if that says nothing but which types were expected."""
    lines = re.sub(r'Parser key ".*?": *', "", message).splitlines()
    telling = [line for line in lines if not re.match(rf"[\s-]*({SKIPPED}|$)", line)]
    return max(telling, key=lambda line: len(line) - len(line.lstrip(" -")), default="").strip(" -")[:300]


def did_you_mean(word: str, known: Mapping[str, str] | list[str], look_up: str = LOOK_UP) -> str:
    """The nearest of the known words as a question, else where to look them up."""
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
