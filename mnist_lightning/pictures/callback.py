"""Pictures: what a run looks like, in TensorBoard's image, graph and projector tabs, and in report.png.

N = images of an evaluation. All is drawn once, at the end of what it shows, so that it costs next to nothing.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torchvision.utils import make_grid

from mnist_lightning.classifier import NUM_CLASSES
from mnist_lightning.data import MNISTDataModule
from mnist_lightning.files import write_whole

MISTAKES = 25
EMBEDDED = 1000  # test images in the projector
WIDTH = 480  # pixels, at least, of a grid of small images


class Answers(NamedTuple):
    """An evaluation: logits (N, 10), labels (N,), images uint8 (N, 1, 28, 28)."""

    logits: Tensor
    labels: Tensor
    images: Tensor


class Pictures(Callback):
    """Draws under `pictures/`: the first batch, conv1's filters, one digit's feature maps; of validation and test the
    confusion matrix, each digit's accuracy and the most confident mistakes; the graph and the projector's 1,000 digits.

    Attributes:
        answers: of the last evaluation, by part: val, test.
    """

    def __init__(self) -> None:
        self.answers: dict[str, Answers] = {}
        self._batches: list[tuple[Tensor, ...]] = []
        self._embedded: list[Tensor] = []
        self._hook: Any = None

    # Training

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._filters(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0 and trainer.global_step == 0 and (writer := writer_of(trainer)):
            images = batch[0]
            if images.is_floating_point():  # the features of frozen layers: the images that they were made of
                data: Any = trainer.datamodule  # type: ignore[attr-defined]
                images = data.digits.train.images[data.indices["train"][: len(images)]]
            writer.add_image("pictures/first batch", grid(images[:64] / 255), 0)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._batches:
            self._draw(trainer, "val")
        self._filters(trainer, pl_module)
        writer = writer_of(trainer)
        if writer is None or not isinstance(trainer.datamodule, MNISTDataModule):  # type: ignore[attr-defined]
            return
        image = trainer.datamodule.digits.test.images[:1].to(pl_module.device)  # type: ignore[attr-defined]
        for i, (name, maps) in enumerate(feature_maps(pl_module, image).items()):
            writer.add_image(f"pictures/feature maps/{i} {name}", grid(maps[:, None]), trainer.global_step)
        with warnings.catch_warnings(), evaluated(pl_module):
            warnings.simplefilter("ignore")  # torch.jit.trace, which add_graph uses, is deprecated
            writer.add_graph(pl_module, image)

    def _filters(self, trainer: Trainer, model: nn.Module) -> None:
        first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
        if first is not None and (writer := writer_of(trainer)):
            writer.add_image("pictures/conv1", grid(first.weight.detach().cpu()), trainer.global_step)

    # Validation and test

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._batches.clear()

    def on_validation_batch_end(self, *hook: Any, **_: Any) -> None:
        self._collect(*hook)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.state.fn == "fit":
            self._draw(trainer, "val")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._batches.clear()
        self._embedded.clear()
        last = [module for module in pl_module.modules() if isinstance(module, nn.Linear)]
        if last and writer_of(trainer):
            self._hook = last[-1].register_forward_pre_hook(self._embed)

    def on_test_batch_end(self, *hook: Any, **_: Any) -> None:
        self._collect(*hook)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._draw(trainer, "test")
        if self._hook is not None:
            self._hook.remove()
        if self._embedded and (writer := writer_of(trainer)):
            vectors = torch.cat(self._embedded)
            _, labels, images = self.answers["test"]
            shown = slice(len(vectors))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that the folder of an earlier test is there
                writer.add_embedding(
                    vectors, labels[shown].tolist(), images[shown] / 255, trainer.global_step, tag="test digits"
                )

    def _embed(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        missing = EMBEDDED - sum(map(len, self._embedded))
        if missing > 0:
            self._embedded.append(inputs[0][:missing].detach().float().cpu())

    def _collect(self, trainer: Trainer, pl_module: LightningModule, logits: Any, batch: Any, *_: Any) -> None:
        if isinstance(trainer.logger, TensorBoardLogger) and isinstance(logits, Tensor):
            images, labels = batch
            seen = images[:0] if images.is_floating_point() else images
            self._batches.append((logits.detach().float().cpu(), labels.cpu(), seen.cpu()))

    def _draw(self, trainer: Trainer, part: str) -> None:
        if not self._batches:
            return
        logits, labels, images = (torch.cat(values) for values in zip(*self._batches, strict=True))
        self._batches.clear()
        if len(images) < len(labels):  # they were features
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            mine = data.indices[part][trainer.global_rank :: trainer.world_size][: len(labels)]
            images = (data.digits.test if part == "test" else data.digits.train).images[mine]
        shares: list[Any] = [(logits, labels, images)]
        if trainer.world_size > 1:
            shares = [None] * trainer.world_size
            torch.distributed.all_gather_object(shares, (logits, labels, images))
        answers = self.answers[part] = Answers(*(torch.cat(values) for values in zip(*shares, strict=True)))
        if writer := writer_of(trainer):
            for name, draw in (
                ("confusion matrix", draw_confusion), ("accuracy by digit", draw_digits), ("mistakes", draw_mistakes)
            ):  # fmt: skip
                shown = figure(4, 4 if draw is not draw_digits else 2.5)  # TensorBoard shows it 350 pixels wide
                draw(shown.add_subplot(), answers)
                # close=True would import pyplot
                writer.add_figure(f"pictures/{part}/{name}", shown, trainer.global_step, close=False)


def writer_of(trainer: Trainer) -> Any:
    """TensorBoard's writer, in the process that has it and where the run is logged there; else None."""
    logger = trainer.logger
    return logger.experiment if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero else None


def grid(images: Tensor) -> Tensor:
    """Images (N, C, H, W), each brought to [0, 1], side by side and enlarged: (3, H', W')."""
    rows = make_grid(images.float(), nrow=8, padding=1, normalize=True, scale_each=True, pad_value=0.5)
    factor = max(1, -(-WIDTH // rows.shape[2]))
    return rows.repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2)


def feature_maps(model: nn.Module, image: Tensor) -> dict[str, Tensor]:
    """What each of the model's `stages` makes of an image (1, 1, 28, 28), its first 32 channels: (32, H, W) by name."""
    maps: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda module, inputs, output: maps.update({name: output[0, :32].detach().float().cpu()})

    stages: dict[str, nn.Module] = model.stages()  # type: ignore[operator]
    hooks = [stage.register_forward_hook(keep(name)) for name, stage in stages.items()]
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
    # Not in inference mode, where ConvNet's maps would be in oneDNN's layout: Lightning validates in it.
    with torch.inference_mode(False), torch.no_grad():
        yield
    model.train(training)


def report(path: Path, answers: Answers, rows: list[dict[str, float]]) -> None:
    """Writes the curves of metrics.csv's rows and what the answers show as a PNG."""
    sheet = figure(11, 9)
    (loss, accuracy), (confusion, mistakes) = sheet.subplots(2, 2)
    draw_curves(loss, rows, "loss")
    draw_curves(accuracy, rows, "acc")
    draw_confusion(confusion, answers)
    draw_mistakes(mistakes, answers)
    with write_whole(path) as file:
        sheet.savefig(file, format="png", dpi=100)


def figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure  # not at the top: it would delay each start

    return Figure((width, height), layout="constrained")


def draw_curves(axes: Any, rows: list[dict[str, float]], metric: str) -> None:
    for part in ("train", "val", "test"):
        points = [(row["step"], row[f"{part}/{metric}"]) for row in rows if f"{part}/{metric}" in row]
        if points:
            axes.plot(*zip(*points, strict=True), "o" if part == "test" else "o-", markersize=3, label=part)
    axes.set(title={"loss": "Loss", "acc": "Accuracy"}[metric], xlabel="optimizer steps")
    axes.legend()


def draw_confusion(axes: Any, answers: Answers) -> None:
    read = answers.logits.argmax(1)
    counts = torch.bincount(answers.labels * NUM_CLASSES + read, minlength=NUM_CLASSES**2).view(NUM_CLASSES, -1)
    shown = counts.clone().fill_diagonal_(0)  # the colours tell the mistakes apart
    axes.imshow(shown.numpy(), cmap="Reds")
    for (label, digit), count in zip(
        torch.cartesian_prod(*[torch.arange(NUM_CLASSES)] * 2), counts.ravel(), strict=True
    ):
        colour = "white" if shown[label, digit] > shown.max() / 2 else "black" if count else "lightgrey"
        axes.text(digit, label, int(count), ha="center", va="center", color=colour, fontsize=8)
    axes.set(xticks=range(NUM_CLASSES), yticks=range(NUM_CLASSES), xlabel="read as", ylabel="label")
    axes.set_title(f"Confusion matrix, {len(read):,} images", fontsize=10)


def draw_digits(axes: Any, answers: Answers) -> None:
    right = answers.logits.argmax(1) == answers.labels
    shares = [100 * float(right[answers.labels == digit].float().mean()) for digit in range(NUM_CLASSES)]
    bars = axes.bar(range(NUM_CLASSES), shares, color="steelblue")
    axes.bar_label(bars, fmt="%.1f", fontsize=8)
    low = min((share for share in shares if share == share), default=0)  # a digit without images is nan
    axes.set(xticks=range(NUM_CLASSES), ylim=(max(0, low - 5), 103), ylabel="accuracy, %")


def draw_mistakes(axes: Any, answers: Answers) -> None:
    confidence, read = answers.logits.softmax(1).max(1)
    wrong = torch.nonzero(read != answers.labels).ravel()
    chosen = wrong[confidence[wrong].argsort(descending=True)][:MISTAKES]
    axes.set_title(f"The most confident of {len(wrong):,} mistakes: label→read as", fontsize=9)
    axes.axis("off")
    if len(chosen) == 0:
        return
    padded = nn.functional.pad(answers.images[chosen], (8, 8, 2, 10))  # room for a line of text
    sheet = make_grid(255 - padded, nrow=min(5, len(padded)), padding=0, pad_value=255)
    axes.imshow(sheet[0].numpy(), cmap="gray", vmin=0, vmax=255)
    height, width = padded.shape[2:]
    for i, index in enumerate(chosen):
        said = f"{int(answers.labels[index])}→{int(read[index])} {100 * float(confidence[index]):.0f} %"
        axes.text((i % 5 + 0.5) * width, (i // 5 + 1) * height - 6, said, ha="center", va="center", fontsize=8)
