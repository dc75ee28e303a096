"""How fast: the project beside the original's loops and a bare loop, as ratios from runs in turn on one machine.

    python -m benchmarks.speed --weights resnet18.pth --data_dir data
    python -m benchmarks.speed --weights resnet18.pth --data_dir data --parts convnet startup
    python -m benchmarks.speed --weights resnet18.pth --data_dir data --quick

Prints Markdown. --quick shows in two minutes that everything runs; its figures mean nothing.
"""

import argparse
import ast
import contextlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import torch
from jsonargparse.typing import PositiveInt
from lightning.pytorch import Callback

from benchmarks.report import gflops, machine, spread, table
from mnist_lightning.commands.cli import CLI
from mnist_lightning.data import MNISTDataModule
from mnist_lightning.resnet import ResNet18
from mnist_lightning.sources import Digits, Split

memory: dict[str, float] = {}  # peak, in MB, of what ran elsewhere


class FirstImages(MNISTDataModule):
    """MNIST cut to its first images, for measurements that would take long on all of them.

    Args:
        images: how many training images; the test set is cut to as many.
    """

    def __init__(self, images: PositiveInt = 10000, data_dir: str = "data") -> None:  # type: ignore[valid-type]
        super().__init__(source="mnist", data_dir=data_dir, val_size=1 / 12)
        self.images = images

    def load(self) -> Digits:
        whole = super().load()
        return Digits(*(Split(part.images[: self.images], part.labels[: self.images]) for part in whole))


class Stopwatch(Callback):
    """Seconds of a fit: of its epochs, with validation and checkpoints; and the feature pass before them."""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self.fit_start = time.perf_counter()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.train_start = time.perf_counter()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        start = self.fit_start if isinstance(pl_module, ResNet18) else self.train_start
        self.seconds = time.perf_counter() - start


class FirstStep(Callback):
    """Prints the time of day at the first training step."""

    def on_train_batch_start(self, *_: Any) -> None:
        print(f"first step at {time.time()}", flush=True)


def fit(*args: str) -> tuple[float, float]:
    """(seconds of training, test accuracy in %) of one `fit` as shipped, progress bar included."""
    with tempfile.TemporaryDirectory() as root, open(os.devnull, "w") as null:
        with contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
            options = ["--trainer.default_root_dir", root, "--trainer.enable_progress_bar", "true"]
            cli = CLI(["fit", *options, *args, f"--trainer.callbacks+={Stopwatch.__module__}.Stopwatch"])
    (watch,) = (callback for callback in cli.trainer.callbacks if isinstance(callback, Stopwatch))
    return watch.seconds, 100 * float(cli.trainer.callback_metrics["test/acc"])


def fits(*args: str) -> Iterator[float]:
    """The seconds of one such fit after another."""
    while True:
        yield fit(*args)[0]


def elsewhere(loop: str) -> Generator[Any, None, None]:
    """What a loop over a generator of this module or benchmarks.loops yields, in a process that rests in between.

    In this process the loops would share what `fit` asks of malloc, see memory.py.
    """
    code = "from benchmarks.loops import *\nimport resource\n"
    code += "from mnist_lightning.runs.memory import keep_freed_memory\n"
    peak = "resource.getrusage(resource.RUSAGE_SELF).ru_maxrss"
    code += f"{loop}\n    print('yielded', repr(value), {peak}, flush=True); input()"
    command = [sys.executable, "-W", "ignore", "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            for line in process.stdout or ():
                if line.startswith("yielded "):
                    value, kilobytes = line.removeprefix("yielded ").rsplit(maxsplit=1)
                    memory.setdefault(loop, int(kilobytes) / 1024)  # of the first: later ones add what it freed
                    yield ast.literal_eval(value)
                    print(file=process.stdin, flush=True)
        finally:
            process.kill()


def convnet(options: argparse.Namespace) -> None:
    """One epoch of the default recipe, five ways in turn, and the peak memory of them."""
    steps = 20 if options.quick else None
    args = ["--data.source", "mnist", "--data.data_dir", options.data_dir, "--trainer.max_epochs", "1"]
    args += ["--trainer.limit_train_batches", "20"] if options.quick else []
    fit = "from benchmarks.speed import fits\nfor value in fits(*{!r}):"
    loops = {
        "the original's loop": f"for value, _ in tutorial_convnet({options.writable!r}, {steps}):",
        "a bare loop over in-memory batches": f"for value in bare_convnet({options.data_dir!r}, {steps}):",
        "the bare loop, freed memory kept": f"keep_freed_memory()\nfor value in bare_convnet({options.data_dir!r}, "
        f"{steps}):",
        "`fit`": fit.format(args),
        "`fit`, `--trainer.precision bf16-mixed`": fit.format([*args, "--trainer.precision", "bf16-mixed"]),
    }
    ways = {name: elsewhere(loop) for name, loop in loops.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    before = 0.0
    for _ in range(options.rounds):
        for name, way in ways.items():
            seconds[name].append(next(way))
        tutorial = seconds["the original's loop"]
        tutorial[-1], before = tutorial[-1] - before, tutorial[-1]
    peaks = [memory[loop] for loop in loops.values()]
    bare = peaks[1]
    rows = []
    for (name, values), peak in zip(seconds.items(), peaks, strict=True):
        to_bare = [a / b for a, b in zip(values, seconds["a bare loop over in-memory batches"], strict=True)]
        to_tutorial = [a / b for a, b in zip(values, tutorial, strict=True)]
        ratios = [spread(to_bare), spread(to_tutorial)]
        rows.append([name, spread(values, " s", 1), *ratios, f"{peak:.0f} MB, {peak / bare:.2f} of the bare loop's"])
    print("### One epoch of ConvNet\n")
    print(table(["loop", "seconds", "ratio to the bare loop", "ratio to the original's", "peak memory"], rows) + "\n")


def fast(options: argparse.Namespace) -> None:
    """The original's ten epochs, and after each of them a whole fit of configs/convnet_fast.yaml with another seed."""
    steps = 20 if options.quick else None
    tutorial = elsewhere(f"for value in tutorial_convnet({options.writable!r}, {steps}):")
    config = [
        "--config",
        str(Path(__file__).parents[1] / "configs/convnet_fast.yaml"),
        "--data.data_dir",
        options.data_dir,
    ]
    ways: dict[str, list[str]] = {
        "`fit`": [],
        "`fit`, `--trainer.precision bf16-mixed`": ["--trainer.precision", "bf16-mixed"],
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    accuracies: dict[str, list[float]] = {name: [] for name in ways}
    for seed in range(1 if options.quick else 10):
        whole, tutorial_accuracy = next(tutorial)
        for name, extra in ways.items():
            took, accuracy = fit(*config, "--seed_everything", str(seed), *extra)
            seconds[name].append(took)
            accuracies[name].append(accuracy)
    rows = [["the original's loop", f"{seed + 1} epochs", f"{whole:.0f} s (n = 1)", f"{tutorial_accuracy:.2f}", "1"]]
    for name in ways:
        deviation = statistics.stdev(accuracies[name]) if len(accuracies[name]) > 1 else 0.0
        ours = f"{statistics.mean(accuracies[name]):.2f} ± {deviation:.2f}, lowest {min(accuracies[name]):.2f}"
        faster = f"**{whole / statistics.median(seconds[name]):.0f}**"
        rows.append([name, "220 batches", spread(seconds[name], " s", 1), ours, faster])
    print("### 99 % as soon as possible: `configs/convnet_fast.yaml`\n")
    print(table(["", "length", "training", "test accuracy, %", "faster by"], rows) + "\n")


def startup(options: argparse.Namespace) -> None:
    """From the command to its answer, whole processes in turn."""
    project = [sys.executable, "-m", "mnist_lightning"]
    data = ["--data.source", "mnist", "--data.data_dir", options.data_dir]
    commands = {
        "`python -c 'import torch'`": [sys.executable, "-c", "import torch"],
        "`python -c 'import lightning.pytorch.cli'`": [sys.executable, "-c", "import lightning.pytorch.cli"],
        "`fitt` (misspelt command)": [*project, "fitt"],
        "`--help`": [*project, "--help"],
        "`fit --help`": [*project, "fit", "--help"],
        "`fit --data.batch_sise 1` (misspelt option)": [*project, "fit", "--data.batch_sise", "1"],
        "`fit`, to its first training step": [
            *[*project, "fit", *data, "--trainer.max_steps", "1", "--trainer.limit_val_batches", "0"],
            *["--trainer.callbacks+=benchmarks.speed.FirstStep"],
        ],
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    here = str(Path(__file__).parents[1])
    with tempfile.TemporaryDirectory() as root:
        for _ in range(1 if options.quick else options.rounds + 2):
            for name, command in commands.items():
                start, clock = time.perf_counter(), time.time()
                env = {**os.environ, "PYTHONPATH": here}
                done = subprocess.run(command, cwd=root, capture_output=True, text=True, env=env)
                took = time.perf_counter() - start
                if "first step at" in done.stdout:
                    took = float(done.stdout.split("first step at")[1].split()[0]) - clock
                seconds[name].append(took)
    base = seconds["`python -c 'import lightning.pytorch.cli'`"]
    rows = [
        [name, spread(values, " s"), spread([a / b for a, b in zip(values, base, strict=True)])]
        for name, values in seconds.items()
    ]
    print("### Start-up\n")
    print(table(["command", "seconds", "ratio to importing LightningCLI"], rows) + "\n")


def saving(options: argparse.Namespace) -> None:
    """Writing `last.ckpt`, which `fit` does once a minute."""
    rows = []
    for name, extra in {"ConvNet": [], "ResNet18": ["--model.weights", "none", "--model.image_size", "28"]}.items():
        with tempfile.TemporaryDirectory() as root:
            where = ["--data.source", "digits", "--trainer.max_epochs", "1", "--trainer.default_root_dir", root]
            with open(os.devnull, "w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
                trainer = CLI(["fit", "--model", name, *extra, *where]).trainer
            seconds = []
            for _ in range(2 if options.quick else 20):
                start = time.perf_counter()
                trainer.save_checkpoint(Path(root) / "last.ckpt", weights_only=False)
                seconds.append(time.perf_counter() - start)
            size = (Path(root) / "last.ckpt").stat().st_size / 1e6
        milliseconds = spread([1000 * value for value in seconds], " ms", 0)
        rows.append([name, f"{size:.1f} MB", milliseconds, f"{100 * statistics.median(seconds) / 60:.2f} %"])
    print("### Saving a checkpoint\n")
    print(table(["model", "file", "one save", "of a minute"], rows) + "\n")


def resnet18(options: argparse.Namespace) -> None:
    """A frozen ResNet18 for five epochs: the original's, by one epoch after another, between them whole fits."""
    rows = []
    for size, images in ((28, 300),) if options.quick else ((28, 60000), (64, 60000)):
        arguments = f"{options.writable!r}, {options.weights!r}, {size}, {images}"
        tutorial = elsewhere(f"for value, _ in tutorial_resnet18({arguments}):")
        epochs: list[float] = []
        bare = elsewhere(f"for value in bare_head({images}, 5):")
        seconds: dict[str, list[float]] = {"first `fit`": [], "second `fit`": [], "a bare loop over kept features": []}
        for _ in range(options.rounds):
            epochs.append(next(tutorial) - sum(epochs))
            shutil.rmtree(os.environ["XDG_CACHE_HOME"], ignore_errors=True)
            for name, values in seconds.items():
                values.append(fit(*frozen(options, size, images, 5))[0] if "`fit`" in name else next(bare))
        tutorial.close()
        whole = f"{5 * statistics.median(epochs):.0f} s (epochs {spread(epochs, ' s', 1)})"
        for name, values in seconds.items():
            faster = spread([5 * epoch / value for epoch, value in zip(epochs, values, strict=True)], "", 1)
            rows.append([str(size), name, whole, spread(values, " s", 1), faster])
    print("### Five epochs of a frozen ResNet18\n")
    print(table(["image size", "", "the original's loop", "this", "faster by"], rows) + "\n")


def frozen(options: argparse.Namespace, size: int, images: int, epochs: int) -> list[str]:
    return [
        *["--model", "ResNet18", "--model.weights", options.weights, "--model.image_size", str(size)],
        *["--data", "benchmarks.speed.FirstImages", "--data.images", str(images), "--data.data_dir", options.data_dir],
        *["--trainer.max_epochs", str(epochs)],
    ]


def main() -> None:
    parts = {part.__name__: part for part in (convnet, fast, startup, saving, resnet18)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", default="data", help="holds MNIST/raw")
    parser.add_argument("--weights", required=True, help="ResNet18's state dict in torchvision's names")
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--rounds", type=int, default=3, help="n of each comparison")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    sys.argv[1:] = []

    torch.manual_seed(0)
    options.rounds = 1 if options.quick else options.rounds
    options.data_dir, options.weights = (str(Path(path).resolve()) for path in (options.data_dir, options.weights))
    print(f"{machine()}; {gflops():.0f} GFLOP/s in a matrix multiply\n")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"  # a cache of one's own: the first fit must be a first one
        shutil.copytree(f"{options.data_dir}/MNIST/raw", f"{folder}/MNIST/raw")  # where torchvision may unpack
        options.writable = folder
        for name in options.parts:
            parts[name](options)


if __name__ == "__main__":
    main()
