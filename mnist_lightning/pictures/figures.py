"""The drawings: grids of images, the confusion matrix, each class's precision and recall, mistakes, curves, report.png.

B = batch size, C = classes, K = channels of an image, 1 or 3.
"""

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.utils import make_grid

from mnist_lightning.files import write_whole
from mnist_lightning.resnet import ResNet18

MISTAKES = 25
SIDE = 64  # pixels, at most, of an image that is kept
WIDTH = 480  # pixels, at least, of a grid of small images
STAGES = 5  # layers, at most, whose feature maps are shown
LABELLED = 15  # classes, at most, that are labelled one by one


class Mistake(NamedTuple):
    confidence: float
    label: int
    predicted: int
    image: Tensor  # uint8 (K, S, S)


class Answers(NamedTuple):
    """What a model answered in an evaluation, in little memory, however many images there are."""

    names: list[str]  # of the classes
    counts: Tensor  # (C, C): how many images of each label were classified as what
    mistakes: list[Mistake]  # the most confident ones; none where there are no images to show

    @property
    def short_names(self) -> bool:
        return max(map(len, self.names)) <= 2


def answers_of(names: list[str], logits: Tensor, labels: Tensor, images: Tensor | None) -> Answers:
    """Answers of one batch: logits (B, C), labels (B,), images (B, K, H, W)."""
    confidence, predicted = logits.softmax(1).max(1)
    counts = torch.bincount(labels * len(names) + predicted, minlength=len(names) ** 2).view(len(names), -1)
    wrong = torch.nonzero(predicted != labels).ravel()
    wrong = wrong[confidence[wrong].argsort(descending=True)][:MISTAKES]
    columns = (confidence[wrong].tolist(), labels[wrong].tolist(), predicted[wrong].tolist())
    return Answers(names, counts, [] if images is None else list(map(Mistake, *columns, thumbnails(images[wrong]))))


def merged(parts: list[Answers]) -> Answers:
    mistakes = sorted((mistake for part in parts for mistake in part.mistakes), key=lambda mistake: -mistake.confidence)
    return Answers(parts[0].names, torch.stack([part.counts for part in parts]).sum(0), mistakes[:MISTAKES])


def thumbnails(images: Tensor) -> Tensor:
    """Images (N, K, H, W) of any type and range as uint8 (N, K, S, S), each from its lowest value to its highest."""
    pixels = images.detach().float().cpu()
    low, high = pixels.amin((1, 2, 3), keepdim=True), pixels.amax((1, 2, 3), keepdim=True)
    pixels = (pixels - low) / (high - low).clamp(min=1e-6)
    scale = SIDE / max(pixels.shape[2:])
    if scale < 1:
        size = [max(1, round(scale * side)) for side in pixels.shape[2:]]
        pixels = F.interpolate(pixels, size, mode="bilinear", antialias=True)
    height, width = pixels.shape[2:]
    side = max(height, width)  # TensorBoard's projector takes squares
    left, top = (side - width) // 2, (side - height) // 2
    return (255 * F.pad(pixels, (left, side - width - left, top, side - height - top))).round().byte()


def grid(images: Tensor) -> Tensor:
    """Images (N, K, H, W), each brought to [0, 1], side by side and enlarged: (3, H', W')."""
    rows = make_grid(images.float(), nrow=8, padding=1, normalize=True, scale_each=True, pad_value=0.5)
    factor = max(1, -(-WIDTH // rows.shape[2]))
    return rows.repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2)


def stages(model: nn.Module) -> dict[str, nn.Module]:
    """The layers whose feature maps are worth looking at, by name, in order: ResNet18's blocks; else convolutions."""
    if isinstance(model, ResNet18):
        net = model.backbone
        blocks = {f"layer{number}": net.get_submodule(f"layer{number}") for number in (1, 2, 3, 4)}
        return {"stem": net.maxpool, **blocks}
    convolutions = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d)}
    return dict(itertools.islice(convolutions.items(), STAGES))


def feature_maps(model: nn.Module, image: Tensor) -> dict[str, Tensor]:
    """What each of the model's `stages` makes of an image (1, K, H, W), its first 32 channels: (32, H, W) by name."""
    maps: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda module, inputs, output: maps.update({name: output[0, :32].detach().float().cpu()})

    hooks = [stage.register_forward_hook(keep(name)) for name, stage in stages(model).items()]
    try:
        with evaluated(model):
            model(image)
    finally:
        for hook in hooks:
            hook.remove()
    return maps


@contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode: what passes it meanwhile leaves no trace in BatchNorm's statistics."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.train(training)


def report(path: Path, answers: Answers | None, rows: list[dict[str, float]]) -> None:
    """Writes the curves of metrics.csv's rows, and below them what the answers show, as a PNG."""
    rows_of_axes, heights = [["loss", "metric"]], [4.0]
    if answers is not None:
        rows_of_axes, heights = [*rows_of_axes, ["confusion", "mistakes"], ["classes"] * 2], [4.0, 6.5, 2.8]
    sheet = figure(11, sum(heights))
    axes = sheet.subplot_mosaic(rows_of_axes, height_ratios=heights)
    measured = {name.split("/")[1] for row in rows for name in row if name.startswith(("val/", "test/"))}
    others = sorted(name for name in measured if not name.startswith("loss"))
    draw_curves(axes["loss"], rows, "loss")
    draw_curves(axes["metric"], rows, "acc" if "acc" in others or not others else others[0])
    if answers is not None:
        draw_confusion(axes["confusion"], answers)
        draw_mistakes(axes["mistakes"], answers)
        draw_classes(axes["classes"], answers)
    with write_whole(path) as file:
        sheet.savefig(file, format="png", dpi=100)


def figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure  # not at the top: it would delay each start

    return Figure((width, height), layout="constrained")


def draw_curves(axes: Any, rows: list[dict[str, float]], metric: str) -> None:
    for part, colour in (("train", "C0"), ("val", "C1"), ("test", "C2")):
        # Lightning's own names: an epoch's mean is `_epoch` where single batches are logged as well, as `_step`.
        for suffix, style, label in (("_step", "-", f"{part}, one batch"), ("", "o-", part), ("_epoch", "o-", part)):
            points = [(row["step"], row[name]) for row in rows if (name := f"{part}/{metric}{suffix}") in row]
            if points:
                alpha = 0.3 if suffix == "_step" else 1
                axes.plot(*zip(*points, strict=True), style, color=colour, alpha=alpha, markersize=3, label=label)
    axes.set(title={"loss": "Loss", "acc": "Accuracy"}.get(metric, metric), xlabel="training steps")
    if axes.lines:
        axes.legend()


def draw_confusion(axes: Any, answers: Answers) -> None:
    counts, classes = answers.counts, len(answers.names)
    mistakes = counts.clone().fill_diagonal_(0)  # the colours tell the mistakes apart
    highest = max(1, int(mistakes.max()))
    colours = axes.imshow(mistakes.numpy(), cmap="Reds", vmin=0, vmax=highest)
    if classes > LABELLED:
        ticks = range(0, highest + 1, max(1, highest // 5))
        axes.figure.colorbar(colours, ax=axes, ticks=ticks, label="images classified wrongly", shrink=0.8)
    else:
        for label, predicted in torch.cartesian_prod(*[torch.arange(classes)] * 2).tolist():
            count = int(counts[label, predicted])
            colour = "white" if mistakes[label, predicted] > highest / 2 else "black" if count else "lightgrey"
            size = 8 if classes <= 10 else 6
            axes.text(predicted, label, count, ha="center", va="center", color=colour, fontsize=size)
    label_classes(axes.xaxis, answers.names, rotation=90)
    label_classes(axes.yaxis, answers.names)
    axes.set(xlabel="classified as", ylabel="label")
    axes.set_title(f"Confusion matrix, {int(counts.sum()):,} images", fontsize=10)


def draw_classes(axes: Any, answers: Answers) -> None:
    """The precision of each class, the share of what was classified as it that is right, and its recall, the share of
    its images that were found."""
    right, classes = answers.counts.diagonal(), len(answers.names)
    lowest = 100.0
    for side, name, of, colour in ((-0.2, "precision", 0, "lightsteelblue"), (0.2, "recall", 1, "steelblue")):
        shares = (100 * right / answers.counts.sum(of)).tolist()
        bars = axes.bar([label + side for label in range(classes)], shares, 0.4, color=colour, label=name)
        if classes <= LABELLED:
            shown = ["" if math.isnan(share) else f"{share:.3g}" for share in shares]
            size, rotation = 8 if classes <= 10 else 6, 0 if classes <= 5 else 90
            axes.bar_label(bars, shown, fontsize=size, rotation=rotation, padding=2)
        lowest = min([lowest, *(share for share in shares if not math.isnan(share))])  # a class may have no images
    label_classes(axes.xaxis, answers.names, rotation=90)
    bottom = max(0, lowest - 5)
    axes.set(ylim=(bottom, 100 + (100 - bottom) / 4), ylabel="%")
    axes.set_yticks([tick for tick in axes.get_yticks() if bottom <= tick <= 100])
    axes.set_title(f"Accuracy {100 * int(right.sum()) / int(answers.counts.sum()):.2f} %", fontsize=10, loc="left")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, fontsize=8, frameon=False)


def label_classes(axis: Any, names: list[str], rotation: int = 0) -> None:
    every = math.ceil(len(names) / LABELLED)
    shown = [cut(name) for name in names[::every]]
    room = sum(map(len, shown)) < 40
    axis.set_ticks(range(0, len(names), every), shown, fontsize=8, rotation=0 if room else rotation)


def cut(name: str) -> str:
    short = name if len(name) <= 11 else f"{name[:5]}…{name[-5:]}"
    return short.replace("$", r"\$")  # which would begin a formula


def draw_mistakes(axes: Any, answers: Answers) -> None:
    wrong = int(answers.counts.sum() - answers.counts.diagonal().sum())
    axes.set_title(f"The most confident of {wrong:,} mistakes: label→classified as", fontsize=9)
    axes.axis("off")
    if not answers.mistakes:
        return
    side = answers.mistakes[0].image.shape[-1]
    margin, text = side // 6, side // 4 if answers.short_names else side * 2 // 3  # pixels of an image
    tiles = F.pad(torch.stack([mistake.image for mistake in answers.mistakes]), (margin, margin, 0, text), value=255)
    height, width = tiles.shape[2:]
    sheet = make_grid(tiles, nrow=5, padding=0, pad_value=255)
    axes.imshow(sheet.permute(1, 2, 0).numpy())
    axes.set(xlim=(0, 5 * width), ylim=(5 * height, 0))  # the same size of one mistake as of 25
    for i, (confidence, label, predicted, _) in enumerate(answers.mistakes):
        arrow, gap = ("→", " ") if answers.short_names else ("→\n", "\n")
        said = f"{cut(answers.names[label])}{arrow}{cut(answers.names[predicted])}{gap}{100 * confidence:.0f} %"
        axes.text((i % 5 + 0.5) * width, i // 5 * height + 1.04 * side, said, ha="center", va="top", fontsize=7)
