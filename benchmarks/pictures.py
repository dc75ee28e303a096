"""Pictures of one's own: configs/pictures.yaml beside the loop that PyTorch's transfer-learning tutorial teaches.

    python -m benchmarks.pictures --path hymenoptera --weights resnet18.pth
    python -m benchmarks.pictures --path hymenoptera --weights resnet18.pth --parts frozen --seeds 1 --epochs 1

--path holds train/CLASS/*.jpg and val/CLASS/*.jpg; the pictures in val are the test pictures. Prints Markdown: for each
seed the loop, a first and a second `fit` ran in turn, each a process of its own. A `fit` counts from the command to its
end, the loop the training of its epochs alone.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.report import gflops, machine, spread, table

ROOT = Path(__file__).parents[1]
SHORT = 5  # epochs of the loop that a whole `fit` is compared with
UNFROZEN = ["--model.trainable_layers", "1", "--trainer.callbacks+=GradualUnfreezing"]
UNFROZEN += ["--trainer.callbacks.layers", "[0,0,0,0,0,1]", "--trainer.max_epochs", "10"]


def timed(*command: str) -> tuple[str, float, float]:
    """(what it prints, seconds, peak memory in MB) of a Python process; of its memory that of its largest process.

    Raises:
        CalledProcessError: it fails.
    """
    start = time.perf_counter()
    arguments = [sys.executable, "-W", "ignore", *command]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        printed = process.stdout.read() if process.stdout else ""
        _, status, used = os.wait4(process.pid, 0)
    if status:
        raise subprocess.CalledProcessError(status, arguments, printed)
    return printed, time.perf_counter() - start, used.ru_maxrss / 1024


def loop(options: argparse.Namespace, everything: bool, seed: int) -> tuple[list[tuple[float, float]], float]:
    """(seconds of training so far, test accuracy in %) after each epoch, and the peak memory in MB."""
    code = f"import torch; from benchmarks.loops import tutorial_pictures; torch.manual_seed({seed})\n"
    code += f"epochs = tutorial_pictures({options.path!r}, {options.weights!r}, {everything})\n"
    code += f"for _, epoch in zip(range({options.epochs}), epochs): print(*epoch)"
    printed, _, memory = timed("-c", code)
    return [(float(seconds), float(right)) for seconds, right in map(str.split, printed.splitlines())], memory


def fit(options: argparse.Namespace, everything: bool, seed: int, folder: str) -> tuple[float, float, float]:
    """(seconds, test accuracy in %, peak memory in MB) of one `fit`."""
    command = ["-m", "mnist_lightning", "fit", "--config", "configs/pictures.yaml", "--data.path", options.path]
    command += ["--model.weights", options.weights, "--seed_everything", str(seed)]
    command += ["--trainer.default_root_dir", folder, *(UNFROZEN if everything else [])]
    printed, seconds, memory = timed(*command)
    (accuracy,) = re.findall(r"^Test accuracy +([\d.]+) %", printed, re.MULTILINE)
    return seconds, float(accuracy), memory


def compare(options: argparse.Namespace, everything: bool) -> str:
    """The table of one way to train: the head alone, or more."""
    short = min(SHORT, options.epochs)
    names = [f"the loop, {short} epochs", f"the loop, {options.epochs} epochs", "first `fit`", "second `fit`"]
    rows: list[list[tuple[float, float, float]]] = [[] for _ in names]
    for seed in range(options.seeds):
        epochs, memory = loop(options, everything, seed)
        measured = [(*epochs[short - 1], memory), (*epochs[-1], memory)]
        with tempfile.TemporaryDirectory() as folder:
            os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"  # a cache of one's own: the first fit must be a first one
            measured += [fit(options, everything, seed, folder) for _ in range(2)]
        for values, value in zip(rows, measured, strict=True):
            values.append(value)
        print(f"seed {seed}:", *measured, file=sys.stderr, flush=True)
    cells = []
    for name, values in zip(names, rows, strict=True):
        seconds, accuracies, memories = zip(*values, strict=True)
        deviation = f" ± {statistics.stdev(accuracies):.1f}" if len(values) > 1 else ""
        ratios = [took[0] / value for took, value in zip(rows[0], seconds, strict=True)]
        accuracy = f"{statistics.mean(accuracies):.1f}{deviation}"
        cells.append([name, accuracy, spread(seconds, " s", 1), spread(ratios), f"{max(memories):.0f} MB"])
    return table(["", "test accuracy, %", "seconds", f"faster than {short} epochs by", "peak memory"], cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", required=True)
    parser.add_argument("--weights", required=True, help="ResNet18's state dict in torchvision's names")
    parser.add_argument("--parts", nargs="+", choices=["frozen", "unfrozen"], default=["frozen", "unfrozen"])
    parser.add_argument("--seeds", type=int, default=3, help="n of each comparison")
    parser.add_argument("--epochs", type=int, default=25, help="of the loop")
    options = parser.parse_args()
    options.path, options.weights = (str(Path(path).resolve()) for path in (options.path, options.weights))
    print(f"{machine()}; {gflops():.0f} GFLOP/s in a matrix multiply; weights: `{Path(options.weights).name}`\n")
    for part in options.parts:
        print(f"### Pictures of one's own, {part}, {options.seeds} seeds\n")
        print(compare(options, part == "unfrozen") + "\n", flush=True)


if __name__ == "__main__":
    main()
