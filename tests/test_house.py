"""The house: who imports whom, what is installed, and the few private names of other packages that it relies on."""

import ast
import configparser
import graphlib
import importlib
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from setuptools import find_packages

import mnist_lightning
from mnist_lightning.commands.cli import option_names
from mnist_lightning.commands.parser import Parser
from mnist_lightning.convnet import ConvNet
from mnist_lightning.data import MNISTDataModule

PACKAGE = Path(mnist_lightning.__file__).parent
# A module may import its own room, and the rooms before it.
ROOMS = ["", "finetuning", "runs", "pictures", "photos", "commands"]
# The door to the house: the public names, imported when they are asked for, and the command. No module imports it.
DOOR = {"mnist_lightning", "mnist_lightning.__main__"}

# By file, what other packages call private. `_actions` is argparse's.
PRIVATE = {
    ("commands/parser.py", "_typehints"),  # of jsonargparse
    ("commands/cli.py", "_actions"),
    ("commands/cli.py", "_parse_ckpt_path"),  # of LightningCLI, overridden
}
DOCUMENTED = {"_replace", "_exit"}  # of named tuples, of os: public in spite of the underscore


def module_of(path: Path) -> str:
    parts = ("mnist_lightning", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


TREES = {module_of(path): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}


def room_of(module: str) -> str:
    return next((room for room in ROOMS[1:] if f"{module}.".startswith(f"mnist_lightning.{room}.")), "")


def imports_of(tree: ast.Module) -> Iterator[str]:
    """The package's modules that one of them imports, in functions and under TYPE_CHECKING too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in TREES)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here: the graph is read from their names"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield from {submodule if submodule in TREES else str(node.module)} & set(TREES)


GRAPH = {module: set(imports_of(tree)) - DOOR for module, tree in TREES.items() if module not in DOOR}


def test_imports_form_no_circle() -> None:
    assert len(GRAPH) > 20 and GRAPH["mnist_lightning.convnet"] == {"mnist_lightning.classifier"}
    graphlib.TopologicalSorter(GRAPH).prepare()


def test_root_uses_no_room_and_a_room_only_those_below_it() -> None:
    upwards = {
        f"{module} imports {used}"
        for module, modules in GRAPH.items()
        for used in modules
        if ROOMS.index(room_of(used)) > ROOMS.index(room_of(module))
    }
    assert upwards == set()


def test_root_has_at_most_twelve_files() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= 12


def test_every_folder_is_installed() -> None:
    config = configparser.ConfigParser()
    config.read(PACKAGE.parent / "setup.cfg")
    assert config["options"]["packages"] == "find:"
    installed = find_packages(str(PACKAGE.parent), include=config["options.packages.find"]["include"].split())
    folders = {path.parent.relative_to(PACKAGE.parent) for path in PACKAGE.rglob("*.py")}
    assert {Path(*name.split(".")) for name in installed} == folders


# ---- Private names


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in {"_", *DOCUMENTED}


def names_of(tree: ast.Module) -> tuple[set[str], set[str]]:
    """The private names that a module defines, and those that it uses."""
    defined, used = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            defined.add(node.name)
        elif isinstance(node, ast.Attribute):
            of_self = isinstance(node.value, ast.Name) and node.value.id == "self"
            (defined if of_self and isinstance(node.ctx, ast.Store) else used).add(node.attr)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            used |= {name for alias in node.names for name in alias.name.split(".")}
            used |= set((getattr(node, "module", None) or "").split("."))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "setattr"):
            used |= {arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)}
    return set(filter(is_private, defined)), set(filter(is_private, used))


def overridden(module: str) -> set[str]:
    """Private methods of other packages' classes that a module's classes override."""
    found = set()
    for _, cls in inspect.getmembers(importlib.import_module(module), inspect.isclass):
        methods = {name for name, value in vars(cls).items() if is_private(name) and inspect.isfunction(value)}
        foreign = [base for base in cls.__mro__ if not base.__module__.startswith("mnist_lightning")]
        if cls.__module__ == module:
            found |= {name for name in methods if any(name in vars(base) for base in foreign)}
    return found


def test_private_names_of_other_packages_are_the_listed_ones() -> None:
    names = {module: names_of(tree) for module, tree in TREES.items()}
    ours = set().union(*(defined for defined, _ in names.values()))
    found = set()
    for module, (_, used) in names.items():
        file = Path(str(importlib.import_module(module).__file__)).relative_to(PACKAGE)
        found |= {(str(file), name) for name in (used - ours) | overridden(module)}
    assert found == PRIVATE
    assert len(PRIVATE) <= 5


CARRIES_OVER = """
from jsonargparse import ArgumentParser
class Default:
    def __init__(self, size: int = 64): pass
class Own(Default):
    def __init__(self, size: int = 8): pass
parser = ArgumentParser()
parser.add_subclass_arguments(Default, "data")
parser.set_defaults({"data": {"class_path": "__main__.Default"}})
print(parser.parse_args(["--data", "__main__.Own"]).data.init_args.size)
"""


def test_jsonargparse_gives_a_class_the_arguments_of_the_one_before() -> None:
    """In a process where nothing has replaced its function. If it stops doing so, `forget_arguments` can go."""
    command = [sys.executable, "-W", "ignore", "-c", CARRIES_OVER]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "64\n"


def test_parser_lists_its_options() -> None:
    """Of nested groups too; jsonargparse has no public way to ask for them."""
    parser = Parser()
    parser.add_lightning_class_args(MNISTDataModule, "data")
    assert {"--help", "--data.batch_size", "--data.val_size"} <= set(option_names(parser))


def test_lightnings_command_line_lets_the_checkpoint_win_over_what_is_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If it stops doing so, the override of `_parse_ckpt_path` can go."""

    class ParsesOnly(LightningCLI):
        def before_instantiate_classes(self) -> None:
            raise RuntimeError(f"label_smoothing {self.config.test.model.label_smoothing}")

    monkeypatch.setattr(sys, "argv", ["test"])
    checkpoint = tmp_path / "some.ckpt"
    torch.save({"hyper_parameters": {"label_smoothing": 0.1}}, checkpoint)
    typed = ["test", "--model.label_smoothing", "0.2", "--ckpt_path", str(checkpoint)]
    with pytest.raises(RuntimeError, match="^label_smoothing 0.1$"):
        ParsesOnly(ConvNet, MNISTDataModule, args=typed, auto_configure_optimizers=False, seed_everything_default=0)
