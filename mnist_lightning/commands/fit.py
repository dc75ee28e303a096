"""fit: trains, keeps the best and the last checkpoint, tests the best one, and says where everything is."""

import inspect
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch.optim.lr_scheduler import OneCycleLR

from mnist_lightning.classifier import DigitClassifier
from mnist_lightning.commands.command import Command, as_list
from mnist_lightning.commands.evaluate import measured_on, merge_metrics, say_results
from mnist_lightning.commands.parser import class_of
from mnist_lightning.data import MNISTDataModule
from mnist_lightning.finetuning.features import FeatureCache
from mnist_lightning.photos import ImageFolder
from mnist_lightning.photos.layout import class_names
from mnist_lightning.pictures.callback import Pictures
from mnist_lightning.pretrained import PretrainedClassifier
from mnist_lightning.runs.checkpoints import BestCheckpoint, LastCheckpoint
from mnist_lightning.runs.checks import stopped_early
from mnist_lightning.runs.classes import named_classes
from mnist_lightning.runs.folder import LOGS, claim, quoted, run_of, training_in
from mnist_lightning.runs.logger import RunLogger
from mnist_lightning.runs.run import Run
from mnist_lightning.runs.saved import Saved
from mnist_lightning.runs.state import RunState, write_settings

YOUR_OWN: dict[type, tuple[str, str]] = {  # how a model is tried on more of what it was trained on
    MNISTDataModule: ("Your digits", "--data Photos --data.path PHOTO_OR_FOLDER"),
    ImageFolder: ("Your pictures", "--data ImageFolder --data.path PICTURE_OR_FOLDER"),
}


class Training(Command):
    """What all commands that train share: data and pretrained weights are fetched first, frozen features are kept."""

    stage, trains = "fit", True

    def settle(self) -> None:
        super().settle()
        trainer, model = self.settings.trainer, class_of(self.settings.model.class_path)
        unlimited = trainer.max_epochs is None and trainer.max_steps == -1 and trainer.max_time is None
        if unlimited and inspect.isclass(model) and issubclass(model, DigitClassifier):
            trainer.max_epochs = model.default_epochs
        init_args = self.settings.model.get("init_args", {})
        if init_args.get("num_classes", 0) is None and (names := names_of_classes(self.settings.data)):
            init_args.num_classes = len(names)

    def build(self, model: LightningModule, data: LightningDataModule) -> None:
        super().build(model, data)
        if isinstance(data, MNISTDataModule) and "source" in self.settings.data.init_args:
            self.settings.data.init_args.source = data.source  # auto is settled now
        if self.saved is None and isinstance(model, PretrainedClassifier):
            model.load_pretrained()

    def options(self, given: Any, callbacks: list[Callback]) -> dict[str, Any]:
        options = super().options(given, callbacks)
        if given["num_sanity_val_steps"] is None:
            options["num_sanity_val_steps"] = 1  # enough to see that the monitored metric is there
        return options

    def callbacks(self, given: Any) -> list[Callback]:
        return super().callbacks(given) + ([FeatureCache()] if isinstance(self.model, PretrainedClassifier) else [])


class Fit(Training):
    """Trains and tests, in a run's folder."""

    def build(self, model: LightningModule, data: LightningDataModule) -> None:
        super().build(model, data)
        # Resolved, as a resumed run's folder is: ModelCheckpoint's state holds it.
        root = Path(self.settings.trainer.default_root_dir or ".").resolve()
        resumed = None if self.saved is None else run_of(self.saved.path)
        own = self.saved is not None and self.saved.is_of_its_run()
        self.config_file = resumed / "config.yaml" if resumed is not None and own else None
        first = rank_zero_only.rank == 0  # type: ignore[attr-defined]  # only that process writes
        if resumed is not None or not first:
            self.run = Run(resumed or root, fresh=False)
        else:
            digits = isinstance(data, MNISTDataModule) and data.source == "digits"
            self.run = Run(claim(root, type(model).__name__ + ("-digits" if digits else "")), fresh=True)
        self.opened.enter_context(self.run)
        if first:
            self.opened.enter_context(training_in(self.run.folder))
        if resumed is None and first:
            write_settings(self.run.folder / "config.yaml", self.plain_settings)

    def logger(self) -> Logger:
        step = None if self.saved is None else self.saved.logged_step
        return RunLogger(self.run.folder, resumed_after=step, hyperparameters=self.hyperparameters)

    def callbacks(self, given: Any) -> list[Callback]:
        checks, *others = super().callbacks(given)
        state = RunState(self.plain_settings, self.config_file)
        callbacks = [checks, state, *others]  # state before those that look at the learning rates when an epoch begins
        theirs = as_list(given["callbacks"])
        logged = given["logger"] not in (False, [])
        if logged and not any(isinstance(callback, LearningRateMonitor) for callback in theirs):
            callbacks.append(LearningRateMonitor())
        self.pictures = Pictures() if self.settings.pictures else None
        if self.pictures is not None:
            callbacks.append(self.pictures)
        self.best: BestCheckpoint | None = None
        if given["enable_checkpointing"] is not False:
            checkpoints = self.run.folder / "checkpoints"
            self.best = BestCheckpoint(checkpoints, self.settings.monitor, self.settings.monitor_mode)
            callbacks += [self.best, LastCheckpoint(checkpoints / "last.ckpt")]
        return callbacks

    def __call__(self, trainer: Trainer, **kwargs: Any) -> None:
        try:
            trainer.fit(**kwargs)
        finally:
            if trainer.global_step > 0:
                self.run.keep()
        if self.saved is not None and trainer.global_step == self.saved.step:
            ended = f"This run had already ended, at step {trainer.global_step}: nothing was trained."
            rank_zero_only(print)(f"{ended} {longer(trainer)}")
        saved = any(self.run.folder.glob("checkpoints/*.ckpt"))
        if trainer.global_step == 0 and self.saved is None and not saved and trainer.world_size == 1:
            print("Nothing was trained: no checkpoint, no test.")
            return
        self.run.keep()
        best = self.load_best(trainer)
        if can_be_tested(trainer, self.model, self.data):
            self.results = merge_metrics(trainer.test(self.model, datamodule=self.data, verbose=False))
        if trainer.is_global_zero:
            say_results(self.results, "test", measured_on(trainer, self.data, "test"))
            print(f"{'Run':<14} {quoted(self.run.folder)}")
            self.say_what_next(trainer, best)

    def load_best(self, trainer: Trainer) -> Path | None:
        """Gives the model the weights of the best checkpoint, and returns its path; None if there is none."""
        # The first process knows the folder.
        path = Path(trainer.strategy.broadcast(str(self.run.folder / "checkpoints" / "best.ckpt")))
        if self.best is None or not path.is_file():
            return None
        # Not by trainer.test(ckpt_path=...), which gives WeightAveraging's callbacks their other weights.
        best = Saved(path)
        self.model.on_load_checkpoint(best.content)
        self.model.load_state_dict(best.state_dict, strict=self.model.strict_loading)
        return path

    def say_what_next(self, trainer: Trainer, best: Path | None) -> None:
        """Draws report.png, and prints the commands to look at the run and to use its model."""
        boards = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        if boards:
            folder = Path(str(boards[0].log_dir))
            if isinstance(boards[0], RunLogger):
                run = self.run.folder
                folder = run.parent.parent if run.parents[1].name == LOGS else run
                if self.pictures is not None:
                    self.pictures.report(run / "report.png", boards[0].rows)
            print(f"Dashboards     tensorboard --logdir {quoted(folder)}")
        yours = next((words for kind, words in YOUR_OWN.items() if isinstance(self.data, kind)), None)
        if best is not None and yours is not None and isinstance(self.model, DigitClassifier):
            title, options = yours
            print(f"{title:<14} python -m mnist_lightning predict --ckpt_path {quoted(best)} {options}")
        if isinstance(self.data, MNISTDataModule) and self.data.fell_back:
            print("WARNING: this was not MNIST, which isn't available, but scikit-learn's 1,797 digits.")


class TrialFit(Training):
    """--trainer.fast_dev_run, --trainer.barebones: neither a folder nor a test."""

    def options(self, given: Any, callbacks: list[Callback]) -> dict[str, Any]:
        # Of barebones, Lightning refuses whatever might cost time.
        return {} if given["barebones"] else super().options(given, callbacks)

    def callbacks(self, given: Any) -> list[Callback]:
        return [] if given["barebones"] else super().callbacks(given)

    def __call__(self, trainer: Trainer, **kwargs: Any) -> None:
        trainer.fit(**kwargs)
        rank_zero_only(print)("A trial run: no checkpoint, no test.")


def names_of_classes(data: Any) -> list[str]:
    """What a datamodule calls its classes, as far as that is known before it is built."""
    cls = class_of(data.class_path)
    if inspect.isclass(cls) and issubclass(cls, ImageFolder):
        return class_names(Path(data.init_args.path).expanduser())
    return named_classes(cls)


def longer(trainer: Trainer) -> str:
    """How a run that has ended is trained further."""
    if stopped_early(trainer):
        return "EarlyStopping ended it: to train longer, leave it out, as by --trainer.callbacks null."
    if any(isinstance(config.scheduler, OneCycleLR) for config in trainer.lr_scheduler_configs):
        return "Its OneCycleLR is at its end: to train longer, start a new run."
    return "To train longer, give a larger --trainer.max_epochs (or --trainer.max_steps)."


def can_be_tested(trainer: Trainer, model: LightningModule, data: LightningDataModule) -> bool:
    has_data = is_overridden("test_dataloader", data) or is_overridden("test_dataloader", model)
    return has_data and is_overridden("test_step", model) and trainer.limit_test_batches != 0
