"""What is typed, what a config file says and what a checkpoint holds: how they go together."""

import argparse
import importlib
import json
import re
from pathlib import Path
from typing import Any

import yaml

from mnist_lightning.errors import UserError


def look_ahead(typed: list[str]) -> argparse.Namespace:
    """What has to be known before the parser's defaults are set: the command, the model, the checkpoint, the root.

    Raises:
        UserError: --model and the config file name different models.
    """
    scan = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    scan.add_argument("-c", "--config", action="append", default=[])
    scan.add_argument("--model", "--model.class_path")
    scan.add_argument("--model.optimizer", "--model.optimizer.class_path", dest="optimizer")
    scan.add_argument("--ckpt_path")
    scan.add_argument("--trainer.default_root_dir", dest="root")
    try:
        found, rest = scan.parse_known_args(typed)
    except argparse.ArgumentError:  # an option without its value: the real parser says so
        found, rest = scan.parse_known_args([])
    found.subcommand = next((word for word in rest if not word.startswith("-")), "")
    for path in found.config:
        try:
            config = yaml.safe_load(Path(path).read_text())
        except (OSError, ValueError, yaml.YAMLError):
            continue  # the real parser says what is wrong
        config = config.get(found.subcommand, config) if isinstance(config, dict) else {}
        model = config.get("model")
        model = model.get("class_path") if isinstance(model, dict) else model
        if model is not None and not isinstance(model, str):
            raise UserError(f"a model in {path}: ConvNet or ResNet18", str(model), "mend that place.")
        if not isinstance(config.get("trainer", {}), dict):
            raise UserError(f"settings of the --trainer in {path}", str(config["trainer"]), "mend that place.")
        optimizer = config["model"].get("init_args") if isinstance(config.get("model"), dict) else None
        optimizer = optimizer.get("optimizer") if isinstance(optimizer, dict) else None
        found.optimizer = found.optimizer or (optimizer.get("class_path") if isinstance(optimizer, dict) else optimizer)
        if model and found.model and model.rpartition(".")[2] != found.model.rpartition(".")[2]:
            raise UserError(
                f"--model as in {path}: {model}", found.model, "leave out --model, or take a config of that model."
            )
        found.model = found.model or model
        found.ckpt_path = found.ckpt_path or config.get("ckpt_path")
        found.root = found.root or (config.get("trainer") or {}).get("default_root_dir")
    found.root = found.root or "."
    return found


def full_names(typed: list[str]) -> list[str]:
    """ReduceLROnPlateau by its path: torch has a class of that name, too, which doesn't say what it watches."""
    return [re.sub(r"(^|=)ReduceLROnPlateau$", r"\1lightning.pytorch.cli.ReduceLROnPlateau", word) for word in typed]


def in_full(message: str, typed: list[str]) -> str:
    """A parser's report of an option without a value, by its whole name: argparse says --data of --data.batch_size."""
    if match := re.search(r"argument (?:-\w/)?(--[^\s:/]+)\S*: expected one argument", message):
        bare = (word for word, then in zip(typed, [*typed[1:], "--"]) if then.startswith("--") and "=" not in word)
        name = next((word for word in bare if word == match[1] or word.startswith(f"{match[1]}.")), match[1])
        return f"argument {name}: expected one argument"
    return message


def class_of(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def as_config(hyperparameters: dict[str, Any], class_path: str) -> dict[str, Any]:
    """Hyperparameters as a checkpoint holds them, in the form that the parser takes."""
    init_args = {key: value for key, value in hyperparameters.items() if not key.startswith("_")}
    return {"class_path": hyperparameters.get("_class_path", class_path), "init_args": init_args}


def settings_of_run(run: Path, checkpoint: dict[str, Any], data_class: str) -> dict[str, Any]:
    """The seed and the Trainer's settings that a resumed run goes on with."""
    config = run / "config.yaml"
    trainer = yaml.safe_load(config.read_text())["trainer"] if config.is_file() else {}
    settings = {f"trainer.{name}": value for name, value in trainer.items() if name != "default_root_dir"}
    state = checkpoint.get(data_class.rpartition(".")[2], {})
    return settings | ({"seed_everything": state["seed"]} if "seed" in state else {})


def refuse_what_cannot_win(settings: Any, saved: dict[str, Any], resuming: bool) -> None:
    """Refuses typed values that the checkpoint's content would silently beat."""
    if resuming and settings.seed_everything != saved.get("seed_everything", settings.seed_everything):
        got = str(settings.seed_everything)
        raise UserError(f"--seed_everything as in the run: {saved['seed_everything']}", got, "leave it out.")
    for key in ("model", "data"):
        now, then = json.loads(json.dumps(settings[key].as_dict())), json.loads(json.dumps(saved[key]))
        if key == "model" and class_of(now["class_path"]) is not class_of(then["class_path"]):
            raise UserError(
                f"a checkpoint of {now['class_path']}",
                f"one of {then['class_path']}",
                "leave out --model, or change it.",
            )
        for name, value in now.get("init_args", {}).items():
            was = then["init_args"].get(name, value)
            fixed = resuming and name not in ("data_dir", "mirrors", "source") or name == "weights"
            if fixed and value != was:
                raise UserError(
                    f"--{key}.{name} as in the checkpoint: {was}",
                    str(value),
                    "leave it out; to train with another value start a new run, without --ckpt_path.",
                )


def check_architecture(model: Any, checkpoint: dict[str, Any], path: str) -> None:
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    for name, value in checkpoint["state_dict"].items():
        if shapes.pop(name, None) != tuple(value.shape):
            shapes[name] = tuple(value.shape)
            break
    if shapes:
        name, shape = next(iter(shapes.items()))
        raise UserError(
            f"a checkpoint that fits {type(model).__name__} as it is built now",
            f"{path}, which differs at {name} {shape}",
            "build the model with the settings of its run: leave out --model options.",
        )
