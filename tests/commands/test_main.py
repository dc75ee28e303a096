"""What `python -m mnist_lightning` answers by itself, before torch and lightning are imported."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mnist_lightning import __main__
from mnist_lightning.commands.messages import COMMAND_NAMES

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
    for command in COMMAND_NAMES.split(", "):
        assert f"\n  {command} " in answer.stdout


@pytest.mark.parametrize("args", [("fti",), ()])
def test_misspelt_or_missing_command_is_answered_without_torch(args: tuple[str, ...]) -> None:
    answer = run(*args)
    assert answer.returncode == 2 and answer.stdout == "False\n"
    assert answer.stderr.count("\n") == 3


def test_what_a_console_cannot_show_becomes_a_question_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    console = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", console)
    monkeypatch.setattr(__main__, "command", lambda: print("Run 猫"))
    with pytest.raises(SystemExit):
        __main__.main()
    console.seek(0)
    assert console.read() == "Run ?\n"


@pytest.mark.parametrize("closed", [">&-", "2>&-"])
def test_stream_may_be_closed(closed: str) -> None:
    command = f"{sys.executable} -m mnist_lightning --help {closed}"
    assert subprocess.run(command, shell=True, cwd=Path(__file__).parents[2]).returncode == 0


@pytest.mark.parametrize(("args", "buffered"), [("--help", True), ("--help", False), ("fit --data running.Few", False)])
def test_command_ends_quietly_when_nobody_reads_on(args: str, buffered: bool, tmp_path: Path) -> None:
    """As by `| head`: the pipe is closed before the first word."""
    tests = Path(__file__).parents[1]
    path = os.pathsep.join(map(str, (tests.parent, tests, tests / "runs")))
    reader, writer = os.pipe()
    os.close(reader)
    answer = subprocess.run(
        [sys.executable, "-m", "mnist_lightning", *args.split()], cwd=tmp_path, stdout=writer, stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "" if buffered else "1"},
    )  # fmt: skip
    os.close(writer)
    assert answer.returncode == 141
    assert "rror" not in answer.stderr and "Traceback" not in answer.stderr
