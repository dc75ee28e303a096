"""python -m mnist_lightning fit | validate | test | predict"""

import sys


def main() -> None:
    """The `mnist-lightning` command. What a person can mend ends in three lines and exit code 2."""
    from mnist_lightning.cli import run

    sys.exit(run())


if __name__ == "__main__":
    main()
