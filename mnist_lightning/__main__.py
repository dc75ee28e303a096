"""python -m mnist_lightning fit | validate | test | predict | export | demo"""

import sys

from mnist_lightning.errors import report
from mnist_lightning.explain import COMMANDS, explain


def main() -> None:
    """The `mnist-lightning` command. What a person can mend ends in three lines and exit code 2."""
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if not command.startswith("-") and command not in COMMANDS.split(", "):
        # Said at once: importing torch and lightning takes seconds.
        message = f"invalid choice: '{command}' (choose from {COMMANDS})" if command else "no subcommand"
        sys.exit(report(explain(message, {}, {})))
    from mnist_lightning.cli import run

    sys.exit(run())


if __name__ == "__main__":
    main()
