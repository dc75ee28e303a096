"""The drawings: grids of images, the confusion matrix, accuracy by class, the mistakes, the curves, report.png.

N = images of an evaluation, C = classes, K = channels of an image, 1 or 3.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.utils import make_grid

from mnist_lightning.classifier import DigitClassifier
from mnist_lightning.files import write_whole

MISTAKES = 25
SIDE = 64  # pixels, at most, of a thumbnail
WIDTH = 480  # pixels, at least, of a grid of small images
LABELLED = 15  # classes, at most, that are labelled one by one


class Answers(NamedTuple):
    """What a model answered in an evaluation."""

    names: list[str]  # of the classes
    logits: Tensor  # (N, C)
    labels: Tensor  # (N,)
    images: Tensor  # thumbnails (N, K, S, S)


def thumbnails(images: Tensor) -> Tensor:
    """Images (N, K, H, W) of any type and range as uint8 (N, K, S, S), each from its lowest value to its highest."""
    pixels = images.detach().float().cpu()
    low, high = pixels.amin((1, 2, 3), keepdim=True), pixels.amax((1, 2, 3), keepdim=True)
    pixels = 255 * (pixels - low) / (high - low).clamp(min=1e-6)
    height, width = pixels.shape[2:]
    missing = max(height, width) - height, max(height, width) - width
    pixels = F.pad(pixels, (missing[1] // 2, missing[1] - missing[1] // 2, missing[0] // 2, missing[0] - missing[0] // 2))
    if pixels.shape[2] > SIDE:
        pixels = F.interpolate(pixels, SIDE, mode="bilinear", antialias=True)
    return pixels.round().byte()


def grid(images: Tensor) -> Tensor:
    """Images (N, K, H, W), each brought to [0, 1], side by side and enlarged: (3, H', W')."""
    rows = make_grid(images.float(), nrow=8, padding=1, normalize=True, scale_each=True, pad_value=0.5)
    factor = max(1, -(-WIDTH // rows.shape[2]))
    return rows.repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2)


def feature_maps(model: DigitClassifier, image: Tensor) -> dict[str, Tensor]:
    """What each of the model's `stages` makes of an image (1, K, H, W), its first 32 channels: (32, H, W) by name."""
    maps: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda module, inputs, output: maps.update({name: output[0, :32].detach().float().cpu()})

    hooks = [stage.register_forward_hook(keep(name)) for name, stage in model.stages().items()]
    with evaluated(model):
        model(image)
    for hook in hooks:
        hook.remove()
    return maps


@contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode: what passes it meanwhile leaves no trace in BatchNorm's statistics."""
    training = model.training
    model.eval()
    with torch.no_grad():
        yield
    model.train(training)


def report(path: Path, answers: Answers | None, rows: list[dict[str, float]]) -> None:
    """Writes the curves of metrics.csv's rows, and below them what the answers show, as a PNG."""
    sheet = figure(11, 4 if answers is None else 9)
    loss, accuracy, *below = sheet.subplots(1 if answers is None else 2, 2).ravel()
    draw_curves(loss, rows, "loss", "Loss")
    draw_curves(accuracy, rows, "acc", "Accuracy")
    if answers is not None:
        draw_confusion(below[0], answers)
        draw_mistakes(below[1], answers)
    with write_whole(path) as file:
        sheet.savefig(file, format="png", dpi=100)


def figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure  # not at the top: it would delay each start

    return Figure((width, height), layout="constrained")


def draw_curves(axes: Any, rows: list[dict[str, float]], metric: str, title: str) -> None:
    for part in ("train", "val", "test"):
        points = [(row["step"], row[f"{part}/{metric}"]) for row in rows if f"{part}/{metric}" in row]
        if points:
            axes.plot(*zip(*points, strict=True), "o" if part == "test" else "o-", markersize=3, label=part)
    axes.set(title=title, xlabel="training steps")
    if axes.lines:
        axes.legend()


def draw_confusion(axes: Any, answers: Answers) -> None:
    classes = len(answers.names)
    predicted = answers.logits.argmax(1)
    counts = torch.bincount(answers.labels * classes + predicted, minlength=classes**2).view(classes, -1)
    mistakes = counts.clone().fill_diagonal_(0)  # the colours tell the mistakes apart
    colours = axes.imshow(mistakes.numpy(), cmap="Reds")
    if classes > LABELLED:
        axes.figure.colorbar(colours, ax=axes, label="images classified wrongly", shrink=0.8)
    else:
        for label, column in torch.cartesian_prod(*[torch.arange(classes)] * 2).tolist():
            count = int(counts[label, column])
            colour = "white" if mistakes[label, column] > mistakes.max() / 2 else "black" if count else "lightgrey"
            axes.text(column, label, count, ha="center", va="center", color=colour, fontsize=8)
    label_classes(axes.xaxis, answers.names, rotation=90)
    label_classes(axes.yaxis, answers.names)
    axes.set(xlabel="classified as", ylabel="label")
    axes.set_title(f"Confusion matrix, {len(predicted):,} images", fontsize=10)


def draw_classes(axes: Any, answers: Answers) -> None:
    right = answers.logits.argmax(1) == answers.labels
    shares = [100 * float(right[answers.labels == label].float().mean()) for label in range(len(answers.names))]
    bars = axes.bar(range(len(shares)), shares, color="steelblue")
    if len(shares) <= LABELLED:
        axes.bar_label(bars, fmt="%.1f", fontsize=8)
    label_classes(axes.xaxis, answers.names, rotation=90)
    low = min((share for share in shares if not math.isnan(share)), default=0)  # a class may have no images
    axes.set(ylim=(max(0, low - 5), 103), ylabel="accuracy, %")


def label_classes(axis: Any, names: list[str], rotation: int = 0) -> None:
    every = math.ceil(len(names) / LABELLED)
    shown = [short(name) for name in names[::every]]
    axis.set_ticks(range(0, len(names), every), shown, fontsize=8, rotation=rotation if len("".join(shown)) > 40 else 0)


def short(name: str) -> str:
    return name if len(name) <= 11 else f"{name[:10]}…"


def draw_mistakes(axes: Any, answers: Answers) -> None:
    confidence, predicted = answers.logits.softmax(1).max(1)
    wrong = torch.nonzero(predicted != answers.labels).ravel()
    chosen = wrong[confidence[wrong].argsort(descending=True)][:MISTAKES]
    axes.set_title(f"The most confident of {len(wrong):,} mistakes: label→classified as", fontsize=9)
    axes.axis("off")
    if len(chosen) == 0:
        return
    side = answers.images.shape[-1]
    tiles = F.pad(answers.images[chosen], (side // 4, side // 4, 0, side // 2), value=255)
    height, width = tiles.shape[2:]
    sheet = make_grid(tiles, nrow=5, padding=0, pad_value=255)
    axes.imshow(sheet.permute(1, 2, 0).numpy())
    axes.set(xlim=(0, 5 * width), ylim=(5 * height, 0))  # the same size of one mistake as of 25
    for i, index in enumerate(chosen.tolist()):
        names = f"{short(answers.names[int(answers.labels[index])])}→{short(answers.names[int(predicted[index])])}"
        said = f"{names}\n{100 * float(confidence[index]):.0f} %"
        axes.text((i % 5 + 0.5) * width, i // 5 * height + 1.05 * side, said, ha="center", va="top", fontsize=7)
