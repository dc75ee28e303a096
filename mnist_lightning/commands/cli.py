"""The command line: LightningCLI with this project's defaults, run folders, and errors for people."""

import inspect
import signal
import sys
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from mnist_lightning.commands.arguments import (
    as_config,
    check_architecture,
    class_of,
    full_names,
    in_full,
    look_ahead,
    refuse_what_cannot_win,
    settings_of_run,
)
from mnist_lightning.runs.checkpoints import LastCheckpoint, RunCheckpoint, WholeCheckpointIO, read_checkpoint
from mnist_lightning.classifier import DigitClassifier
from mnist_lightning.runs.console import Bar, NoProfiler, ParameterCount, hush, progress
from mnist_lightning.convnet import ConvNet
from mnist_lightning.data import MNISTDataModule
from mnist_lightning.commands.demo import demo
from mnist_lightning.errors import UserError, report
from mnist_lightning.commands.explain import LOOK_UP, explain
from mnist_lightning.commands.export import export
from mnist_lightning.files import write_whole
from mnist_lightning.runs.interruption import Interruption
from mnist_lightning.loop import StepLoop
from mnist_lightning.runs.memory import keep_freed_memory
from mnist_lightning.photos import Photos
from mnist_lightning.pictures.callback import Pictures
from mnist_lightning.pictures.callback import report as write_report
from mnist_lightning.runs.predictions import PredictionWriter
from mnist_lightning.resnet import ResNet18
from mnist_lightning.runs.folder import RunLogger, claim, newest_checkpoint, run_of, shown_path, unclaim
from mnist_lightning.finetuning.unfreezing import GradualUnfreezing  # noqa: F401  short names are those of imported classes

DEFAULTS = {
    "model": {"class_path": f"{ConvNet.__module__}.ConvNet"},
    "data": {"class_path": f"{MNISTDataModule.__module__}.MNISTDataModule"},
}
FUNCTIONS: dict[str, Callable[..., None]] = {"export": export, "demo": demo}  # the commands that need no Trainer
CLASSES: dict[str, list[type]] = {"model": [ConvNet, ResNet18], "data": [MNISTDataModule, Photos]}
TRAINER_DEFAULTS = {
    "num_sanity_val_steps": 0,  # the shipped models' validation is tested; it would delay each start
}


def run(args: list[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0; 1 if photos could not be read; 2 after what a person can mend."""
    main_thread = threading.current_thread() is threading.main_thread()
    # Lightning's own Ctrl-C exits with 1. During training interruption.py takes over.
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
    except ValueError as error:  # of the Trainer or torch, for values that only show in use
        return report(UserError("settings that fit together", str(error).strip().splitlines()[0], LOOK_UP))
    except OSError as error:
        got = f"{error.strerror or error}" + (f": {error.filename}" if error.filename else "")
        return report(UserError("to read and write the run's files", got, "choose another place, or mend it."))
    except MisconfigurationException as error:
        return report(UserError("settings that fit together", str(error).splitlines()[0], LOOK_UP))
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
        options = dict.fromkeys(parser._option_string_actions, "")
        look_up = f"{parser.prog} --help lists the options."
        raise explain(in_full(str(error), list(typed)), options, {}, look_up) from error
    FUNCTIONS[name](**settings.as_dict())


class ParserError(ValueError):
    """A parser's report. Parsers are nested, and the outer one reads the inner one's: only the last is explained."""


class Parser(LightningArgumentParser):
    """Takes no abbreviated options, and raises instead of printing 45 lines."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> Any:
        raise ParserError(message) from ex


class CLI(LightningCLI):
    """fit, validate, test and predict; a checkpoint brings its model, hyperparameters and data settings along.

    Attributes:
        exit_code: 0, or 1 where some photos couldn't be read.
    """

    exit_code = 0

    def __init__(self, args: ArgsType = None) -> None:
        hush()
        keep_freed_memory()
        super().__init__(
            DigitClassifier,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            save_config_callback=None,  # it refuses to resume into a folder, or lets `test` overwrite fit's config
            seed_everything_default=0,
            trainer_defaults=TRAINER_DEFAULTS,
            parser_class=Parser,
            args=args,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        # weights_only is not for choosing: it is True, see checkpoints.py.
        return {name: skip | {"verbose", "weights_only"} for name, skip in LightningCLI.subcommands().items()}

    # Parsing

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.set_defaults(DEFAULTS)
        if not self._subcommand_parsers:  # fit's is the first
            help = "instead of a fit, look for a learning rate in a hundred steps of growing ones (arXiv:1506.01186)."
            parser.add_argument("--lr_find", type=bool, default=False, help=help)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parses with the settings of the checkpoint, where one is named, as the defaults: what is typed wins."""
        typed = sys.argv[1:] if args is None else list(args)
        ahead = look_ahead(typed)
        self.checkpoint: dict[str, Any] | None = None
        saved: dict[str, Any] = {}
        if ahead.ckpt_path:
            path = Path(ahead.ckpt_path)
            if ahead.ckpt_path in ("best", "last"):
                model = ahead.model or (ConvNet.__name__ if ahead.subcommand == "fit" else None)
                model = model and model.rpartition(".")[2]
                path = newest_checkpoint(Path(ahead.root), ahead.ckpt_path, model)
            self.checkpoint = read_checkpoint(path)
            saved = {
                "model": as_config(self.checkpoint["hyper_parameters"], DEFAULTS["model"]["class_path"]),
                "data": as_config(
                    self.checkpoint.get("datamodule_hyper_parameters", {}), DEFAULTS["data"]["class_path"]
                ),
            }
            if ahead.subcommand == "fit":
                saved |= settings_of_run(run_of(path), self.checkpoint, saved["data"]["class_path"])
        elif ahead.model or ahead.optimizer:
            # Not left to the parser: going from the default class to this one, jsonargparse keeps the first one's
            # arguments where the names are the same: ConvNet's learning rate for ResNet18, SGD's for AdamW.
            saved = {"model": {"class_path": ahead.model or DEFAULTS["model"]["class_path"]}}
            if hasattr(torch.optim, str(ahead.optimizer).removeprefix("torch.optim.")):
                name = f"torch.optim.{ahead.optimizer.removeprefix('torch.optim.')}"
                saved["model"]["init_args"] = {"optimizer": {"class_path": name}}
        if ahead.subcommand in self._subcommand_parsers:
            try:
                self._subcommand_parsers[ahead.subcommand].set_defaults(saved)
            except (ValueError, AttributeError, ImportError) as error:  # of a misspelt --model the parser says so
                if self.checkpoint is not None:
                    got = f"{saved['model']['class_path']} and {saved['data']['class_path']}"
                    raise UserError("a checkpoint of classes that exist here", got, "install their package.") from error
        try:
            self.config = parser.parse_args(full_names(typed))
        except (ParserError, UnicodeDecodeError) as error:
            raise explain(in_full(str(error), typed), self._options(), _class_names()) from error
        if self.checkpoint is not None:
            settings = self.config[self.config.subcommand]
            settings.ckpt_path = str(path)
            refuse_what_cannot_win(settings, saved, resuming=self.config.subcommand == "fit")
            if self.config.subcommand == "fit" and not self.checkpoint.get("optimizer_states"):
                got = f"{path}, which holds the weights alone"
                raise UserError("a checkpoint to go on from", got, "start a new run, without --ckpt_path.")

    def _options(self) -> dict[str, str]:
        """Every option that exists, and the class that it belongs to."""
        options = {
            option: "" for parser in self._subcommand_parsers.values() for option in parser._option_string_actions
        }
        for key, classes in CLASSES.items():
            for cls in classes:
                options |= {f"--{key}.{name}": cls.__name__ for name in inspect.signature(cls).parameters}
        return options

    def _parse_ckpt_path(self) -> None:
        """Nothing: Lightning's own would let the checkpoint override what was typed, in silence."""

    # Building

    def before_instantiate_classes(self) -> None:
        settings = self.config[self.subcommand]
        if class_of(settings.data.class_path) is Photos:
            Photos.check(str(self.subcommand))
        if self.subcommand == "fit":
            trainer = settings.trainer
            if trainer.max_epochs is None and trainer.max_steps == -1 and trainer.max_time is None:
                trainer.max_epochs = class_of(settings.model.class_path).default_epochs
        elif not settings.ckpt_path:
            raise UserError(
                f"a checkpoint to {self.subcommand}",
                "none",
                "add --ckpt_path FILE, or best or last for the newest run.",
            )

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except (ValueError, TypeError) as error:
            if isinstance(error, UserError):
                raise
            reason = str(error).splitlines()[0]
            raise UserError("settings that the Trainer, the model and the data take", reason, LOOK_UP) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        settings = self._get(self.config_init, "trainer")
        searching = self.subcommand == "fit" and self.config_init["fit"].lr_find
        self.fitting = self.subcommand == "fit" and not (settings["fast_dev_run"] or searching)
        self.own_logger = settings["logger"] in (None, True)
        validates = getattr(self.datamodule, "val_size", 1) > 0
        self.model_checkpoint = RunCheckpoint(
            filename="best",
            monitor="val/acc" if validates else None,  # without validation images the last epoch is kept
            mode="max",
            enable_version_counter=False,
        )
        bar = progress(settings["enable_progress_bar"])
        callbacks: list[Any] = [bar]
        if settings["enable_model_summary"] is not False:
            callbacks.append(ParameterCount())
        if self.fitting and settings["enable_checkpointing"] is not False:
            # Others save `last`: the first one's save_last=True does so only together with a better best. Once a
            # minute, too, so that a kill loses no more than that.
            minutely = RunCheckpoint(
                filename="last", train_time_interval=timedelta(minutes=1), enable_version_counter=False
            )
            callbacks += [self.model_checkpoint, LastCheckpoint(), minutely]
        if self.fitting and settings["logger"] is not False:
            callbacks.append(LearningRateMonitor())
        self.pictures = Pictures()
        if self.fitting or self.subcommand in ("validate", "test"):
            callbacks.append(self.pictures)
        self.trainer_defaults = {**self.trainer_defaults, "callbacks": callbacks}
        plugins = settings["plugins"] or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        kwargs["plugins"] = [*plugins, WholeCheckpointIO()]
        kwargs["enable_progress_bar"] = isinstance(bar, Bar)
        kwargs["profiler"] = settings["profiler"] or NoProfiler()
        if self.own_logger:
            kwargs["logger"] = False  # until the run's folder is claimed
        trainer = super().instantiate_trainer(**kwargs)
        trainer.fit_loop.epoch_loop = StepLoop(trainer, trainer.min_steps, trainer.max_steps)
        return trainer

    def after_instantiate_classes(self) -> None:
        if self.checkpoint is not None:
            check_architecture(self.model, self.checkpoint, self.config[self.subcommand].ckpt_path)

    # Running

    def before_fit(self) -> None:
        """Gets what the run needs before it leaves a trace: a failed download makes no run folder."""
        settings = self.config["fit"]
        self.datamodule.prepare_data()
        if self.checkpoint is None and isinstance(self.model, ResNet18):
            self.model.load_pretrained()
        source = getattr(self.datamodule, "source", None)
        if "source" in settings.data.init_args:  # a datamodule of one's own may not take it
            settings.data.init_args.source = source
        if not self.fitting:
            return
        name = type(self.model).__name__ + ("-digits" if source == "digits" else "")
        root = Path(self.trainer.default_root_dir)
        if settings.ckpt_path is not None:
            self.run_folder = run_of(Path(settings.ckpt_path))
        elif self.trainer.is_global_zero:
            self.run_folder = claim(root, name)
            try:
                with write_whole(self.run_folder / "config.yaml") as file:
                    kept = settings.clone()
                    del kept["lr_find"]  # other commands, which take the file as well, don't have it
                    file.write(self._parser("fit").dump(kept, skip_none=False).encode())
            except OSError:
                unclaim(self.run_folder)
                raise
        else:
            self.run_folder = root  # the first process's folder counts: Lightning broadcasts it
        folder = self.run_folder.resolve() / "checkpoints"
        for callback in self.trainer.checkpoint_callbacks:
            if isinstance(callback, RunCheckpoint) and callback.dirpath is None:
                callback.dirpath = str(folder)
        self.trainer.callbacks.insert(0, Interruption(folder / "last.ckpt"))  # type: ignore[attr-defined]
        self._log_into(self.run_folder, (self.checkpoint or {}).get("global_step"))

    def fit(self, **kwargs: Any) -> None:
        """Fits; a run that fails before its first step leaves nothing."""
        if self.config["fit"].lr_find:
            finder: Any = Tuner(self.trainer).lr_find(self.model, datamodule=self.datamodule, update_attr=False)
            print(f"A learning rate to try: --model.optimizer.lr {finder.suggestion():.2g}; nothing was trained.")
            return
        try:
            self.trainer.fit(**kwargs)
        except Exception:
            fresh = self.fitting and self.checkpoint is None and self.trainer.global_step == 0
            if fresh and self.trainer.is_global_zero:  # the others' run_folder isn't the run's
                unclaim(self.run_folder)
            raise

    def after_fit(self) -> None:
        """Tests the best checkpoint on the official test set and says where everything is."""
        if not self.fitting:
            if not self.config["fit"].lr_find:
                print("fast_dev_run: no checkpoint, no test.")
            return
        best = self.model_checkpoint.best_model_path or None  # none was saved: test the model as it is now
        self.trainer.test(self.model, datamodule=self.datamodule, ckpt_path=best, verbose=False)
        self.after_test()
        if self.trainer.is_global_zero:
            if isinstance(self.trainer.logger, RunLogger) and "test" in self.pictures.answers:
                report_png = self.run_folder / "report.png"
                write_report(report_png, self.pictures.answers["test"], self.trainer.logger.rows)
            print(f"Dashboards     tensorboard --logdir {shown_path(self.run_folder.parent.parent)}")
            kept = f"--ckpt_path {shown_path(Path(best))}" if best else "--ckpt_path FILE (this run kept none)"
            print(f"Your digits    python -m mnist_lightning predict {kept} --data Photos --data.path photo.png")
            if getattr(self.datamodule, "fell_back", False):
                print("WARNING: this was not MNIST, which could not be had, but scikit-learn's 1,797 digits.")

    def before_test(self) -> None:
        self.run_folder = run_of(Path(self.config[self.subcommand].ckpt_path))
        self._log_into(self.run_folder)

    def after_test(self) -> None:
        self._report("Test", "test")

    before_validate = before_test

    def test(self, **kwargs: Any) -> None:
        self.trainer.test(verbose=False, **kwargs)  # `_report` says it in words

    def validate(self, **kwargs: Any) -> None:
        self.trainer.validate(verbose=False, **kwargs)

    def after_validate(self) -> None:
        self._report("Validation", "val")

    def before_predict(self) -> None:
        self.run_folder = run_of(Path(self.config["predict"].ckpt_path))
        name = "photos.csv" if isinstance(self.datamodule, Photos) else "predictions.csv"
        self.predictions = self.run_folder / name
        if not isinstance(self.datamodule, Photos):
            writer = PredictionWriter(self.predictions)
            self.trainer.callbacks.append(writer)  # type: ignore[attr-defined]

    def predict(self, **kwargs: Any) -> None:
        answers: Any = self.trainer.predict(**kwargs) or []
        if isinstance(self.datamodule, Photos):
            probabilities = [answer["probabilities"].float().cpu() for answer in answers]
            whole = self.datamodule.tell(torch.cat([torch.empty(0, 10), *probabilities]), self.predictions)
            self.exit_code = 0 if whole else 1

    def after_predict(self) -> None:
        if self.trainer.is_global_zero:
            print(f"Predictions    {shown_path(self.predictions)}")

    def _log_into(self, run: Path, steps: int | None = None) -> None:
        if self.own_logger:
            self.trainer.loggers = [RunLogger(run, steps)]

    def _report(self, title: str, part: str) -> None:
        if not self.trainer.is_global_zero:
            return
        if f"{part}/acc" not in self.trainer.callback_metrics:
            remedy = f"change --data.val_size or --trainer.limit_{part}_batches."
            raise UserError(f"{title.lower()} images", "none", remedy)
        accuracy = 100 * float(self.trainer.callback_metrics[f"{part}/acc"])
        print(f"{title + ' accuracy':<14} {accuracy:.2f} % on {self._images(part)}")
        print(f"{'Run':<14} {shown_path(self.run_folder)}")

    def _images(self, part: str) -> str:
        """Which images an accuracy was measured on."""
        batches = len(getattr(self.datamodule, f"{part}_dataloader")())
        limited = sum(getattr(self.trainer, f"num_{part}_batches")) < batches
        subset = {"test": "test", "val": "validation"}[part]
        indices: Any = getattr(self.datamodule, "indices", {})
        count = f"{len(indices[part]):,} {subset}" if part in indices else subset
        source = {"mnist": "MNIST's {} images", "digits": "the {} images of scikit-learn's digits, not MNIST"}
        own = f"the {{}} images of {type(self.datamodule).__name__}"
        return ("a part of " if limited else "") + source.get(getattr(self.datamodule, "source", ""), own).format(count)


def _class_names() -> dict[str, list[str]]:
    names = {key: [cls.__name__ for cls in classes] for key, classes in CLASSES.items()}
    return names | {"model.optimizer": dir(torch.optim), "model.scheduler": dir(torch.optim.lr_scheduler)}
