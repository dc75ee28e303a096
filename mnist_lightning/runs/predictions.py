"""predictions.csv: one row an image: index, label, predicted digit, ten probabilities."""

import csv
import io
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter

from mnist_lightning.classifier import NUM_CLASSES
from mnist_lightning.files import write_whole


class PredictionWriter(BasePredictionWriter):
    """Writes the rows of all processes to one file, in the order of the images.

    Args:
        path: the CSV file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(write_interval="epoch")
        self.path = path

    def write_on_epoch_end(
        self, trainer: Trainer, pl_module: LightningModule, predictions: Any, batch_indices: Any
    ) -> None:
        mine = {
            "index": torch.tensor([index for batch in batch_indices[0] for index in batch]),
            "label": torch.cat([batch["labels"] for batch in predictions]).cpu(),
            "probabilities": torch.cat([batch["probabilities"] for batch in predictions]).float().cpu(),
        }
        shares: list[Any] = [mine]
        if trainer.world_size > 1:
            shares = [None] * trainer.world_size
            torch.distributed.all_gather_object(shares, mine)
        if not trainer.is_global_zero:
            return
        index, label, probabilities = (torch.cat([share[key] for share in shares]) for key in mine)
        text = io.StringIO()
        rows = csv.writer(text)
        rows.writerow(["index", "label", "predicted", *(f"p{digit}" for digit in range(NUM_CLASSES))])
        for i in index.argsort().tolist():
            p = probabilities[i]
            rows.writerow([int(index[i]), int(label[i]), int(p.argmax()), *(f"{value:.6f}" for value in p.tolist())])
        with write_whole(self.path) as file:
            file.write(text.getvalue().encode())
