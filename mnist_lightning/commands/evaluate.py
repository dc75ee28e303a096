"""validate, test: a checkpoint measured on images with labels; and the lines that say what was measured on what."""

from typing import Any

from lightning.fabric.utilities.data import sized_len
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.combined_loader import CombinedLoader

from mnist_lightning.commands.command import Command, as_list
from mnist_lightning.data import MNISTDataModule
from mnist_lightning.errors import UserError
from mnist_lightning.loader import ImagesDataModule
from mnist_lightning.photos import ImageFolder
from mnist_lightning.pictures.callback import Pictures
from mnist_lightning.runs.folder import quoted, results_of
from mnist_lightning.runs.logger import RunLogger
from mnist_lightning.runs.saved import Saved

TITLES = {"val": "Validation", "test": "Test"}


class Evaluate(Command):
    """Measures a checkpoint; what comes out goes into its run."""

    measures = True
    saved: Saved  # refusals.py has seen to it
    part: str  # val or test

    def build(self, model: LightningModule, data: LightningDataModule) -> None:
        super().build(model, data)
        if isinstance(data, ImageFolder) and self.saved.class_names:
            data.use_classes(self.saved.class_names)
        self.folder = results_of(self.saved.path)

    def logger(self) -> Logger:
        return RunLogger(self.folder, evaluated_at=self.saved.step, hyperparameters=self.hyperparameters)

    def callbacks(self, given: Any) -> list[Callback]:
        return super().callbacks(given) + ([Pictures(self.saved.step)] if self.settings.pictures else [])

    def __call__(self, trainer: Trainer, **kwargs: Any) -> None:
        evaluate = trainer.test if self.part == "test" else trainer.validate
        self.results = merge_metrics(evaluate(verbose=False, **kwargs))
        if not self.results:
            remedy = f"change --data.val_size or --trainer.limit_{self.part}_batches; or log a metric."
            raise UserError(f"{TITLES[self.part].lower()} images", "none", remedy)
        if trainer.is_global_zero:
            say_results(self.results, self.part, measured_on(trainer, self.data, self.part))
            print(f"{'Run':<14} {quoted(self.folder)}")


class Validate(Evaluate):
    stage, part = "validate", "val"


class Test(Evaluate):
    stage, part = "test", "test"


def merge_metrics(results: Any) -> dict[str, float]:
    """The metrics of all data loaders."""
    return {name: value for result in results for name, value in result.items()}


def say_results(results: dict[str, float], part: str, images: str) -> None:
    """Prints the accuracy, and whatever a model of one's own measures beside it."""
    title, others = TITLES[part], dict(results)
    accuracy = others.pop(f"{part}/acc", None)
    if accuracy is not None:
        print(f"{title + ' accuracy':<14} {100 * accuracy:.2f} % on {images}")
        others.pop(f"{part}/loss", None)
    if others or accuracy is None:
        print(f"{title:<14} {'  '.join(f'{name} {value:.4f}' for name, value in others.items()) or 'not measured'}")


def measured_on(trainer: Trainer, data: LightningDataModule, part: str) -> str:
    """Which images an accuracy was measured on, in words."""
    if part == "test":
        used, loaders, kind = trainer.num_test_batches, trainer.test_dataloaders, "test"
    else:
        used, loaders, kind = trainer.num_val_batches, trainer.val_dataloaders, "validation"
    sizes = [sized_len(loader) for loader in CombinedLoader(loaders).flattened] if loaders is not None else []
    portion = "a part of " if any(n < (size or 0) for n, size in zip(as_list(used), sizes, strict=False)) else ""
    if not isinstance(data, ImagesDataModule):
        return f"{portion}the {kind} images of {type(data).__name__}"
    if loaders is None:  # --trainer.strategy ddp_spawn: other processes had them
        data.setup("test" if part == "test" else "validate")
    count = f"{len(data.test_set if part == 'test' else data.val_set):,} {kind}"
    source = data.source if isinstance(data, MNISTDataModule) else None
    if source == "mnist":
        return f"{portion}MNIST's {count} images"
    if source == "digits":
        return f"{portion}the {count} images of scikit-learn's digits, not MNIST"
    return f"{portion}the {count} {'pictures' if isinstance(data, ImageFolder) else 'images'} of {type(data).__name__}"
