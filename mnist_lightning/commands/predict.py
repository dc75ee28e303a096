"""predict: a checkpoint's answers, as a table in its run's folder; of pictures on the screen as well."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer

from mnist_lightning.classifier import DigitClassifier
from mnist_lightning.commands.command import Command
from mnist_lightning.errors import UserError
from mnist_lightning.photos.answers import FromFiles
from mnist_lightning.runs.folder import quoted, results_of
from mnist_lightning.runs.predictions import PredictionWriter
from mnist_lightning.runs.saved import Saved


class Predict(Command):
    """Answers for the test images, or for a person's files, which need no labels."""

    stage, needs_labels = "predict", False
    saved: Saved  # refusals.py has seen to it

    def build(self, model: LightningModule, data: LightningDataModule) -> None:
        super().build(model, data)
        self.folder = results_of(self.saved.path)
        self.writer: PredictionWriter | None = None
        if not isinstance(data, FromFiles):
            self.writer = PredictionWriter(self.folder / "predictions.csv", self.saved.class_names)

    def callbacks(self, given: Any) -> list[Callback]:
        return super().callbacks(given) + ([self.writer] if self.writer is not None else [])

    def __call__(self, trainer: Trainer, **kwargs: Any) -> None:
        answers: Any = trainer.predict(**kwargs) or []
        if isinstance(self.data, FromFiles):
            self.tell(self.data, answers)
        elif self.writer is not None and trainer.is_global_zero:
            done = quoted(self.writer.path) if self.writer.written else "none were made, none are written"
            print(f"Predictions    {done}")

    def tell(self, data: FromFiles, answers: list[Any]) -> None:
        """Writes and prints the answers of files; the exit code is 1 if some can't be read."""
        if not all(isinstance(answer, dict) and "probabilities" in answer for answer in answers):
            got, remedy = type(self.model).__name__, "return them from predict_step, as DigitClassifier does."
            expected = f"a model that predicts {{'probabilities': (B, C)}} for {type(data).__name__}"
            raise UserError(expected, got, remedy)
        count = self.model.num_classes if isinstance(self.model, DigitClassifier) else len(self.saved.class_names)
        probabilities = [answer["probabilities"].float().cpu() for answer in answers] or [torch.empty(0, count)]
        everything = torch.cat(probabilities)
        path = self.folder / data.table_name
        whole = data.tell(everything, path, self.saved.names(everything.shape[1]))
        self.exit_code = 0 if whole else 1
        print(f"Predictions    {quoted(path)}")
