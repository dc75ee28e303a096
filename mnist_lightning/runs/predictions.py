"""predictions.csv: one row an image: its index, its label if it has one, the predicted class, a number for each class.

B = batch size, C = classes.
"""

import csv
from collections.abc import Mapping, Sequence
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
        named: what the checkpoint calls the classes; else the datamodule does.

    Attributes:
        written: whether it was written.
    """

    def __init__(self, path: Path, named: Sequence[str] | None = None) -> None:
        super().__init__(write_interval="epoch")
        self.path, self.named = path, named
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
        count = batches[0][0].shape[1]
        names = list(self.named or [])
        if len(names) != count:
            names = class_names(trainer.datamodule, count)  # type: ignore[attr-defined]
        write_table(self.path, *table(indices, batches, names))
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


def table(indices: list[int], batches: list[Any], names: list[str]) -> tuple[dict[str, list[Any]], Any, list[str]]:
    """What `write_table` takes, sorted by index."""
    values, labels, prefixes = zip(*batches, strict=True)
    numbers = torch.cat(values)  # (N, C)
    order = sorted(range(len(indices)), key=indices.__getitem__)
    columns: dict[str, list[Any]] = {"index": [indices[i] for i in order]}
    if all(label is not None for label in labels):
        known = torch.cat(labels)[order].tolist()
        columns["label"] = [names[label] if label in range(len(names)) else label for label in known]
    columns["predicted"] = [names[label] for label in numbers.argmax(1)[order].tolist()]
    return columns, numbers[order].tolist(), [f"{prefixes[0]}{name}" for name in names]


def write_table(
    path: Path, columns: Mapping[str, Sequence[Any]], numbers: Sequence[Sequence[float]], names: Sequence[str]
) -> None:
    """Writes a CSV file: columns of any kind, then the numbers of each row, which `names` are the header of."""
    with write_whole(path, text=True) as file:
        writer = csv.writer(file)
        writer.writerow([*columns, *names])
        for *cells, row in zip(*columns.values(), numbers, strict=True):
            writer.writerow([*map(no_formula, cells), *(f"{number:.6f}" for number in row)])


def no_formula(cell: Any) -> Any:
    """The cell, after an apostrophe where a spreadsheet would run it: a file's name may be =HYPERLINK(...)."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(("=", "+", "-", "@", "\t", "\r")) else cell
