"""What fine-tuning buys: learning curves, how much to train, the best linear head, BatchNorm left in training mode.

    python -m benchmarks.finetuning --parts curves --data_dir data --pretraining digits=best.ckpt --plot curves.png
    python -m benchmarks.finetuning --weights resnet18.pth --data_dir data --parts range probe --seeds 1

Prints Markdown: test accuracies of the checkpoint that was best on the validation images, mean ± standard deviation
over seeds; another seed is another subset, too. --plot needs matplotlib.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch

from benchmarks.report import machine, table
from benchmarks.speed import fit
from mnist_lightning.data import split
from mnist_lightning.finetuning.features import extract
from mnist_lightning.resnet import ResNet18
from mnist_lightning.sources import Split, load_mnist

CONFIGS = Path(__file__).parents[1] / "configs"
# Epochs and batch size by training images: as many steps as the small sets need, and the large ones can afford.
# Three epochs at least, for the three steps of the gradual unfreezing.
LENGTHS = {100: (30, 16), 1000: (20, 32), 10000: (6, 64), 55000: (3, 64)}


def measured(options: argparse.Namespace, *args: str) -> tuple[str, float, float]:
    """(mean ± deviation as text, mean, seconds of one fit) of test accuracies in %."""
    accuracies, seconds = [], []
    for seed in range(options.seeds):
        took, accuracy = fit_seed(options, seed, *args)
        accuracies.append(accuracy)
        seconds.append(took)
    print(" ".join(args), accuracies, file=sys.stderr, flush=True)
    return spread(accuracies), statistics.mean(accuracies), statistics.median(seconds)


def fit_seed(options: argparse.Namespace, seed: int, *args: str) -> tuple[float, float]:
    """(seconds, test accuracy in %) of one fit on MNIST; another seed is another subset, too."""
    data = ["--data.source", "mnist", "--data.data_dir", options.data_dir, "--data.split_seed", str(seed)]
    return fit(*args, *data, "--seed_everything", str(seed))


def spread(accuracies: list[float]) -> str:
    """Mean ± standard deviation."""
    deviation = f" ± {statistics.stdev(accuracies):.2f}" if len(accuracies) > 1 else ""
    return f"{statistics.mean(accuracies):.2f}{deviation}"


def resnet(options: argparse.Namespace) -> list[str]:
    return ["--model.weights", options.weights, "--model.image_size", str(options.image_size)]


def columns(options: argparse.Namespace, size: int) -> dict[str, list[str]]:
    """What `fit` is told, by the column of the learning curves, for a row of `size` training images."""
    epochs, batch_size = LENGTHS[size]
    images = ["--data.train_size", str(size), "--data.val_size", "1000"]
    steps = [*images, "--data.batch_size", str(batch_size), "--trainer.max_epochs", str(epochs)]
    scratch = str(CONFIGS / "resnet18_digits.yaml")
    told = {
        "ConvNet from scratch": ["--config", str(CONFIGS / "convnet.yaml"), *steps],
        "ResNet18 from scratch": ["--config", scratch, "--data.augment", "0", *steps],
    }
    for number, pretraining in enumerate(options.pretraining):
        name, _, path = pretraining.partition("=")
        weights = ["--model.weights", path or name, "--model.image_size", str(options.image_size)]
        told[f"frozen, {name}"] = ["--config", str(CONFIGS / "resnet18_probe.yaml"), *images, *weights]
        if number == 0:
            phase = max(1, epochs // 4)
            schedule = {"class_path": "GradualUnfreezing", "init_args": {"layers": [0] * phase + [1] * phase + [2]}}
            callbacks = f"--trainer.callbacks=[{json.dumps(schedule)}]"
            config = str(CONFIGS / "resnet18_gradual.yaml")
            told[f"unfrozen gradually, {name}"] = ["--config", config, *steps, *weights, callbacks]
    return told


def curves(options: argparse.Namespace) -> None:
    """Accuracy by number of training images; what the file of --results already holds isn't run again."""
    results = Path(options.results)
    lines = results.read_text().splitlines() if results.exists() else []
    found = {(name, size, seed): accuracy for name, size, seed, accuracy in map(json.loads, lines)}
    for size in options.sizes:
        for name, args in columns(options, size).items():
            for seed in range(options.seeds):
                if (name, size, seed) not in found:
                    found[name, size, seed] = accuracy = fit_seed(options, seed, *args)[1]
                    with results.open("a") as file:
                        file.write(json.dumps([name, size, seed, accuracy]) + "\n")
    names = list(columns(options, options.sizes[0]))
    cells = {
        (name, size): [found[name, size, seed] for seed in range(options.seeds)]
        for name in names
        for size in options.sizes
    }
    rows = [
        [f"{size:,}", str(LENGTHS[size][0]), *(spread(cells[name, size]) for name in names)] for size in options.sizes
    ]
    print(f"### Learning curves, image size {options.image_size}, {options.seeds} seeds\n")
    print(table(["training images", "epochs (frozen: 20)", *names], rows) + "\n")
    if options.plot:
        points = {name: [statistics.mean(cells[name, size]) for size in options.sizes] for name in names}
        plot(options.sizes, points, options.plot)


def plot(sizes: list[int], points: dict[str, list[float]], path: str) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    figure = Figure(figsize=(7, 4.6), layout="constrained")
    panel = figure.subplots()
    for name, means in points.items():
        trained, _, pretraining = name.partition(", ")
        label = f"ResNet18 pretrained on {pretraining}, {trained}" if pretraining else name
        panel.plot(sizes, [100 - mean for mean in means], "o-", label=label)
    panel.set(xscale="log", yscale="log", xlabel="training images", ylabel="test error, %")
    panel.set_xticks(sizes, [f"{size:,}" for size in sizes])
    panel.set_yticks([1, 2, 5, 10, 20, 50], ["1", "2", "5", "10", "20", "50"])
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_minor_locator(NullLocator())
    panel.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    figure.savefig(path, dpi=120)


def layers(options: argparse.Namespace) -> None:
    """Accuracy and time by number of trainable layers."""
    rows = []
    names = ["none: the head alone", "layer4", "layer3 to 4", "layer2 to 4", "layer1 to 4", "all"]
    for count, name in enumerate(names):
        args = ["--config", str(CONFIGS / "resnet18_gradual.yaml"), "--trainer.callbacks", "null", *resnet(options)]
        args += ["--model.trainable_layers", str(count), "--data.train_size", "10000"]
        text, _, seconds = measured(options, *args)
        rows.append([str(count), name, text, f"{seconds:.0f} s"])
    print(f"### How much to train: 10,000 images, 3 epochs, image size {options.image_size}, {options.seeds} seeds\n")
    print(table(["--model.trainable_layers", "trained beside the head", "test accuracy, %", "training"], rows) + "\n")


def probe(options: argparse.Namespace) -> None:
    """configs/resnet18_probe.yaml beside scikit-learn's logistic regression on the same features."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    rows = []
    for size in (28, 64):
        args = ["--config", str(CONFIGS / "resnet18_probe.yaml"), "--model.weights", options.weights]
        text, _, seconds = measured(options, *args, "--model.image_size", str(size))
        rows.append([str(size), "`configs/resnet18_probe.yaml`", text, f"{seconds:.0f} s"])
        model = ResNet18(weights=options.weights, image_size=size)
        model.load_pretrained()
        digits = load_mnist(options.data_dir)
        features, test_features = (extract(model, part.images, show=True).numpy() for part in digits)
        labels, test_labels = (part.labels.numpy() for part in digits)
        references = []
        for seed in range(options.seeds):
            train, val = split(len(labels), 5000, seed)
            scaler = StandardScaler().fit(features[train])
            x, x_val, x_test = (scaler.transform(part) for part in (features[train], features[val], test_features))
            tried = [LogisticRegression(C=c, max_iter=300).fit(x, labels[train]) for c in (0.01, 0.1, 1.0)]
            best = max(tried, key=lambda reference: reference.score(x_val, labels[val]))
            references.append((100 * best.score(x_test, test_labels), best.C))
        print(size, references, file=sys.stderr, flush=True)
        strengths = sorted({strength for _, strength in references})
        name = f"scikit-learn's LogisticRegression, C={' or '.join(map(str, strengths))} by validation"
        rows.append([str(size), name, spread([accuracy for accuracy, _ in references]), ""])
    print(f"### The best linear head, {options.seeds} seeds\n")
    print(table(["image size", "", "test accuracy, %", "training"], rows) + "\n")


def batchnorm(options: argparse.Namespace) -> None:
    """The original's frozen ResNet18, whose BatchNorm layers stay in training mode, beside the project's."""
    digits = load_mnist(options.data_dir)
    images, labels = (part[:10000] for part in digits.train)
    test = Split(*(part[:2000] for part in digits.test))
    accuracies: dict[str, list[float]] = {}
    for seed in range(options.seeds):
        for training in (True, False):
            torch.manual_seed(seed)
            model = ResNet18(weights=options.weights, image_size=options.image_size)
            model.load_pretrained()
            model.backbone.train(training)
            optimizer = torch.optim.SGD(model.head.parameters(), lr=0.001, momentum=0.9)
            for _ in range(3):
                for batch in torch.randperm(len(labels)).split(64):
                    optimizer.zero_grad()
                    torch.nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
                    optimizer.step()
            name = "training mode" if training else "evaluation mode, as here"
            accuracies.setdefault(f"{name}; tested in the same", []).append(right(model, test, 64))
            if training:
                accuracies.setdefault(f"{name}; tested so two images at a time", []).append(right(model, test, 2))
                model.eval()
                accuracies.setdefault(f"{name}; tested in evaluation mode", []).append(right(model, test, 64))
    rows = [[name, f"{statistics.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})"]
            for name, values in accuracies.items()]  # fmt: skip
    print(f"### BatchNorm in a frozen backbone, image size {options.image_size}, {options.seeds} seeds\n")
    print("10,000 training images, 3 epochs of the original's SGD; 2,000 test images.\n")
    print(table(["the backbone while the head was trained", "test accuracy, %"], rows) + "\n")


def right(model: ResNet18, test: Split, size: int) -> float:
    """Accuracy in %, in batches of `size`."""
    with torch.no_grad():
        answers = torch.cat([model(batch).argmax(1) for batch in test.images.split(size)])
    return 100 * float((answers == test.labels).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {"curves": curves, "range": layers, "probe": probe, "batchnorm": batchnorm}
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--weights", default="imagenet", help="as --model.weights")
    parser.add_argument("--data_dir", default="data")
    parser.add_argument("--image_size", type=int, default=28)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sizes", nargs="+", type=int, choices=LENGTHS, default=list(LENGTHS), help="of the curves")
    help = "of the curves: NAME=FILE, or imagenet; the first is unfrozen gradually, too"
    parser.add_argument("--pretraining", nargs="+", default=["imagenet"], help=help)
    parser.add_argument("--results", default="curves.jsonl", help="of the curves: where each fit's accuracy is kept")
    parser.add_argument("--plot", help="PNG file for the learning curves")
    options = parser.parse_args()
    sys.argv[1:] = []
    torch.manual_seed(0)
    print(f"{machine()}; weights: `{Path(options.weights).name}`\n")
    for part in options.parts:
        parts[part](options)


if __name__ == "__main__":
    main()
