"""predictions.csv: one row an image: its index, its label if it has one, the predicted class, a number for each class.

B = batch size, C = classes.
"""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor

from mnist_lightning.files import write_whole
from mnist_lightning.runs.classes import class_names


class PredictionWriter(BasePredictionWriter):
    """Writes the rows of all processes to one file, in the order of the images; where it can't, one line says why.

    A `predict_step` returns {"probabilities": (B, C), "labels": (B,)}, labels only if there are any; or a tensor
    (B, C), whose numbers are written as they are: logits or probabilities, the file doesn't say which.

    Args:
        path: the CSV file.

    Attributes:
        written: whether it was written.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(write_interval="epoch")
        self.path = path
        self.written = False

    def write_on_epoch_end(
        self, trainer: Trainer, pl_module: LightningModule, predictions: Any, batch_indices: Any
    ) -> None:
        indices = [index for loader in batch_indices for batch in loader for index in batch]
        shares: list[Any] = [(indices, [unpacked(prediction) for prediction in predictions])]
        if trainer.world_size > 1:
            mine, shares = shares[0], [None] * trainer.world_size
            torch.distributed.all_gather_object(shares, mine)
        indices = [index for share, _ in shares for index in share]
        batches = [batch for _, share in shares for batch in share]
        if not trainer.is_global_zero or not batches:
            return
        images = sum(len(batch[0]) for batch in batches if batch)
        if not indices and trainer.world_size == 1:  # only a DataLoader tells them
            indices = list(range(images))
        reason = ""
        if len(batch_indices) > 1:
            reason = "there are several dataloaders"
        elif None in batches or len({batch[0].shape[1] for batch in batches}) > 1:
            reason = 'predict_step returns neither {"probabilities": a tensor (B, C)} nor a tensor (B, C)'
        elif len(indices) != images:
            reason = "the dataloader doesn't tell which image is which"
        if reason:
            print(f"Predictions: no {self.path.name}: {reason}", flush=True)
            return
        with write_whole(self.path, text=True) as file:
            csv.writer(file).writerows(table(indices, batches, trainer.datamodule))  # type: ignore[attr-defined]
        self.written = True


def unpacked(prediction: Any) -> tuple[Tensor, Tensor | None, str] | None:
    """What a `predict_step` returned as numbers (B, C), labels (B,) or None, and what the numbers' columns are called;
    None if it is something else."""
    values, labels, prefix = prediction, None, "output "
    if isinstance(prediction, dict):
        values, labels, prefix = prediction.get("probabilities"), prediction.get("labels"), "p"
    if not (isinstance(values, Tensor) and values.ndim == 2 and values.shape[1] > 1):
        return None
    return values.float(), labels if isinstance(labels, Tensor) and labels.ndim == 1 else None, prefix


def table(indices: list[int], batches: list[Any], datamodule: object) -> Iterator[list[Any]]:
    """The file's rows, sorted by index."""
    values, labels, prefixes = zip(*batches, strict=True)
    numbers = torch.cat(values)  # (N, C)
    names = class_names(datamodule, numbers.shape[1])
    columns = [indices, [names[label] for label in numbers.argmax(1).tolist()], numbers.tolist()]
    header = ["index", "predicted", *(f"{prefixes[0]}{name}" for name in names)]
    if all(label is not None for label in labels):
        header.insert(1, "label")
        known = torch.cat(labels).tolist()
        columns.insert(1, [names[label] if label in range(len(names)) else label for label in known])
    yield header
    for *first, row in sorted(zip(*columns, strict=True), key=lambda columns: columns[0]):
        yield [*first, *(f"{number:.6f}" for number in row)]
