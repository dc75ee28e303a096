"""Pictures: what a run looks like, in TensorBoard's image, graph and projector tabs, and in report.png.

Each picture is drawn once, at the end of what it shows, so that it costs next to nothing. None ever ends a run.
"""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn

from mnist_lightning.loader import ImagesDataModule
from mnist_lightning.pictures import figures
from mnist_lightning.pictures.figures import Answers, evaluated, feature_maps, grid, merged, thumbnails
from mnist_lightning.pretrained import Features
from mnist_lightning.runs.classes import class_names

EMBEDDED = 1000  # test images in the projector


class Pictures(Callback):
    """Draws under `pictures/`: training images, the first convolution's filters, an image's feature maps; of validation
    and test the confusion matrix, the precision and recall of each class, and the most confident mistakes; the graph
    and the projector.

    Args:
        step: where the pictures of a test or validation stand in TensorBoard; the default is the Trainer's step.

    Attributes:
        answers: of the last evaluation, by part: val, test.
    """

    def __init__(self, step: int | None = None) -> None:
        self.step = step
        self.answers: dict[str, Answers] = {}
        self._current: Answers | None = None  # of the evaluation that goes on
        self._left_out = False  # what it answers can't be drawn
        self._starts = False  # training, with the next batch
        self._example: Tensor | None = None
        self._embedded: list[tuple[Tensor, list[str], Tensor | None]] = []  # vectors, labels, thumbnails
        self._inputs: tuple[Any, ...] = ()  # of the last linear layer
        self._hook: Any = None
        self._said: set[str] = set()

    def report(self, path: Path, rows: list[dict[str, float]]) -> bool:
        """Draws metrics.csv's rows and the last test into a PNG; returns whether it could."""
        with self._attempt(path.name), silenced():
            figures.report(path, self.answers.get("test"), rows)
            return True
        return False

    # Training

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._starts, self._example = True, None
        self._filters(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        starts, self._starts = self._starts, False
        if starts and (writer := writer_of(trainer)):
            with self._attempt("first batch"):
                images = images_of(trainer, "train", batch, 0)
                self._example = images[:1].detach().to(pl_module.device, copy=True)
                if trainer.global_step == 0:
                    writer.add_image("pictures/first batch", grid(thumbnails(images[:64])), 0)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish(trainer, "val")
        self._filters(trainer, pl_module)
        sharded = isinstance(trainer.strategy, (FSDPStrategy, ModelParallelStrategy))  # one process alone would wait
        writer, image = writer_of(trainer), self._example
        if writer is None or image is None or sharded:
            return
        with self._attempt("feature maps"):
            for i, (name, maps) in enumerate(feature_maps(pl_module, image).items()):
                writer.add_image(f"pictures/feature maps/{i} {name}", grid(maps[:, None]), trainer.global_step)
        with self._attempt("graph"), silenced(), evaluated(pl_module):
            writer.add_graph(pl_module, image)

    def _filters(self, trainer: Trainer, model: nn.Module) -> None:
        if writer := writer_of(trainer):
            with self._attempt("conv1"):
                filters = next((layer.weight for layer in model.modules() if isinstance(layer, nn.Conv2d)), None)
                if filters is None:
                    raise ValueError("the model has no Conv2d")
                writer.add_image("pictures/conv1", grid(filters.detach().cpu()), trainer.global_step)

    # Validation and test

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._current, self._left_out = None, trainer.sanity_checking
        self._embedded.clear()
        linear = [layer for layer in pl_module.modules() if isinstance(layer, nn.Linear)]
        if trainer.testing and linear and writer_of(trainer):
            self._hook = linear[-1].register_forward_pre_hook(self._remember)

    on_validation_start = on_test_start

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        part = "test" if trainer.testing else "val"
        if dataloader_idx > 0:
            with self._attempt(f"answers of {part} dataloader {dataloader_idx}"):
                raise ValueError("only those of the first are drawn")
        if self._left_out or dataloader_idx > 0:
            return
        images, self._left_out = None, True  # until all went well
        with self._attempt("confusion matrix"):
            logits, labels = checked(outputs, batch, f"{'test' if trainer.testing else 'validation'}_step")
            names = class_names(trainer.datamodule, logits.shape[1])  # type: ignore[attr-defined]
            seen = [self._current] if self._current else []
            with self._attempt("mistakes"):
                images = images_of(trainer, part, batch, sum(int(answers.counts.sum()) for answers in seen))
            self._current = merged([*seen, figures.answers_of(names, logits, labels, images)])
            self._left_out = False
            self._embed([names[label] for label in labels.tolist()], images)

    on_validation_batch_end = on_test_batch_end

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit":
            self._finish(trainer, "val")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish(trainer, "test")
        self._unhook()
        if self._embedded and (writer := writer_of(trainer)):
            with self._attempt("projector"), silenced():
                vectors, labels, images = zip(*self._embedded, strict=True)
                sprites = None if images[0] is None else torch.cat(images) / 255
                writer.add_embedding(torch.cat(vectors), sum(labels, []), sprites, self._step(trainer), "test images")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._unhook()

    def _remember(self, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._inputs = inputs

    def _unhook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook, self._inputs = None, ()

    def _embed(self, labels: list[str], images: Tensor | None) -> None:
        missing = EMBEDDED - sum(len(labels) for _, labels, _ in self._embedded)
        if self._hook is not None and missing > 0:
            with self._attempt("projector"):
                vectors = self._inputs[0]
                if vectors.ndim != 2 or len(vectors) != len(labels):
                    raise ValueError("the last linear layer isn't given one vector an image")
                few = None if images is None else thumbnails(images[:missing])
                self._embedded.append((vectors[:missing].detach().float().cpu(), labels[:missing], few))

    def _finish(self, trainer: Trainer, part: str) -> None:
        """Draws the evaluation that ended, of all processes."""
        shares = [None if self._left_out else self._current]
        self._current = None
        if trainer.world_size > 1:
            mine, shares = shares[0], [None] * trainer.world_size
            torch.distributed.all_gather_object(shares, mine)
        self.answers.pop(part, None)
        found = [share for share in shares if share is not None]
        if not found:
            return
        answers = self.answers[part] = merged(found)
        writer, width = writer_of(trainer), 4 if answers.short_names else 5  # inches of 100 pixels
        for name, draw, height in (
            ("confusion matrix", figures.draw_confusion, width),
            ("precision and recall", figures.draw_classes, 0.7 * width),
            ("mistakes", figures.draw_mistakes, 1.2 * width),
        ):
            if writer is not None and (answers.mistakes or name != "mistakes"):
                with self._attempt(name), silenced():
                    shown = figures.figure(width, height)
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
            line = f"Pictures: no {picture}: {reason}"
            if line not in self._said:
                self._said.add(line)
                rank_zero_only(print)(line, flush=True)


def writer_of(trainer: Trainer) -> Any:
    """The writer of the run's first TensorBoard logger, in the process that has it; else None."""
    loggers = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
    return loggers[0].experiment if loggers and trainer.is_global_zero else None


def images_of(trainer: Trainer, part: str, batch: Any, seen: int) -> Tensor:
    """A batch's images (B, 1 or 3, H, W); of cached features the images that they were made of, which come in order.

    Args:
        seen: how many images of the part came before, in this process.
    """
    images = batch[0] if isinstance(batch, (tuple, list)) else batch
    data = trainer.datamodule  # type: ignore[attr-defined]
    if isinstance(images, Features) and isinstance(data, ImagesDataModule):
        whole = {"train": data.train_set, "val": data.val_set, "test": data.test_set}[part].images
        images = whole[trainer.global_rank :: trainer.world_size][seen:][: len(images.values)]
    if not (isinstance(images, Tensor) and images.ndim == 4 and images.shape[1] in (1, 3)):
        raise ValueError("the batches hold no images of one or three channels")
    return images


def checked(outputs: Any, batch: Any, step: str) -> tuple[Tensor, Tensor]:
    """Logits (B, C) and labels (B,), if that is what a step returned and was given."""
    if not (isinstance(outputs, Tensor) and outputs.is_floating_point() and outputs.ndim == 2):
        raise ValueError(f"{step} returns no logits")
    labels = batch[1] if isinstance(batch, (tuple, list)) and len(batch) > 1 else None
    if not (isinstance(labels, Tensor) and labels.shape == outputs.shape[:1] and not labels.is_floating_point()):
        raise ValueError("the batches hold no class numbers")
    if labels.min() < 0 or labels.max() >= outputs.shape[1]:
        raise ValueError(f"there are labels beyond the {outputs.shape[1]} classes of {step}")
    return outputs.detach().float().cpu(), labels.long().cpu()


@contextmanager
def silenced() -> Iterator[None]:
    """Hides what torch prints as it traces a graph or finds an earlier test's projector, and fonts without a letter."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
