"""The command line: LightningCLI with this project's defaults, run folders, and errors for people."""

import inspect
import re
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    Checkpoint,
    LearningRateFinder,
    LearningRateMonitor,
    ModelPruning,
    ModelSummary,
    ProgressBar,
)
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch.optim.lr_scheduler import OneCycleLR

from mnist_lightning.classifier import DigitClassifier
from mnist_lightning.commands.arguments import (
    in_full,
    look_ahead,
    read_config,
    refuse_what_cannot_win,
    settings_of,
)
from mnist_lightning.commands.demo import demo
from mnist_lightning.commands.exceptions import explain_exception, unfit
from mnist_lightning.commands.explain import explain
from mnist_lightning.commands.export import MNIST_INPUT, export
from mnist_lightning.commands.parser import LimitedTrainer, Parser, ParserError, class_of, in_full_names
from mnist_lightning.convnet import ConvNet
from mnist_lightning.data import MNISTDataModule
from mnist_lightning.errors import UserError, report
from mnist_lightning.finetuning.features import FeatureCache
from mnist_lightning.finetuning.unfreezing import GradualUnfreezing  # noqa: F401  to be known by its short name
from mnist_lightning.photos import Photos
from mnist_lightning.pictures.callback import Pictures
from mnist_lightning.resnet import ResNet18
from mnist_lightning.runs.checkpoints import BestCheckpoint, LastCheckpoint, WholeCheckpointIO, read_checkpoint
from mnist_lightning.runs.checks import Checks, stopped_early
from mnist_lightning.runs.classes import as_many
from mnist_lightning.runs.console import ParameterCount, hush, progress
from mnist_lightning.runs.folder import LOGS, claim, find_checkpoint, quoted, results_of, run_of, training_in, unclaim
from mnist_lightning.runs.logger import RunLogger
from mnist_lightning.runs.memory import keep_freed_memory
from mnist_lightning.runs.predictions import PredictionWriter
from mnist_lightning.runs.state import RunState, refuse_inexact, write_settings

DEFAULTS = {
    "model": {"class_path": f"{ConvNet.__module__}.ConvNet"},
    "data": {"class_path": f"{MNISTDataModule.__module__}.MNISTDataModule"},
}
FUNCTIONS: dict[str, Callable[..., None]] = {"export": export, "demo": demo}  # the commands that need no Trainer
CLASSES: dict[str, tuple[type, list[type]]] = {
    "model": (LightningModule, [ConvNet, ResNet18]),
    "data": (LightningDataModule, [MNISTDataModule, Photos]),
}


def run(args: list[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0; 1 if photos could not be read; 2 after what a person can mend."""
    main_thread = threading.current_thread() is threading.main_thread()
    # Lightning's own Ctrl-C exits with 1. During training LastCheckpoint takes over.
    before = signal.signal(signal.SIGINT, lambda *_: sys.exit(130)) if main_thread else None
    try:
        typed = sys.argv[1:] if args is None else args
        if typed and typed[0] in FUNCTIONS:
            call(*typed)
        else:
            return CLI(args).exit_code
    except SIGTERMException:  # a SystemExit without a code: the process would end with 0
        return 128 + signal.SIGTERM
    except UserError as error:
        return report(error)
    except Exception as error:
        explained = explain_exception(error)
        if explained is None:
            raise
        return report(explained)
    finally:
        if main_thread:
            signal.signal(signal.SIGINT, before)
    return 0


def call(name: str, *typed: str) -> None:
    """Runs one of FUNCTIONS with the arguments that are typed as its options."""
    parser = Parser(prog=f"python -m mnist_lightning {name}", description=None)
    parser.add_function_arguments(FUNCTIONS[name])
    try:
        settings = parser.parse_args(list(typed))
    except ParserError as error:
        options = dict.fromkeys(option_names(parser), "")
        look_up = f"{parser.prog} --help lists the options."
        raise explain(in_full(str(error), list(typed)), options, {}, look_up) from error
    FUNCTIONS[name](**settings.as_dict())


class CLI(LightningCLI):
    """fit, validate, test and predict; a checkpoint brings its model, hyperparameters and data settings along.

    Attributes:
        exit_code: 0, or 1 where some photos couldn't be read.
    """

    exit_code = 0

    def __init__(self, args: ArgsType = None) -> None:
        hush()
        keep_freed_memory()
        self.typed: list[str] = sys.argv[1:] if args is None else list(args)
        self.parsers: list[LightningArgumentParser] = []  # one a subcommand, in their order
        with ExitStack() as self.held:  # the run's folder, while a fit trains in it
            super().__init__(
                LightningModule,
                LightningDataModule,
                subclass_mode_model=True,
                subclass_mode_data=True,
                auto_configure_optimizers=False,
                save_config_callback=None,  # it refuses to resume into a folder, or lets `test` overwrite fit's config
                seed_everything_default=0,
                trainer_class=LimitedTrainer,
                parser_class=Parser,
                args=args,
            )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        # weights_only is not for choosing: it is True, see checkpoints.py.
        ours = {"verbose", "weights_only", "return_predictions"}
        commands = {name: skip | ours for name, skip in LightningCLI.subcommands().items()}
        first = self.typed[0] if self.typed else ""
        return {first: commands[first]} if first in commands else commands  # a parser takes a tenth of a second

    # Parsing

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        self.parsers.append(parser)
        parser.set_defaults(DEFAULTS)
        # Every command has these, so that one config file does for all of them.
        help = "fit: the metric that chooses the best checkpoint; of equal ones the lower val/loss decides."
        parser.add_argument("--monitor", type=str, default="val/acc", help=help)
        help = "fit: whether the best of that metric is its max or its min."
        parser.add_argument("--monitor_mode", type=Literal["max", "min"], default="max", help=help)
        help = "fit, validate, test: draw pictures for TensorBoard and report.png."
        parser.add_argument("--pictures", type=bool, default=True, help=help)
        help = "fit: don't train, but look for a learning rate in a hundred steps of growing ones (arXiv:1506.01186)."
        parser.add_argument("--lr_find", type=bool, default=False, help=help)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parses with the settings of the checkpoint, where one is named, as the defaults: what is typed wins."""
        ahead = look_ahead(self.typed)
        self.checkpoint: dict[str, Any] | None = None
        saved: dict[str, Any] = {}
        if ahead.ckpt_path:
            model = ahead.model.rpartition(".")[2] if ahead.model else None
            path = find_checkpoint(ahead.ckpt_path, Path(ahead.root), model)
            self.checkpoint = read_checkpoint(path)
            resuming = ahead.subcommand == "fit"
            saved = settings_of(self.checkpoint, path, resuming)
            if ahead.subcommand in self.subcommands():
                try:
                    self.parsers[list(self.subcommands()).index(ahead.subcommand)].set_defaults(saved)
                except (ValueError, AttributeError, ImportError, TypeError) as error:
                    got = " and ".join(str(saved[key]["class_path"]) for key in ("model", "data") if key in saved)
                    raise UserError("a checkpoint of classes that exist here", got, "install their package.") from error
        try:
            self.config = parser.parse_args([in_full_names(word) for word in self.typed])
        except (ParserError, UnicodeDecodeError) as error:
            raise explain(in_full(str(error), self.typed), self._options(), class_choices()) from error
        self.settings = self.config[self.config.subcommand]
        if self.settings.lr_find and (self.config.subcommand != "fit" or self.checkpoint is not None):
            got = "--ckpt_path as well" if self.config.subcommand == "fit" else self.config.subcommand
            raise UserError("--lr_find with a new fit", got, "leave out one of the two.")
        if self.checkpoint is not None:
            self.settings.ckpt_path = str(path)
            refuse_what_cannot_win(self.settings, saved, resuming)
            if resuming and not self.checkpoint.get("optimizer_states"):
                got = f"{path}, which holds the weights alone"
                raise UserError("a checkpoint to go on from", got, "start a new run, without --ckpt_path.")

    def _options(self) -> dict[str, str]:
        """Every option that exists, and the class that it belongs to; those of the classes that are typed as well."""
        options = {option: "" for parser in self.parsers for option in option_names(parser)}
        named = [cls for cls in map(class_named, self.typed) if inspect.isclass(cls)]
        for key, (base, classes) in CLASSES.items():
            for cls in [*classes, *(cls for cls in named if issubclass(cls, base))]:
                options |= {f"--{key}.{name}": cls.__name__ for name in inspect.signature(cls).parameters}
        return options

    def __deepcopy__(self, memo: Any) -> "CLI":
        """Not copied: WeightAveraging copies the model, whose optimizer's builder refers to this object."""
        return self

    def _parse_ckpt_path(self) -> None:
        """Nothing: Lightning's own would let the checkpoint override what was typed, in silence."""

    # Building

    def before_instantiate_classes(self) -> None:
        trainer = self.settings.trainer
        if class_of(self.settings.data.class_path) is Photos and self.subcommand != "predict":
            remedy = "use Photos with predict; leave out --data to have MNIST."
            raise UserError(f"images with labels to {self.subcommand}", "Photos, which have none", remedy)
        if "://" in str(trainer.default_root_dir):
            got, remedy = trainer.default_root_dir, "give a folder, and copy the run when it is done."
            raise UserError("--trainer.default_root_dir on this machine", got, remedy)
        if trainer.default_root_dir:
            trainer.default_root_dir = str(Path(trainer.default_root_dir).expanduser())
        if self.subcommand != "fit":
            if not self.settings.ckpt_path:
                remedy = "add --ckpt_path FILE, or best or last for the newest run."
                raise UserError(f"a checkpoint to {self.subcommand}", "none", remedy)
            if trainer.barebones and self.subcommand != "predict":
                got = "--trainer.barebones true, which logs none"
                raise UserError(f"metrics to {self.subcommand} with", got, "leave it out.")
            return
        for callback in given(trainer.callbacks) if self.checkpoint is not None else []:
            if (cls := class_of(callback.class_path)) in (BatchSizeFinder, LearningRateFinder):
                remedy = "start a new run with what it found, and without it."
                raise UserError("a run to go on with", f"{cls.__name__}, which would begin it anew", remedy)
        root = Path(trainer.default_root_dir or ".")
        if self.checkpoint is None and SLURMEnvironment.detect() and any(root.glob("hpc_ckpt_*.ckpt")):
            got = f"{next(root.glob('hpc_ckpt_*.ckpt'))}, which Lightning would resume from without a word"
            raise UserError("no checkpoint of another job here", got, "move it away, or give it as --ckpt_path.")
        for name in ("limit_train_batches", "accumulate_grad_batches", "check_val_every_n_epoch"):
            if trainer[name] == 0:
                raise UserError(f"--trainer.{name} above 0", "0", "give a larger number, or leave it out.")
        if self.settings.lr_find:
            usual = {"fast_dev_run": False, "accumulate_grad_batches": 1, "overfit_batches": 0}
            for name, value in {**usual, "max_steps": -1, "max_time": None}.items():
                if trainer[name] != value:
                    raise UserError("--lr_find alone", f"--trainer.{name} {trainer[name]} as well", "leave one out.")
            trainer.max_epochs = -1  # a hundred steps, over as many epochs as that takes
        elif trainer.max_epochs is None and trainer.max_steps == -1 and trainer.max_time is None:
            model = class_of(self.settings.model.class_path)
            if inspect.isclass(model) and issubclass(model, DigitClassifier):
                trainer.max_epochs = model.default_epochs

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        settings = self.config_init[self.subcommand]["trainer"]
        dry = settings["fast_dev_run"] or settings["barebones"] or self.settings.lr_find
        self.fitting = self.subcommand == "fit" and not dry
        self.pictures: Pictures | None = None
        self.predictions: PredictionWriter | None = None
        later = ("configure_model", "setup", "on_load_checkpoint")  # where layers or names may come from
        if self.checkpoint is not None and not any(is_overridden(hook, self.model) for hook in later):
            # What doesn't fit is refused before anything is written.
            try:
                self.model.load_state_dict(self.checkpoint["state_dict"], strict=self.model.strict_loading)
            except RuntimeError as error:
                raise unfit(error, f"{self.settings.ckpt_path}, ") from error
        if self.checkpoint is not None and self.subcommand == "fit":
            refuse_inexact(given(settings["callbacks"]), self.checkpoint)
        if settings["barebones"]:  # Lightning refuses whatever might cost time
            return super().instantiate_trainer(**kwargs)
        self._prepare()
        try:
            kwargs["logger"] = self._loggers(settings["logger"])
            kwargs["plugins"] = self._plugins(settings["plugins"])
            if settings["num_sanity_val_steps"] is None:
                kwargs["num_sanity_val_steps"] = 1  # enough to see that the monitored metric is there
            callbacks = self._callbacks(settings)
            if not any(isinstance(callback, ProgressBar) for callback in callbacks + given(settings["callbacks"])):
                kwargs["enable_progress_bar"] = False
            if not any(isinstance(callback, Checkpoint) for callback in callbacks + given(settings["callbacks"])):
                kwargs["enable_checkpointing"] = False  # Lightning would add a ModelCheckpoint of its own
            self.trainer_defaults = {**self.trainer_defaults, "callbacks": callbacks}
            return super().instantiate_trainer(**kwargs)
        except Exception:
            self._give_back()
            raise

    def _prepare(self) -> None:
        """Gets what a fit needs before it leaves a trace (a failed download makes no run folder), then the folder."""
        if self.subcommand != "fit":
            self.folder = results_of(Path(self.settings.ckpt_path))
            return
        if isinstance(self.datamodule, MNISTDataModule):
            self.datamodule.prepare_data()
            if "source" in self.settings.data.init_args:
                self.settings.data.init_args.source = self.datamodule.source  # auto is settled now
        if self.checkpoint is None and isinstance(self.model, ResNet18):
            self.model.load_pretrained()
        # All that repeats the run, as plain values: for config.yaml and for each checkpoint.
        self.plain_settings = without_instances(yaml.safe_load(self.parsers[0].dump(self.settings, skip_none=False)))
        self.plain_settings["ckpt_path"] = None
        # Resolved, as a resumed run's folder is: ModelCheckpoint's state holds it.
        root = Path(self.settings.trainer.default_root_dir or ".").resolve()
        resumed = run_of(Path(self.settings.ckpt_path)) if self.checkpoint is not None else None
        self.fresh, self.config_file = resumed is None, None
        if resumed is not None and self.checkpoint is not None:
            self.folder = resumed
            if read_config(resumed / "config.yaml") == self.checkpoint.get("mnist_lightning"):  # not somebody's own
                self.config_file = resumed / "config.yaml"
        elif self.fitting and rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            digits = isinstance(self.datamodule, MNISTDataModule) and self.datamodule.source == "digits"
            self.folder = claim(root, type(self.model).__name__ + ("-digits" if digits else ""))
            try:
                write_settings(self.folder / "config.yaml", self.plain_settings)
            except BaseException:
                self._give_back()
                raise
        else:
            self.folder = root  # only the first process writes
        if self.fitting and rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            self.held.enter_context(training_in(self.folder))

    def _give_back(self) -> None:
        if self.fitting and self.fresh and rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            unclaim(self.folder)

    def _loggers(self, wanted: Any) -> Any:
        """The project's own where none is named; beside it those of a list; else what the user says."""
        if wanted not in (None, True) and not (isinstance(wanted, list) and wanted):
            return wanted or False
        if self.subcommand == "predict" or (self.subcommand == "fit" and not self.fitting):
            return wanted or False
        checkpoint = self.checkpoint or {"global_step": None}
        at = {"evaluated_at": checkpoint["global_step"]}
        if self.subcommand == "fit":
            at = {"resumed_after": checkpoint.get("logged_step", checkpoint["global_step"])}
        return [RunLogger(self.folder, **at), *given(wanted)]

    def _plugins(self, wanted: Any) -> list[Any]:
        plugins = given(wanted)
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins.append(WholeCheckpointIO())
        if SLURMEnvironment.detect() and not any(isinstance(plugin, SLURMEnvironment) for plugin in plugins):
            plugins.append(SLURMEnvironment(auto_requeue=False))  # it would resume into a new run; use --ckpt_path last
        return plugins

    def _callbacks(self, settings: Any) -> list[Any]:
        """What a run has beside the user's callbacks: the user's own bar, summary and monitor replace it."""
        theirs = given(settings["callbacks"])

        def missing(cls: type) -> bool:
            return not any(isinstance(callback, cls) for callback in theirs)

        callbacks: list[Any] = [Checks()]
        if self.fitting:  # before those that look at the learning rates when an epoch begins
            callbacks.append(RunState(self.plain_settings, self.config_file))
        if missing(ProgressBar):
            callbacks.append(progress(settings["enable_progress_bar"]))
        if missing(ModelSummary) and settings["enable_model_summary"] is not False:
            callbacks.append(ParameterCount())
        if isinstance(self.model, ResNet18) and self.subcommand == "fit":
            callbacks.append(FeatureCache())
        if not missing(ModelPruning):
            self.model.to(memory_format=torch.contiguous_format)  # torch's pruning can't flatten channels_last weights
        logged = settings["logger"] not in (False, [])
        if self.fitting and logged and missing(LearningRateMonitor):
            callbacks.append(LearningRateMonitor())
        if self.settings.pictures and (self.fitting or self.subcommand in ("validate", "test")):
            self.pictures = Pictures(None if self.fitting else (self.checkpoint or {}).get("global_step"))
            callbacks.append(self.pictures)
        if self.fitting and settings["enable_checkpointing"] is not False:
            checkpoints = self.folder / "checkpoints"
            self.best = BestCheckpoint(checkpoints, self.settings.monitor, self.settings.monitor_mode)
            callbacks += [self.best, LastCheckpoint(checkpoints / "last.ckpt")]
        if self.subcommand == "predict" and not isinstance(self.datamodule, Photos):
            self.predictions = PredictionWriter(self.folder / "predictions.csv")
            callbacks.append(self.predictions)
        return callbacks

    # Running

    def fit(self, **kwargs: Any) -> None:
        """Fits; a run that fails before its first step leaves nothing."""
        if self.settings.lr_find:
            finder: Any = Tuner(self.trainer).lr_find(self.model, datamodule=self.datamodule, update_attr=False)
            rate = finder.suggestion() if finder else None
            if rate is None:
                remedy = "try --data.batch_size 16, or --trainer.limit_train_batches 1.0."
                raise UserError("enough steps to see a learning rate", "too few", remedy)
            option = "--model.optimizer.lr " if "optimizer" in self.settings.model.get("init_args", {}) else ""
            rank_zero_only(print)(f"A learning rate to try: {option}{rate:.2g}; nothing was trained.")
            return
        try:
            self.trainer.fit(**kwargs)
        except Exception:
            if self.fitting and self.trainer.global_step == 0:
                self._give_back()
            raise

    def after_fit(self) -> None:
        """Tests the best checkpoint on the test set and says where everything is."""
        if not self.fitting:
            if not self.settings.lr_find:
                print("A trial run: no checkpoint, no test.")
            return
        if self.checkpoint is not None and self.trainer.global_step == self.checkpoint["global_step"]:
            longer = "To train longer, give a larger --trainer.max_epochs (or --trainer.max_steps)."
            if any(isinstance(config.scheduler, OneCycleLR) for config in self.trainer.lr_scheduler_configs):
                longer = "Its OneCycleLR is at its end: to train longer, start a new run."
            if stopped_early(self.trainer):
                longer = "EarlyStopping ended it: to train longer, leave it out, as by --trainer.callbacks null."
            print(f"This run had already ended, at step {self.trainer.global_step}: nothing was trained. {longer}")
        saved = self.fresh and any(self.folder.glob("checkpoints/*.ckpt"))
        if self.trainer.global_step == 0 and self.checkpoint is None and not saved and self.trainer.world_size == 1:
            print("Nothing was trained: no checkpoint, no test.")
            self._give_back()
            return
        best = self._best_path()
        if best is not None:
            # Not by trainer.test(ckpt_path=...), which gives WeightAveraging's callbacks their other weights.
            checkpoint = read_checkpoint(best)
            self.model.on_load_checkpoint(checkpoint)
            self.model.load_state_dict(checkpoint["state_dict"], strict=self.model.strict_loading)
        self.results: dict[str, float] = {}
        if self._can_test():
            self.test(datamodule=self.datamodule, model=self.model)
        if not self.trainer.is_global_zero:
            return
        self._say("Test", "test")
        self._say_where(best)

    def _best_path(self) -> Path | None:
        if self.settings.trainer.enable_checkpointing is False:
            return None
        path = Path(str(self.best.dirpath)) / "best.ckpt"
        return path if path.is_file() else None

    def _can_test(self) -> bool:
        has_data = is_overridden("test_dataloader", self.datamodule) or is_overridden("test_dataloader", self.model)
        return has_data and is_overridden("test_step", self.model) and self.trainer.limit_test_batches != 0

    def _say_where(self, best: Path | None) -> None:
        boards = [logger for logger in self.trainer.loggers if isinstance(logger, TensorBoardLogger)]
        if boards:
            folder = Path(str(boards[0].log_dir))
            if isinstance(boards[0], RunLogger):
                folder = self.folder.parent.parent if self.folder.parents[1].name == LOGS else self.folder
                if self.pictures is not None:
                    self.pictures.report(self.folder / "report.png", boards[0].rows)
            print(f"Dashboards     tensorboard --logdir {quoted(folder)}")
        photos = isinstance(self.datamodule, MNISTDataModule) and isinstance(self.model, DigitClassifier)
        if best is not None and photos:
            kept = f"--ckpt_path {quoted(best)} --data Photos --data.path PHOTO_OR_FOLDER"
            print(f"Your digits    python -m mnist_lightning predict {kept}")
        if isinstance(self.datamodule, MNISTDataModule) and self.datamodule.fell_back:
            print("WARNING: this was not MNIST, which could not be had, but scikit-learn's 1,797 digits.")

    def test(self, **kwargs: Any) -> None:
        self.results = joined(self.trainer.test(verbose=False, **kwargs))  # `_say` says it in words

    def validate(self, **kwargs: Any) -> None:
        self.results = joined(self.trainer.validate(verbose=False, **kwargs))

    def after_test(self) -> None:
        self._say("Test", "test")

    def after_validate(self) -> None:
        self._say("Validation", "val")

    def predict(self, **kwargs: Any) -> None:
        if isinstance(self.datamodule, Photos):
            seen = (self.checkpoint or {}).get("example_input", MNIST_INPUT)
            if seen != MNIST_INPUT:
                got, remedy = f"one of {seen['dtype']} (B, *{seen['shape']})", "give your own datamodule: --data CLASS."
                raise UserError("a model of uint8 images (B, 1, 28, 28) for Photos", got, remedy)
        answers: Any = self.trainer.predict(**kwargs) or []
        if isinstance(self.datamodule, Photos):
            path = self.folder / "photos.csv"
            if not all(isinstance(answer, dict) and "probabilities" in answer for answer in answers):
                got, remedy = type(self.model).__name__, "return them from predict_step, as DigitClassifier does."
                raise UserError("a model that predicts {'probabilities': (B, C)} for Photos", got, remedy)
            probabilities = [answer["probabilities"].float().cpu() for answer in answers]
            count = probabilities[0].shape[1] if probabilities else 10
            names = as_many((self.checkpoint or {}).get("class_names"), count)
            whole = self.datamodule.tell(torch.cat([torch.empty(0, count), *probabilities]), path, names)
            self.exit_code = 0 if whole else 1
            print(f"Predictions    {quoted(path)}")
        elif self.predictions is not None and self.trainer.is_global_zero:
            written = self.predictions.written
            print(f"Predictions    {quoted(self.predictions.path) if written else 'none were made, none are written'}")

    def _say(self, title: str, part: str) -> None:
        """What was measured, on which images, and where the run is."""
        if not self.trainer.is_global_zero:
            return
        if f"{part}/acc" in self.results:
            print(f"{title + ' accuracy':<14} {100 * self.results[f'{part}/acc']:.2f} % on {self._images(part)}")
        else:
            if self.subcommand != "fit" and not self.results:
                remedy = f"change --data.val_size or --trainer.limit_{part}_batches; or log a metric."
                raise UserError(f"{title.lower()} images", "none", remedy)
            shown = "  ".join(f"{name} {value:.4f}" for name, value in self.results.items())
            print(f"{title:<14} {shown or 'not measured'}")
        print(f"{'Run':<14} {quoted(self.folder)}")

    def _images(self, part: str) -> str:
        """Which images an accuracy was measured on."""
        trainer = self.trainer
        used, loaders = (
            (trainer.num_test_batches, trainer.test_dataloaders)
            if part == "test"
            else (trainer.num_val_batches, trainer.val_dataloaders)
        )
        sizes = [sized_len(loader) for loader in CombinedLoader(loaders).flattened] if loaders is not None else []
        some = "a part of " if any(n < (size or 0) for n, size in zip(given(used), sizes, strict=False)) else ""
        kind = {"test": "test", "val": "validation"}[part]
        data = self.datamodule
        if not isinstance(data, MNISTDataModule):
            return f"{some}the {kind} images of {type(data).__name__}"
        if loaders is None:  # --trainer.strategy ddp_spawn: other processes had them
            data.setup(part)
        count = f"{len(data.test_set if part == 'test' else data.val_set):,} {kind}"
        if data.source == "mnist":
            return f"{some}MNIST's {count} images"
        owner = "scikit-learn's digits, not MNIST" if data.source == "digits" else type(data).__name__
        return f"{some}the {count} images of {owner}"


def without_instances(settings: Any) -> Any:
    """Settings that jsonargparse takes back: it writes "Unable to serialize instance" before ModelPruning's function,
    which has a name, StochasticWeightAveraging's device, and objects. Names are kept; objects are defaults, left out.
    """
    if isinstance(settings, dict):
        kept = {key: without_instances(value) for key, value in settings.items()}
        return {key: value for key, value in kept.items() if not str(value).startswith("<")}
    if isinstance(settings, list):
        return [without_instances(value) for value in settings]
    return settings.removeprefix("Unable to serialize instance ") if isinstance(settings, str) else settings


def joined(results: list[Any]) -> dict[str, float]:
    """The metrics of all data loaders."""
    return {name: value for result in results for name, value in result.items()}


def given(value: Any) -> list[Any]:
    """What may be None, one thing or several, as a list."""
    if value in (None, True, False):
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def option_names(parser: LightningArgumentParser) -> list[str]:
    return [option for action in parser._actions for option in action.option_strings]


def class_named(word: str) -> Any:
    """The class that a word of the command line names by its path, as `mine.Net` or `--model=mine.Net`; else None."""
    path = re.fullmatch(r"(?:--.*=)?([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+)", word)
    try:
        return class_of(path[1]) if path else None
    except (ImportError, AttributeError):
        return None


def class_choices() -> dict[str, list[str]]:
    names = {key: [cls.__name__ for cls in classes] for key, (_, classes) in CLASSES.items()}
    return names | {"model.optimizer": dir(torch.optim), "model.scheduler": dir(torch.optim.lr_scheduler)}
