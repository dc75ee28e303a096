"""What `python -m mnist_lightning` answers by itself, before torch and lightning are imported."""

import subprocess
import sys

import pytest

from mnist_lightning.commands.messages import COMMANDS

# As runpy would, and then whether torch was imported.
CODE = """
import atexit, runpy, sys
atexit.register(lambda: print("torch" in sys.modules))
runpy.run_module("mnist_lightning", run_name="__main__")
"""


def run(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", CODE, *args], capture_output=True, text=True)


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_lists_every_command_without_torch(option: str) -> None:
    answer = run(option)
    assert answer.returncode == 0 and answer.stdout.endswith("\nFalse\n")
    for command in COMMANDS.split(", "):
        assert f"\n  {command} " in answer.stdout


@pytest.mark.parametrize("args", [("fti",), ()])
def test_misspelt_or_missing_command_is_answered_without_torch(args: tuple[str, ...]) -> None:
    answer = run(*args)
    assert answer.returncode == 2 and answer.stdout == "False\n"
    assert answer.stderr.count("\n") == 3
