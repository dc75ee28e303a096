"""What is typed, what a config file says and what a checkpoint holds: how they go together."""

import argparse
import json
import os
import re
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from mnist_lightning.commands.parser import class_of, in_full_names
from mnist_lightning.errors import UserError
from mnist_lightning.runs.checkpoints import class_path_of
from mnist_lightning.runs.folder import run_of


def look_ahead(typed: list[str]) -> argparse.Namespace:
    """What is read before the rest: the checkpoint, whose settings become the parser's defaults, and where it is."""
    scan = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    scan.add_argument("-c", "--config", action="append", default=[])
    scan.add_argument("--model", "--model.class_path")
    scan.add_argument("--ckpt_path")
    scan.add_argument("--trainer.default_root_dir", dest="root")
    try:
        found, rest = scan.parse_known_args(typed)
    except argparse.ArgumentError:  # an option without its value: the real parser says so
        found, rest = scan.parse_known_args([])
    found.subcommand = next((word for word in rest if not word.startswith("-")), "")
    for path in found.config:
        config = read_config(Path(path))
        below = config.get(found.subcommand)
        config = below if isinstance(below, dict) else config
        trainer = config.get("trainer") or {}
        if not isinstance(trainer, dict):
            raise UserError(f"settings below trainer: in {path}", str(trainer), "for example max_epochs: 3.")
        found.ckpt_path = found.ckpt_path or config.get("ckpt_path")
        found.root = found.root or trainer.get("default_root_dir")
    found.root = str(Path(found.root or ".").expanduser())
    return found


def read_config(path: Path) -> dict[str, Any]:
    """A config file's content; {} where the real parser will say what is wrong with it."""
    try:
        config = yaml.safe_load(in_full_names(path.read_text()))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return config if isinstance(config, dict) else {}


def in_full(message: str, typed: list[str]) -> str:
    """A parser's report of an option without a value, by its whole name: argparse says --data of --data.batch_size."""
    if match := re.search(r"argument (?:-\w/)?(--[^\s:/]+)\S*: expected one argument", message):
        bare = (word for word, then in zip(typed, [*typed[1:], "--"]) if then.startswith("--") and "=" not in word)
        name = next((word for word in bare if word == match[1] or word.startswith(f"{match[1]}.")), match[1])
        return f"argument {name}: expected one argument"
    return message


def settings_of(checkpoint: dict[str, Any], path: Path, resuming: bool) -> dict[str, Any]:
    """What a checkpoint says of its run, as defaults for the parser; of the Trainer's settings if it is resumed."""
    kept = checkpoint.get("mnist_lightning") or settings_of_version_0_1(checkpoint, path)
    settings = {key: kept[key] for key in ("model", "data") if kept.get(key)}
    settings["model"].setdefault("init_args", {})
    if not resuming:
        return settings
    trainer = {name: value for name, value in kept.get("trainer", {}).items() if name != "default_root_dir"}
    others = {name: kept[name] for name in ("seed_everything", "monitor", "monitor_mode", "pictures") if name in kept}
    return settings | others | {f"trainer.{name}": value for name, value in trainer.items()}


def settings_of_version_0_1(checkpoint: dict[str, Any], path: Path) -> dict[str, Any]:
    """The same of a checkpoint that doesn't hold them: from its hyperparameters and its run's config.yaml."""
    run = run_of(path)
    config = read_config(run / "config.yaml") if run else {}
    if not isinstance(config.get("trainer"), dict):
        config = {}  # somebody's own file
    hyperparameters = checkpoint.get("hyper_parameters", {})
    known = {"model": {"class_path": class_path_of(checkpoint), "init_args": public(hyperparameters)}}
    if data := checkpoint.get("datamodule_hyper_parameters"):
        class_path = data.get("_class_path", "mnist_lightning.data.MNISTDataModule")
        known["data"] = {"class_path": class_path, "init_args": public(data)}
    return config | known


def public(hyperparameters: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in hyperparameters.items() if not name.startswith("_")}


def refuse_what_cannot_win(settings: Any, saved: dict[str, Any], resuming: bool) -> None:
    """Refuses typed values that the checkpoint's content would silently beat."""
    if resuming and settings.seed_everything != saved.get("seed_everything", settings.seed_everything):
        got = str(settings.seed_everything)
        raise UserError(f"--seed_everything as in the run: {saved['seed_everything']}", got, "leave it out.")
    for key in ("model", "data"):
        if key not in saved:
            continue
        now, then = (json.loads(json.dumps(of[key], default=plain)) for of in (settings.as_dict(), saved))
        same = class_of(now["class_path"]) is class_of(then["class_path"])
        if not same and (key == "model" or resuming):
            got, remedy = f"one of {then['class_path']}", f"leave out --{key}, or change it."
            raise UserError(f"a checkpoint of {now['class_path']}", got, remedy)
        for name, value in now.get("init_args", {}).items() if same else ():
            was = then["init_args"].get(name, value)
            moved = name != "source" and os.path.isdir(str(value))  # a folder that the data was moved to
            free = key == "data" and (name in ("data_dir", "mirrors") or moved)
            fixed = (resuming and not free) or (key, name) == ("model", "weights")
            if fixed and value != was:
                remedy = "leave it out; to train with another value start a new run, without --ckpt_path."
                raise UserError(f"--{key}.{name} as in the checkpoint: {was}", str(value), remedy)


def plain(value: Any) -> str:
    """As a config file has it: an Enum, a path; and a default that may be a function."""
    return value.name if isinstance(value, Enum) else str(value)
