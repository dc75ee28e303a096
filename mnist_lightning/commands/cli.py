"""The command line: run(), with its exit codes; and LightningCLI with this project's conventions.

A command is one file: COMMANDS and FUNCTIONS say which. What is refused is in refusals.py, what is said of errors in
messages.py, how a checkpoint's settings join the typed ones in settings.py.
"""

import signal
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from mnist_lightning.commands.command import Command, as_list
from mnist_lightning.commands.demo import demo
from mnist_lightning.commands.evaluate import Test, Validate
from mnist_lightning.commands.export import export
from mnist_lightning.commands.fit import Fit, TrialFit
from mnist_lightning.commands.lr_find import LearningRateFind
from mnist_lightning.commands.messages import explain, explain_exception, look_up, name_whole_option
from mnist_lightning.commands.parser import (
    CommandTrainer,
    Parser,
    ParserError,
    class_choices,
    in_full_names,
    option_names,
    options_of,
)
from mnist_lightning.commands.predict import Predict
from mnist_lightning.commands.refusals import built, typed, untrusted
from mnist_lightning.commands.settings import config_files_first, look_ahead, of_a_stranger, settings_of
from mnist_lightning.convnet import ConvNet
from mnist_lightning.data import MNISTDataModule
from mnist_lightning.errors import UserError, refuse, report
from mnist_lightning.finetuning.unfreezing import GradualUnfreezing  # noqa: F401  to be known by its short name
from mnist_lightning.runs.console import hush
from mnist_lightning.runs.folder import find_checkpoint
from mnist_lightning.runs.memory import keep_freed_memory
from mnist_lightning.runs.saved import Saved

DEFAULTS = {
    "model": {"class_path": f"{ConvNet.__module__}.{ConvNet.__name__}"},
    "data": {"class_path": f"{MNISTDataModule.__module__}.{MNISTDataModule.__name__}"},
}


def fit(name: str, settings: Any, *args: Any) -> Command:
    """The kind of fit that the settings ask for."""
    trial = settings.trainer.fast_dev_run or settings.trainer.barebones
    kind = LearningRateFind if settings.lr_find else TrialFit if trial else Fit
    return kind(name, settings, *args)


COMMANDS: dict[str, Callable[..., Command]] = {
    "fit": fit, "validate": Validate, "test": Test, "predict": Predict, "lr_find": LearningRateFind,
}  # fmt: skip
FUNCTIONS: dict[str, Callable[..., None]] = {"export": export, "demo": demo}  # those that need no Trainer


def run(args: list[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0; 1 if photos could not be read; 2 after what a person can mend."""
    main_thread = threading.current_thread() is threading.main_thread()
    # Lightning's own Ctrl-C exits with 1. During training LastCheckpoint takes over.
    signals = {signal.SIGINT: 130, signal.SIGTERM: 143} if main_thread else {}
    before = {number: signal.signal(number, lambda *_, code=code: sys.exit(code)) for number, code in signals.items()}
    try:
        words = sys.argv[1:] if args is None else args
        if words and words[0] in FUNCTIONS:
            call(*words)
        else:
            return CLI(args).command.exit_code
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
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0


def call(name: str, *words: str) -> None:
    """Runs one of FUNCTIONS with the words that are typed as its options."""
    parser = Parser(prog=f"python -m mnist_lightning {name}", description=None)
    parser.add_function_arguments(FUNCTIONS[name])
    try:
        settings = parser.parse_args(list(words))
    except ParserError as error:
        options = dict.fromkeys(option_names(parser), "")
        remedy = f"{parser.prog} --help lists the options."
        raise explain(name_whole_option(str(error), list(words)), options, {}, remedy) from error
    FUNCTIONS[name](**settings.as_dict())


class CLI(LightningCLI):
    """The commands that have a Trainer, from words as they are typed. `command` is the one that ran."""

    def __init__(self, args: list[str] | None = None) -> None:
        hush()
        keep_freed_memory()
        self.words = config_files_first(sys.argv[1:] if args is None else args)
        self.parsers: dict[str, LightningArgumentParser] = {}
        with ExitStack() as self.opened:
            super().__init__(
                LightningModule,
                LightningDataModule,
                subclass_mode_model=True,
                subclass_mode_data=True,
                auto_configure_optimizers=False,
                save_config_callback=None,  # it refuses to resume into a folder, or lets `test` overwrite fit's config
                seed_everything_default=0,
                trainer_class=CommandTrainer,
                parser_class=Parser,
                args=args,
            )

    # Parsing

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        # weights_only is not for choosing: it is True, see checkpoints.py.
        ours = {"verbose", "weights_only", "return_predictions"}
        lightnings = {"lr_find": {"model", "datamodule"}, **LightningCLI.subcommands()}
        commands = {name: lightnings[name] | ours for name in COMMANDS}
        first = self.words[0] if self.words else ""
        return {first: commands[first]} if first in commands else commands  # a parser takes a tenth of a second

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        self.parsers[list(self.subcommands())[len(self.parsers)]] = parser
        parser.set_defaults(DEFAULTS)
        # Every command has these, so that one config file does for all of them.
        help = "fit: the metric that chooses the best checkpoint; of equal ones the lower val/loss decides."
        parser.add_argument("--monitor", type=str, default="val/acc", help=help)
        help = "fit: whether the best of that metric is its max or its min."
        parser.add_argument("--monitor_mode", type=Literal["max", "min"], default="max", help=help)
        help = "fit, validate, test: draw pictures for TensorBoard and report.png."
        parser.add_argument("--pictures", type=bool, default=True, help=help)
        help = "fit: don't train, but look for a learning rate, as the command lr_find does."
        parser.add_argument("--lr_find", type=bool, default=False, help=help)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parses with the settings of the checkpoint, where one is named, as the defaults: what is typed wins."""
        ahead = look_ahead(self.words)
        saved: Saved | None = None
        saved_settings: dict[str, Any] = {}
        if ahead.ckpt_path:
            model = ahead.model.rpartition(".")[2] if ahead.model else None
            path = find_checkpoint(ahead.ckpt_path, Path(ahead.root), model)
            saved = Saved(path)
            saved_settings = settings_of(saved, ahead.subcommand == "fit", ahead.data)
            trusted = self.trusted(saved, saved_settings, ahead)
            refuse(untrusted(saved, saved_settings.keys() - trusted - ahead.named))
            self.set_defaults(ahead.subcommand, trusted)
        try:
            self.config = parser.parse_args([in_full_names(word) for word in self.words])
        except (ParserError, UnicodeDecodeError) as error:
            message = name_whole_option(str(error), self.words)
            options = options_of(self.parsers.values(), self.words)
            raise explain(message, options, class_choices(), look_up(self.words)) from error
        name = self.config.subcommand
        parsed = (self.config[name], saved, saved_settings, self.parsers[name], self.opened)
        self.command = COMMANDS[name](name, *parsed)

    def trusted(self, saved: Saved, settings: dict[str, Any], ahead: Any) -> dict[str, Any]:
        """Of a checkpoint's settings those that may be taken from it."""
        if ahead.ckpt_path in ("best", "last") or saved.is_of_its_run(resuming=ahead.subcommand == "fit"):
            return settings
        taken, left_out = of_a_stranger(settings, ahead.modules)
        typed = {word.partition("=")[0] for word in self.words}
        if left_out := [name for name in left_out if name not in typed]:
            rank_zero_only(print)(f"Not taken from {saved.path}, for it isn't its run's: {', '.join(left_out)}.")
        return taken

    def set_defaults(self, name: str, settings: dict[str, Any]) -> None:
        try:
            if name in self.parsers:
                self.parsers[name].set_defaults(settings)
        except (ValueError, AttributeError, ImportError, TypeError, KeyError) as error:
            got = " and ".join(str(settings[key]["class_path"]) for key in ("model", "data") if key in settings)
            remedy = "install their package, or the version of it that wrote the checkpoint."
            raise UserError("a checkpoint of classes that exist here, as they were", got, remedy) from error

    def _parse_ckpt_path(self) -> None:
        """Nothing: Lightning's own would let the checkpoint override what was typed, in silence."""

    # Building and running

    def before_instantiate_classes(self) -> None:
        refuse(typed(self.command))
        self.command.settle()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        command = self.command
        given = self.config_init[self.subcommand]["trainer"]
        refuse(built(self.model, self.datamodule, as_list(given["callbacks"]), command))
        command.build(self.model, self.datamodule)
        callbacks = command.callbacks(given)
        self.trainer_defaults = {**self.trainer_defaults, "callbacks": callbacks}
        return super().instantiate_trainer(**kwargs, **command.options(given, callbacks))

    def fit(self, **kwargs: Any) -> None:
        """Whichever command it is: LightningCLI calls the method of the subcommand's name."""
        self.command(self.trainer, **kwargs)

    validate = test = predict = lr_find = fit

    def __deepcopy__(self, memo: Any) -> "CLI":
        """Not copied: WeightAveraging copies the model, whose optimizer's builder refers to this object."""
        return self
