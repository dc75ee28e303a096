"""python -m mnist_lightning fit | validate | test | predict | lr_find | export | demo"""

import sys

from mnist_lightning.commands.messages import COMMANDS, explain
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


def main() -> None:
    """The `mnist-lightning` command. What a person can mend ends in three lines and exit code 2."""
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if command in ("-h", "--help"):
        print(HELP)
        return
    if not command.startswith("-") and command not in COMMANDS.split(", "):
        # Said at once: importing torch and lightning takes seconds.
        message = f"invalid choice: '{command}' (choose from {COMMANDS})" if command else "no subcommand"
        sys.exit(report(explain(message, {}, {})))
    from mnist_lightning.commands.cli import run

    sys.exit(run())


if __name__ == "__main__":
    main()
