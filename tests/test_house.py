"""The house: who imports whom, how large it is, what is installed, and the private names of others that it uses."""

import ast
import configparser
import graphlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from setuptools import find_packages

import mnist_lightning

PACKAGE = Path(mnist_lightning.__file__).parent
# A module may import its own room, and the rooms before it.
ROOMS = ["", "finetuning", "runs", "pictures", "photos", "commands"]
# The door to the house: the public names, imported when they are asked for, and the command. No module imports it.
DOOR = {"mnist_lightning", "mnist_lightning.__main__"}

# By file, what other packages call private. `_actions` is argparse's.
PRIVATE = {
    ("commands/parser.py", "_typehints"),  # of jsonargparse
    ("commands/parser.py", "_actions"),
    ("commands/cli.py", "_parse_ckpt_path"),  # of LightningCLI, overridden
}
DOCUMENTED = {"_replace", "_exit", "_"}  # of named tuples, of os: public in spite of the underscore


def module_of(path: Path) -> str:
    parts = ("mnist_lightning", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {module_of(path): ast.parse(path.read_text()) for path in FILES}


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


def lines_of(files: Iterable[Path]) -> int:
    return sum(len(path.read_text().splitlines()) for path in files)


TUTORIAL = [PACKAGE / f"{name}.py" for name in ("data", "sources", "classifier", "convnet", "resnet")]


@pytest.mark.parametrize(("files", "most"), [
    (TUTORIAL, 640), ([PACKAGE / "commands" / "cli.py"], 220), (FILES, 6900),
    (Path(__file__).parent.rglob("*.py"), 9100),
], ids=["the tutorial", "cli.py", "package", "tests"])  # fmt: skip
def test_it_stays_within_its_budget_of_lines(files: Iterable[Path], most: int) -> None:
    assert lines_of(files) <= most


def test_root_has_at_most_12_files() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= 12


def test_every_folder_is_installed() -> None:
    config = configparser.ConfigParser()
    config.read(PACKAGE.parent / "setup.cfg")
    assert config["options"]["packages"] == "find:"
    installed = find_packages(str(PACKAGE.parent), include=config["options.packages.find"]["include"].split())
    folders = {path.parent.relative_to(PACKAGE.parent) for path in FILES}
    assert {Path(*name.split(".")) for name in installed} == folders


# ---- Private names


def names_of(tree: ast.Module) -> tuple[set[str], set[str]]:
    """The private names that a module defines, and those that it uses."""
    defined, used = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            defined.add(node.name)
        elif isinstance(node, ast.Attribute):
            own = ast.unparse(node.value) == "self" and isinstance(node.ctx, ast.Store)
            (defined if own else used).add(node.attr)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            used |= set(".".join([*(alias.name for alias in node.names), vars(node).get("module") or ""]).split("."))
        elif isinstance(node, ast.Name):
            used.add(node.id)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr"):
            used.add(str(vars(node.args[1]).get("value")))
    private = {name for name in defined | used if name.startswith("_") and name.isidentifier()} - DOCUMENTED
    private -= {name for name in private if name.startswith("__")}
    return defined & private, used & private


def test_private_names_of_other_packages_are_the_listed_ones() -> None:
    """Those that are used and not defined here, and those that are defined and not used: a method that overrides."""
    names = {module: names_of(tree) for module, tree in TREES.items()}
    ours, used = (set().union(*sets) for sets in zip(*names.values(), strict=True))
    found = {
        (str(path.relative_to(PACKAGE)), name)
        for path in FILES
        for name in (names[module_of(path)][1] - ours) | (names[module_of(path)][0] - used)
    }
    assert found == PRIVATE
