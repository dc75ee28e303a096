"""lr_find: looks for a learning rate in a hundred steps of growing ones; nothing is trained.

Smith, Cyclical Learning Rates for Training Neural Networks, https://arxiv.org/abs/1506.01186.
"""

import math
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from mnist_lightning.commands.fit import Training
from mnist_lightning.errors import UserError

SETTLING = 10  # steps until the running mean of the losses means something


class LearningRateFind(Training):
    """As a subcommand, or as `fit --lr_find true`."""

    alone = True

    def settle(self) -> None:
        super().settle()
        self.settings.trainer.max_epochs = -1  # a hundred steps, over as many epochs as that takes

    def __call__(self, trainer: Any, **kwargs: Any) -> None:
        finder = trainer.lr_find(self.model, datamodule=self.data)  # a CommandTrainer
        rate = steepest(finder.results["lr"], finder.results["loss"])
        if rate is None:
            remedy = "try --data.batch_size 16, or --trainer.limit_train_batches 1.0."
            raise UserError("enough steps to see a learning rate", "too few", remedy)
        self.results = {"lr": rate}
        option = "--model.optimizer.lr " if "optimizer" in self.settings.model.get("init_args", {}) else ""
        rank_zero_only(print)(f"A learning rate to try: {option}{rate:.2g}; nothing was trained.")


def steepest(rates: list[float], losses: list[float]) -> float | None:
    """The learning rate at which the loss falls fastest as the rate grows by a factor; None of too few.

    Lightning's own suggestion divides by the rates' differences: where those are smallest, any noise is the steepest.
    """
    fall = [(math.log(rate), loss) for rate, loss in zip(rates, losses, strict=False) if math.isfinite(loss)]
    logs, heights = torch.tensor(fall[SETTLING:-1]).view(-1, 2).T
    if len(logs) < 2:
        return None
    return float(logs[torch.gradient(heights, spacing=[logs])[0].argmin()].exp())
