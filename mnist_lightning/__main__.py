"""python -m mnist_lightning fit | validate | test | predict | lr_find | export | demo"""

import io
import os
import select
import sys

from mnist_lightning.commands.messages import COMMAND_NAMES, explain
from mnist_lightning.errors import report

HELP = """usage: python -m mnist_lightning COMMAND [options]

  fit        trains, keeps the best and the last checkpoint, and tests the best one
  validate   measures a checkpoint on the validation images
  test       measures a checkpoint on the 10,000 test images
  predict    reads the test images, or your own: --data Photos --data.path FOLDER
  lr_find    looks for a learning rate; nothing is trained
  export     writes a checkpoint as .onnx, .pt2 or .safetensors
  demo       opens a page to draw digits on

COMMAND --help lists its options; fit --model.help ResNet18 those of a model."""

CLOSED_PIPE = 128 + 13  # as of a program that SIGPIPE ends


def main() -> None:
    """The `mnist-lightning` command. What a person can mend ends in three lines and exit code 2."""
    code: int | str | None
    # None where they were closed, as by >&-
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a "?" for what the console can't show: a class, a folder
    try:
        try:
            code = command()
        except SystemExit as ended:
            code = ended.code
        sys.stdout.flush()
    except BrokenPipeError:
        if not nobody_reads():
            raise
        code = CLOSED_PIPE
    sys.exit(code)


def command() -> int | str | None:
    """Runs the command that is typed; returns the exit code."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in ("-h", "--help"):
        print(HELP)
        return 0
    if not name.startswith("-") and name not in COMMAND_NAMES.split(", "):
        # Said at once: importing torch and lightning takes seconds.
        message = f"invalid choice: '{name}' (choose from {COMMAND_NAMES})" if name else "no subcommand"
        return report(explain(message, {}, {}))
    from mnist_lightning.commands.cli import run

    return run()


def nobody_reads() -> bool:
    """Whether what is printed goes into a closed pipe, as after `| head -3`; if so, it goes nowhere from now on."""
    poll = select.poll()
    for stream in (sys.stdout, sys.stderr):
        poll.register(stream, 0)  # asks for errors alone
    closed = [descriptor for descriptor, event in poll.poll(0) if event & select.POLLERR]
    for descriptor in closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)  # else Python would report it when it ends
    return bool(closed)


if __name__ == "__main__":
    main()
