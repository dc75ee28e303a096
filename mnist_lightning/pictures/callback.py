"""Pictures: what a run looks like, in TensorBoard's image, graph and projector tabs, and in report.png.

Each picture is drawn once, at the end of what it shows. None ever ends a run: what can't be drawn is left out, and one
line says why.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn

from mnist_lightning.classifier import DigitClassifier
from mnist_lightning.data import Features, MNISTDataModule
from mnist_lightning.pictures import figures
from mnist_lightning.pictures.figures import Answers, evaluated, feature_maps, grid, thumbnails
from mnist_lightning.runs.classes import class_names

EMBEDDED = 1000  # test images in the projector
CHARTS = {
    "confusion matrix": figures.draw_confusion,
    "accuracy by class": figures.draw_classes,
    "mistakes": figures.draw_mistakes,
}


class Pictures(Callback):
    """Draws under `pictures/`: the first batch, the first convolution's filters, an image's feature maps; of validation
    and test the confusion matrix, each class's accuracy and the most confident mistakes; the graph and the projector.

    Args:
        step: where a test's or a validation's pictures stand on TensorBoard's axis; the default is the Trainer's step.

    Attributes:
        answers: of the last evaluation, by part: val, test.
    """

    def __init__(self, step: int | None = None) -> None:
        self.step = step
        self.answers: dict[str, Answers] = {}
        self._batches: list[tuple[Tensor, Tensor, Tensor]] = []  # logits, labels, thumbnails
        self._vectors: list[Tensor] = []  # what the last linear layer was given
        self._hook: Any = None
        self._said: set[str] = set()

    def report(self, path: Path, rows: list[dict[str, float]]) -> None:
        """Draws metrics.csv's rows and the last test as a PNG."""
        with self._attempt(path.name):
            figures.report(path, self.answers.get("test"), rows)

    # Training

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 0 and batch_idx == 0 and (writer := writer_of(trainer)):
            with self._attempt("first batch"):
                writer.add_image("pictures/first batch", grid(thumbnails(images_of(trainer, "train", batch)[:64])), 0)
            self._filters(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        writer = writer_of(trainer) if trainer.is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs else None
        if writer is None:
            return
        with self._attempt("feature maps"):
            image = images_of(trainer, "train", batch)[:1].to(pl_module.device)
            if isinstance(pl_module, DigitClassifier):
                for i, (name, maps) in enumerate(feature_maps(pl_module, image).items()):
                    writer.add_image(f"pictures/feature maps/{i} {name}", grid(maps[:, None]), trainer.global_step)
        with self._attempt("graph"), evaluated(pl_module), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.jit.trace, which add_graph uses, is deprecated
            writer.add_graph(pl_module, image)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._draw(trainer, "val")
        self._filters(trainer, pl_module)

    def _filters(self, trainer: Trainer, model: nn.Module) -> None:
        first = next((layer for layer in model.modules() if isinstance(layer, nn.Conv2d)), None)
        if first is not None and (writer := writer_of(trainer)):
            with self._attempt("conv1"):
                writer.add_image("pictures/conv1", grid(first.weight.detach().cpu()), trainer.global_step)

    # Validation and test

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._batches.clear()

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *outputs_and_batch: Any) -> None:
        self._collect(trainer, "val", *outputs_and_batch)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit":
            self._draw(trainer, "val")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._batches.clear()
        self._vectors.clear()
        linear = [layer for layer in pl_module.modules() if isinstance(layer, nn.Linear)]
        if linear and writer_of(trainer):
            self._hook = linear[-1].register_forward_pre_hook(self._remember)

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, *outputs_and_batch: Any) -> None:
        self._collect(trainer, "test", *outputs_and_batch)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._draw(trainer, "test")
        if self._hook is None:
            return
        self._hook.remove()
        self._hook = None
        if "test" in self.answers:
            with self._attempt("projector"), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that an earlier test was here
                self._project(trainer, self.answers["test"])

    def _remember(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if sum(map(len, self._vectors)) < EMBEDDED:
            self._vectors.append(inputs[0].detach().float().cpu())

    def _project(self, trainer: Trainer, answers: Answers) -> None:
        vectors = torch.cat(self._vectors)[:EMBEDDED]
        names = [answers.names[label] for label in answers.labels[: len(vectors)].tolist()]
        sprites = answers.images[: len(vectors)] / 255
        writer_of(trainer).add_embedding(vectors, names, sprites, self._step(trainer), tag="test digits")

    def _collect(
        self, trainer: Trainer, part: str, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if trainer.sanity_checking or dataloader_idx > 0:
            return
        with self._attempt(f"confusion matrix of {part}"):
            if not (isinstance(outputs, Tensor) and outputs.is_floating_point() and outputs.ndim == 2):
                raise ValueError("the step returns no logits (B, C)")
            before = sum(len(labels) for _, labels, _ in self._batches)
            images = thumbnails(images_of(trainer, part, batch, before))
            self._batches.append((outputs.detach().float().cpu(), batch[1].long().cpu(), images))

    def _draw(self, trainer: Trainer, part: str) -> None:
        """Draws the evaluation that ended, of all processes."""
        mine = [torch.cat(values) for values in zip(*self._batches, strict=True)]
        self._batches.clear()
        self.answers.pop(part, None)
        shares: list[Any] = [mine]
        if trainer.world_size > 1:
            shares = [None] * trainer.world_size
            torch.distributed.all_gather_object(shares, mine)
        if not all(shares):
            return
        logits, labels, images = (torch.cat(values) for values in zip(*shares, strict=True))
        names = class_names(trainer.datamodule, logits.shape[1])  # type: ignore[attr-defined]
        answers = self.answers[part] = Answers(names, logits, labels, images)
        for name, draw in CHARTS.items():
            if writer := writer_of(trainer):
                with self._attempt(name):
                    shown = figures.figure(5, 5)
                    draw(shown.add_subplot(), answers)
                    # close=True would import pyplot
                    writer.add_figure(f"pictures/{part}/{name}", shown, self._step(trainer), close=False)

    def _step(self, trainer: Trainer) -> int:
        return trainer.global_step if self.step is None else self.step

    @contextmanager
    def _attempt(self, picture: str) -> Iterator[None]:
        """A picture that can't be drawn is left out, and one line says why, once."""
        try:
            yield
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            if picture not in self._said:
                self._said.add(picture)
                rank_zero_only(print)(f"Pictures: no {picture}: {reason}", flush=True)


def writer_of(trainer: Trainer) -> Any:
    """The writer of the run's first TensorBoard logger, in the process that has it; else None."""
    loggers = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
    return loggers[0].experiment if loggers and trainer.is_global_zero else None


def images_of(trainer: Trainer, part: str, batch: Any, before: int = 0) -> Tensor:
    """A batch's images (B, 1 or 3, H, W); of cached features images of that part, which come in order in an evaluation.

    Args:
        before: how many images of the part this process has seen.
    """
    images = batch[0] if isinstance(batch, (tuple, list)) else batch
    data = trainer.datamodule  # type: ignore[attr-defined]
    if isinstance(images, Features) and isinstance(data, MNISTDataModule):
        whole = {"train": data.train_set, "val": data.val_set, "test": data.test_set}[part].images
        images = whole[trainer.global_rank :: trainer.world_size][before:][: len(images.values)]
    if not (isinstance(images, Tensor) and images.ndim == 4 and images.shape[1] in (1, 3)):
        raise ValueError("the batches hold no images of one or three channels")
    return images
