"""GradualUnfreezing: what is trained in which epoch. That a killed run goes on exactly is in test_reliability.py."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from mnist_lightning.convnet import ConvNet
from mnist_lightning.data import MNISTDataModule
from mnist_lightning.errors import UserError
from mnist_lightning.finetuning.features import FeatureCache
from mnist_lightning.finetuning.unfreezing import GradualUnfreezing
from mnist_lightning.resnet import ResNet18

PARTS = ("backbone.layer2.", "backbone.layer3.", "backbone.layer4.", "head.")


class Changes(Callback):
    """Which parts of the model an epoch changed, parameters and BatchNorm's statistics."""

    def __init__(self) -> None:
        self.epochs: list[set[str]] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.before = {name: value.clone() for name, value in pl_module.state_dict().items()}

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        after = pl_module.state_dict()
        changed = [name for name, value in self.before.items() if not torch.equal(value, after[name])]
        self.epochs.append({part for part in PARTS if any(name.startswith(part) for name in changed)})


def resnet() -> ResNet18:
    torch.manual_seed(0)
    return ResNet18("none", image_size=28, trainable_layers=2)


def fit(quiet: Callable, model: LightningModule, *callbacks: Callback, epochs: int = 4, **settings: Any) -> Any:
    trainer = quiet(max_epochs=epochs, limit_train_batches=2, callbacks=list(callbacks), **settings)
    trainer.fit(model, MNISTDataModule(source="digits", batch_size=8, train_size=24, val_size=200))
    return trainer


def test_each_epoch_trains_what_the_schedule_says_with_and_without_kept_features(quiet: Callable) -> None:
    states = []
    for cache in ([FeatureCache()], []):
        model, changes = resnet(), Changes()
        fit(quiet, model, changes, GradualUnfreezing([0, 1, 2]), *cache)
        head, layer4, layer3 = {"head."}, {"head.", "backbone.layer4."}, set(PARTS[1:])
        assert changes.epochs == [head, layer4, layer3, layer3]
        states.append(model.state_dict())
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], atol=1e-4, rtol=1e-3, msg=name)


def test_layers_that_were_still_frozen_at_the_end_are_trained_in_the_next_fit(quiet: Callable) -> None:
    model, changes = resnet(), Changes()
    fit(quiet, model, GradualUnfreezing([0, 2]), epochs=1)
    fit(quiet, model, changes, epochs=1)
    assert changes.epochs == [set(PARTS[1:])]


@pytest.mark.parametrize("layers", [[], [0, 1], [0, 3]])
def test_schedule_that_ends_elsewhere_than_trainable_layers_is_refused(layers: list[int], quiet: Callable) -> None:
    with pytest.raises(UserError, match=r"up to --model.trainable_layers 2\ngot layers: \["):
        fit(quiet, resnet(), GradualUnfreezing(layers))


def test_convnet_is_refused(quiet: Callable) -> None:
    with pytest.raises(UserError, match="expected a pretrained model to unfreeze gradually, as ResNet18\ngot ConvNet"):
        fit(quiet, ConvNet(), GradualUnfreezing([0]))


def test_processes_that_would_wait_for_gradients_are_refused(quiet: Callable) -> None:
    with pytest.raises(UserError, match="expected --trainer.strategy ddp_find_unused_parameters_true\n"):
        fit(quiet, resnet(), GradualUnfreezing([0, 2]), strategy="ddp", devices=1)
