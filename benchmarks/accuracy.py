"""Test accuracy of the shipped configs over seeds: each run is the command that a reader types.

    python -m benchmarks.accuracy --config configs/convnet.yaml --seeds 3 --data_dir data
    python -m benchmarks.accuracy --quick

Prints a Markdown table. Options that follow `--` go to `fit`.
"""

import argparse
import contextlib
import statistics
import sys
import tempfile

from lightning.pytorch.callbacks import Timer

from benchmarks.report import machine, table
from mnist_lightning.commands.cli import CLI


def fit(args: list[str]) -> tuple[float, float]:
    """(test accuracy in %, seconds of training with its validation) of one `fit`."""
    cli = CLI(["fit", *args, "--trainer.callbacks+=Timer"])
    (timer,) = (callback for callback in cli.trainer.callbacks if isinstance(callback, Timer))
    return 100 * float(cli.trainer.callback_metrics["test/acc"]), float(timer.time_elapsed("train"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/convnet.yaml")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, ... so many")
    parser.add_argument("--data_dir", default="data")
    parser.add_argument("--quick", action="store_true", help="one seed on scikit-learn's digits: does it work?")
    args, options = parser.parse_known_args()
    options = [option for option in options if option != "--"]
    options += (
        ["--data.source", "digits", "--trainer.max_epochs", "1"] if args.quick else ["--data.data_dir", args.data_dir]
    )
    sys.argv[1:] = []

    rows, accuracies = [], []
    with tempfile.TemporaryDirectory() as root:
        for seed in range(1 if args.quick else args.seeds):
            where = ["--seed_everything", str(seed), "--trainer.default_root_dir", root]
            with contextlib.redirect_stdout(sys.stderr):
                accuracy, seconds = fit(["--config", args.config, *where, *options])
            accuracies.append(accuracy)
            rows.append([str(seed), f"{accuracy:.2f}", f"{seconds:.1f}"])
            print(f"seed {seed}: {accuracy:.2f} %, {seconds:.1f} s", file=sys.stderr, flush=True)
    deviation = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
    rows.append([f"mean of {len(accuracies)}", f"**{statistics.mean(accuracies):.2f}** ± {deviation:.2f}", ""])
    print(f"`{args.config}`; {machine()}\n")
    print(table(["seed", "test accuracy, %", "training, s"], rows))


if __name__ == "__main__":
    main()
