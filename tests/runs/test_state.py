"""RunState: what else a checkpoint holds, and that it is worth keeping."""

import os
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from mnist_lightning.convnet import ConvNet
from mnist_lightning.data import MNISTDataModule
from mnist_lightning.errors import UserError
from mnist_lightning.runs.checkpoints import LastCheckpoint
from mnist_lightning.runs.state import RunState, generators, set_generators


@pytest.mark.parametrize(("poison", "got"), [("conv1", "a training loss of nan at step 1"), ("unused", "weights that")])
def test_numbers_that_are_not_finite_end_the_fit_before_a_checkpoint(
    poison: str, got: str, tmp_path: Path, quiet: Callable
) -> None:
    model = ConvNet()
    model.unused = torch.nn.Linear(2, 2)
    torch.nn.init.constant_(model.get_submodule(poison).weight, float("nan"))
    callbacks = [RunState({}), LastCheckpoint(tmp_path / "last.ckpt")]
    run = quiet(max_epochs=1, limit_val_batches=0, callbacks=callbacks, enable_checkpointing=True)
    with pytest.raises(UserError, match=rf"finite numbers in training\ngot {got}(.|\n)*smaller --model.optimizer.lr"):
        run.fit(model, MNISTDataModule(source="digits"))
    assert os.listdir(tmp_path) == []


def test_generators_go_on_where_they_were(tmp_path: Path) -> None:
    def draw() -> list[float]:
        return [random.gauss(0, 1), float(np.random.randn()), float(torch.randn(()))]

    draw()
    torch.save(generators(), tmp_path / "states")
    expected = draw() + draw()
    set_generators(torch.load(tmp_path / "states", weights_only=True))
    assert draw() + draw() == expected
