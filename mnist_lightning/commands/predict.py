"""predict: a checkpoint's answers, as a table in its run's folder; of photos on the screen as well."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer

from mnist_lightning.commands.command import Command
from mnist_lightning.errors import UserError
from mnist_lightning.photos import Photos
from mnist_lightning.runs.folder import quoted, results_of
from mnist_lightning.runs.predictions import PredictionWriter
from mnist_lightning.runs.saved import Saved


class Predict(Command):
    """Answers for the test images, or for what a datamodule without labels brings."""

    needs_labels = False
    saved: Saved  # refusals.py has seen to it

    def build(self, model: LightningModule, data: LightningDataModule) -> None:
        super().build(model, data)
        self.folder = results_of(self.saved.path)
        self.writer = None if isinstance(data, Photos) else PredictionWriter(self.folder / "predictions.csv")

    def callbacks(self, given: Any) -> list[Callback]:
        return super().callbacks(given) + ([self.writer] if self.writer is not None else [])

    def __call__(self, trainer: Trainer, **kwargs: Any) -> None:
        answers: Any = trainer.predict(**kwargs) or []
        if isinstance(self.data, Photos):
            self.write_photos(self.data, answers)
        elif self.writer is not None and trainer.is_global_zero:
            done = quoted(self.writer.path) if self.writer.written else "none were made, none are written"
            print(f"Predictions    {done}")

    def write_photos(self, photos: Photos, answers: list[Any]) -> None:
        if not all(isinstance(answer, dict) and "probabilities" in answer for answer in answers):
            got, remedy = type(self.model).__name__, "return them from predict_step, as DigitClassifier does."
            raise UserError("a model that predicts {'probabilities': (B, C)} for Photos", got, remedy)
        probabilities = [answer["probabilities"].float().cpu() for answer in answers]
        count = probabilities[0].shape[1] if probabilities else 10
        path = self.folder / "photos.csv"
        everything = torch.cat([torch.empty(0, count), *probabilities])
        whole = photos.tell(everything, path, self.saved.names(count))
        self.exit_code = 0 if whole else 1
        print(f"Predictions    {quoted(path)}")
