"""What a run says while it goes: a bar on a terminal, one line an epoch elsewhere, and none of the noise."""

import logging
import sys
import warnings

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelSummary, TQDMProgressBar
from torch.nn.parameter import is_lazy

QUIET_WARNINGS = (
    # Lightning's _pytree.py asks torch >= 2.14 in a way that torch deprecates.
    ".*treespec.*is deprecated.*",
    # The data is in memory and a batch is one index operation: there is nothing that a worker could do ahead.
    ".*does not have many workers.*",
    # ResNet18's frozen backbone is in eval mode on purpose, see pretrained.py.
    ".*in eval mode at the start of training.*",
    # `test` of a checkpoint has no use for the callbacks that chose it.
    ".*callbacks used to create the checkpoint need to be provided.*",
    # The digits make few batches an epoch; what is logged at the epoch's end is there all the same.
    ".*is smaller than the logging interval.*",
    # It counts megabytes, and at --trainer.precision bf16-mixed does so in 32 bits.
    ".*is not supported by the model summary.*",
    # --data.val_size 0.
    ".*Total length of `list` across ranks is zero.*",
    # Lightning's all_gather calls what torch 2.15 deprecates.
    ".*all_gather is deprecated.*",
    # --trainer.overfit_batches; Lightning says so of a validation loader that isn't shuffled.
    ".*You requested to overfit but enabled.*",
    # The default device of StochasticWeightAveraging; config.yaml leaves it out.
    r"\s*Unable to serialize instance.*",
    # claim() made the folder; it is empty but for what a resumed run left there.
    ".*Checkpoint directory .* exists and is not empty.*",
)
QUIET_LOGS = (
    "💡 Tip",
    "GPU available: False",
    "TPU available",
    "Trainer already configured with model summary",
    "You are using a CUDA device",  # and could round in matrix products: these networks are too small to gain from it
    "Restoring states",
    "Restored all states",
    "`weights_only` was not set",  # when a checkpoint is saved: all of the state is
    "Loaded model weights",
    "The following callbacks returned in `LightningModule.configure_callbacks`",  # a fit's final test sees them again
)


def hush() -> None:
    """Drops the messages above, each of which says something that isn't so here or isn't news."""
    for message in QUIET_WARNINGS:
        warnings.filterwarnings("ignore", message)
    logging.getLogger("lightning.fabric.utilities.seed").setLevel(logging.WARNING)
    for handler in logging.getLogger("lightning.pytorch").handlers:
        handler.addFilter(is_news)


def is_news(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(QUIET_LOGS)


def progress(wanted: bool | None) -> Callback:
    """The callback that shows progress.

    Args:
        wanted: --trainer.enable_progress_bar; None means where the output is a terminal.
    """
    if wanted is None:
        wanted = sys.stderr.isatty()
    return TQDMProgressBar(refresh_rate=20) if wanted else EpochLines()


class EpochLines(Callback):
    """One line an epoch, for logs and pipes: what was measured in this epoch."""

    def __init__(self) -> None:
        self.validated = False
        self.ended: int | None = None  # the epoch that has no line yet

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.validated = not trainer.sanity_checking

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.ended = trainer.current_epoch  # the model's own hook, which may log this epoch's means, comes after this

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.ended is not None and trainer.is_global_zero:
            shown = [
                f"{name} {float(value):.4f}"
                for name, value in sorted(trainer.callback_metrics.items())
                if not name.startswith("lr-") and not name.endswith("_step") and (self.validated or name[:3] != "val")
            ]
            end = f"/{trainer.max_epochs}" if (trainer.max_epochs or -1) > 0 else ""
            print(f"epoch {self.ended + 1}{end}", *shown, sep="  ", flush=True)
        self.ended, self.validated = None, False

    on_train_end = on_train_epoch_start


class ParameterCount(ModelSummary):
    """Lightning's table, and the two numbers in full: it rounds 5,130 of 11,181,642 to 5.1 K of 11.2 M."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        if trainer.is_global_zero:
            known = [p for p in pl_module.parameters() if not is_lazy(p)]  # of lazy layers
            sizes = [(parameter.numel(), parameter.requires_grad) for parameter in known]
            trainable = sum(size for size, trained in sizes if trained)
            print(f"{trainable:,} trainable of {sum(size for size, _ in sizes):,} parameters", flush=True)
