"""GradualUnfreezing: what is trained in which epoch. That a killed run goes on exactly is in test_reliability.py."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from mnist_lightning import ConvNet
from mnist_lightning.data import MNISTDataModule
from mnist_lightning.errors import UserError
from mnist_lightning.resnet import ResNet18
from mnist_lightning.finetuning.unfreezing import GradualUnfreezing

PARTS = ("backbone.layer2.", "backbone.layer3.", "backbone.layer4.", "head.")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


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


def fit(model: LightningModule, *callbacks: Callback, epochs: int = 4) -> Any:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        limit_train_batches=2,
        callbacks=list(callbacks),
        **quiet,  # type: ignore
    )
    trainer.fit(model, MNISTDataModule(source="digits", batch_size=8, val_size=2000))
    return trainer


@pytest.mark.parametrize("cached", [True, False])
def test_each_epoch_trains_what_the_schedule_says(cached: bool) -> None:
    torch.manual_seed(0)
    model, changes = ResNet18(weights="none", image_size=28, trainable_layers=2, cache_features=cached), Changes()
    fit(model, changes, GradualUnfreezing([0, 1, 2]))
    head, layer4, layer3 = {"head."}, {"head.", "backbone.layer4."}, set(PARTS[1:])
    assert changes.epochs == [head, layer4, layer3, layer3]


def test_kept_features_give_the_model_trained_without_them() -> None:
    trained = []
    for cached in (True, False):
        torch.manual_seed(0)
        model = ResNet18(weights="none", image_size=28, trainable_layers=2, cache_features=cached)
        fit(model, GradualUnfreezing([0, 2]), epochs=2)
        trained.append(model.state_dict())
    for name, value in trained[0].items():
        torch.testing.assert_close(value, trained[1][name], atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("layers", [[], [0, 1], [0, 3]])
def test_schedule_that_ends_elsewhere_than_trainable_layers_is_refused(layers: list[int]) -> None:
    model = ResNet18(weights="none", image_size=28, trainable_layers=2)
    with pytest.raises(UserError, match=r"up to --model.trainable_layers 2\ngot layers: \["):
        fit(model, GradualUnfreezing(layers))


def test_convnet_is_refused() -> None:
    with pytest.raises(UserError, match="expected ResNet18 for GradualUnfreezing\ngot ConvNet"):
        fit(ConvNet(), GradualUnfreezing([0]))
