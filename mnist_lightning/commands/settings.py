"""What is typed, what a config file says and what a checkpoint holds: how they go together."""

import argparse
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from mnist_lightning.commands.parser import class_named, in_full_names
from mnist_lightning.data import MNISTDataModule
from mnist_lightning.errors import UserError
from mnist_lightning.photos import ImageFolder
from mnist_lightning.runs.saved import CODE, KNOWN, Saved

PLAIN_TEXTS = ("precision", "gradient_clip_algorithm")  # settings of the Trainer that are text and nothing else
PICTURES = f"{ImageFolder.__module__}.{ImageFolder.__name__}"
PLACES = ("data_dir", "mirrors", "path", "save_seen")  # settings of the data that say where to read or write


def config_files_first(typed: list[str]) -> list[str]:
    """The same words, with a command's config files before its options: what is typed wins, wherever it stands."""
    scan = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    scan.add_argument("-c", "--config", action="append", default=[])
    try:
        found, rest = scan.parse_known_args(typed[1:])
    except argparse.ArgumentError:  # an option without its value: the real parser says so
        return typed
    return [*typed[:1], *(f"--config={path}" for path in found.config), *rest]


def look_ahead(typed: list[str]) -> argparse.Namespace:
    """What is read before the rest: the checkpoint, whose settings become the parser's defaults, and where it is."""
    scan = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    scan.add_argument("-c", "--config", action="append", default=[])
    scan.add_argument("--model", "--model.class_path")
    scan.add_argument("--data", "--data.class_path")
    scan.add_argument("--ckpt_path")
    scan.add_argument("--trainer.default_root_dir", dest="root")
    try:
        found, rest = scan.parse_known_args(typed)
    except argparse.ArgumentError:  # an option without its value: the real parser says so
        found, rest = scan.parse_known_args([])
    found.named = {key for key in ("model", "data") if vars(found)[key]}  # whose class is named
    values = [option.partition("=")[2] or then for option, then in zip(typed, [*typed[1:], ""]) if option[:2] == "--"]
    found.modules = {module_of(value) for value in values} - {module_of(found.ckpt_path or ""), ""}
    found.subcommand = next((word for word in rest if not word.startswith("-")), "")
    for path in found.config:
        config = read_config(Path(path))
        below = config.get(found.subcommand)
        config = below if isinstance(below, dict) else config
        trainer = config.get("trainer") or {}
        if not isinstance(trainer, dict):
            raise UserError(f"settings below trainer: in {path}", str(trainer), "for example max_epochs: 3.")
        found.named |= {key for key in ("model", "data") if config.get(key)}
        found.modules |= {module_of(word) for word in words_of(config)} - {""}
        found.ckpt_path = found.ckpt_path or config.get("ckpt_path")
        found.root = found.root or trainer.get("default_root_dir")
    for name, value in (("ckpt_path", found.ckpt_path), ("trainer.default_root_dir", found.root)):
        if not isinstance(value, (str, type(None))):
            raise UserError(f"--{name} to be a path", str(value), "correct it in the config file.")
    found.root = str(Path(found.root or ".").expanduser())
    return found


def read_config(path: Path) -> dict[str, Any]:
    """A config file's content; {} where the real parser will say what is wrong with it."""
    try:
        config = yaml.safe_load(in_full_names(path.read_text()))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return config if isinstance(config, dict) else {}


def settings_of(saved: Saved, resuming: bool, data: str | None) -> dict[str, Any]:
    """What a checkpoint says of its run, as defaults for the parser; of the Trainer's settings if it is resumed.

    Args:
        data: the datamodule's class that is typed, if one is.
    """
    kept = saved.settings or settings_from_hyperparameters(saved)
    settings = {key: kept[key] for key in ("model", "data") if kept.get(key)}
    if not resuming:
        of_pictures = data == ImageFolder.__name__ or class_named(data or "") is ImageFolder
        return with_size_of_the_model(settings, saved) if of_pictures else settings
    trainer = {name: value for name, value in kept.get("trainer", {}).items() if name != "default_root_dir"}
    others = {name: kept[name] for name in ("seed_everything", "monitor", "monitor_mode", "pictures") if name in kept}
    return settings | others | {f"trainer.{name}": value for name, value in trainer.items()}


def settings_from_hyperparameters(saved: Saved) -> dict[str, Any]:
    """The same of a checkpoint that was trained from Python, where nobody wrote down more than hyperparameters."""
    settings = {"model": {"class_path": saved.class_path, "init_args": saved.hyperparameters}}
    data = saved.data_hyperparameters
    for cls in (MNISTDataModule, ImageFolder):
        if data and data.keys() <= inspect.signature(cls).parameters.keys():
            settings["data"] = {"class_path": f"{cls.__module__}.{cls.__name__}", "init_args": data}
            break
    return settings


def with_size_of_the_model(settings: dict[str, Any], saved: Saved) -> dict[str, Any]:
    """The same for an ImageFolder where the run had another datamodule: pictures are read in the model's size."""
    if not saved.example.is_square_in_colour or (settings.get("data") or {}).get("class_path") == PICTURES:
        return settings
    return {**settings, "data": {"class_path": PICTURES, "init_args": {"size": saved.example.shape[1], "path": ""}}}


def module_of(word: str) -> str:
    """The module of what may be a class's path, as `mine.Net`; "" of any other word, or of a file that exists."""
    return word.rpartition(".")[0] if CODE.fullmatch(word) and not Path(word).exists() else ""


def words_of(config: Any) -> Iterator[str]:
    """All texts in a config file."""
    if isinstance(config, str):
        yield config
    elif isinstance(config, (dict, list)):
        for value in config.values() if isinstance(config, dict) else config:
            yield from words_of(value)


def of_a_stranger(settings: dict[str, Any], modules: set[str]) -> tuple[dict[str, Any], list[str]]:
    """What is taken from a checkpoint that may be anybody's: numbers, and classes of packages that are known here; of
    other classes only those of `modules`, which the user has named. Also what is left out.

    The names in a checkpoint's settings are imported, built and called: they could be of any function.
    """
    left_out: list[str] = []

    def is_known(path: str) -> bool:
        if path.startswith(KNOWN):
            found = class_named(path)  # None: it is gone, which the parser says
            return found is None or inspect.isclass(found)  # a function would be called: torch.hub.load, for example
        return path.rpartition(".")[0] in modules

    def plain(key: str, value: Any) -> Any:
        """A value without what may not be taken from it; None in its place."""
        if isinstance(value, list):
            return [plain(key, item) for item in value]
        if not isinstance(value, dict):
            named = isinstance(value, str) and CODE.fullmatch(value)
            if named and not key.endswith(".weights"):  # which is a file
                left_out.append(f"{key} {value}")
                return None
            return value
        path = str(value.get("class_path", "mnist_lightning."))
        # Other packages' models and datamodules may do anything when they are built: Lightning's demos download.
        foreign = key in ("model", "data") and not path.startswith("mnist_lightning.")
        if (foreign and module_of(path) not in modules) or not is_known(path):
            left_out.append(f"{key} {value['class_path']}")
            return None
        return {name: v if name == "class_path" else plain(f"{key}.{name}", v) for name, v in value.items()}

    taken: dict[str, Any] = {}
    for key, value in settings.items():
        name = key.removeprefix("trainer.")
        if key == name or value is None or isinstance(value, (int, float)) or name in PLAIN_TEXTS:
            taken[key] = plain(key, value)
        elif value not in (None, "auto", [], {}, ""):
            left_out.append(f"--{key}")
    if data := taken.get("data"):
        places = {name: value for name, value in (data.get("init_args") or {}).items() if name in PLACES}
        left_out += [f"--data.{name}" for name, value in places.items() if value not in (None, "data")]
        init_args = {name: value for name, value in (data.get("init_args") or {}).items() if name not in PLACES}
        taken["data"] = {**data, "init_args": init_args}
    return {key: value for key, value in taken.items() if value is not None or key.startswith("trainer.")}, left_out


def without_instances(settings: Any) -> Any:
    """Settings that jsonargparse takes back: it writes "Unable to serialize instance" before ModelPruning's function,
    which has a name, StochasticWeightAveraging's device, and objects. Names are kept; objects are defaults, left out.
    """
    if isinstance(settings, dict):
        kept = {key: without_instances(value) for key, value in settings.items()}
        return {key: value for key, value in kept.items() if not str(value).startswith("<")}
    if isinstance(settings, list):
        return [without_instances(value) for value in settings]
    return settings.removeprefix("Unable to serialize instance ") if isinstance(settings, str) else settings
