"""GradualUnfreezing: the head first, then one more layer of the backbone at a time.

Lightning's own BaseFinetuning replaces the optimizer's groups on resuming, and lets BatchNorm use batch statistics in
"frozen" layers.
"""

from jsonargparse.typing import NonNegativeInt
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.nn.parallel import DistributedDataParallel

from mnist_lightning.errors import UserError
from mnist_lightning.pretrained import PretrainedClassifier


class GradualUnfreezing(Callback):
    """Sets how much of a pretrained model is trained in each epoch (Howard and Ruder, arXiv:1801.06146).

    What is trained follows from the epoch alone: a resumed run goes on as the whole one would have.

    Args:
        layers: trainable layers in the first epoch, the second, ...; the last number holds for all later epochs. The
            largest has to be --model.trainable_layers.

    Raises:
        UserError: it isn't, the model isn't a PretrainedClassifier, or several processes aren't told to expect it.
    """

    def __init__(self, layers: list[NonNegativeInt]) -> None:
        self.layers = layers

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not isinstance(pl_module, PretrainedClassifier):
            got = type(pl_module).__name__
            raise UserError("a pretrained model to unfreeze gradually, as ResNet18", got, "leave out one of the two.")
        most = pl_module.trainable_layers
        if not self.layers or max(self.layers) != most:
            got = f"layers: {self.layers}"
            raise UserError(f"GradualUnfreezing up to --model.trainable_layers {most}", got, "make the two agree.")
        # Only here: DDP prepares for those parameters that were trainable when it was set up.
        parallel = trainer.strategy.model
        if isinstance(parallel, DistributedDataParallel) and not parallel.find_unused_parameters:
            remedy = "that strategy waits for no gradients of layers that are still frozen."
            raise UserError("--trainer.strategy ddp_find_unused_parameters_true", "another strategy", remedy)
        self.on_train_epoch_start(trainer, pl_module)  # which a fit that is resumed in mid-epoch doesn't call

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(pl_module, PretrainedClassifier):
            pl_module.train_layers(max(self.layers))

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(pl_module, PretrainedClassifier):
            pl_module.train_layers(self.layers[min(trainer.current_epoch, len(self.layers) - 1)])
