"""Another pretrained network, by the listing of docs/make-it-yours.md: all that ResNet18 can, MobileNetV3 can."""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import mobilenet_v3_small

from mnist_lightning.data import MNISTDataModule
from mnist_lightning.finetuning.features import FeatureCache
from mnist_lightning.finetuning.unfreezing import GradualUnfreezing
from mnist_lightning.pretrained import PretrainedClassifier
from mnist_lightning.sources import Digits, Split

PAGE = Path(__file__).parents[2] / "docs" / "make-it-yours.md"


@pytest.fixture(scope="module")
def mobilenet() -> type[PretrainedClassifier]:
    (listing,) = re.findall(r"^```python\n([^`]*class MobileNet[^`]*)^```$", PAGE.read_text(), flags=re.M)
    assert len(listing.strip().splitlines()) <= 25
    names: dict[str, Any] = {"nn": nn, "Tensor": Tensor, "__name__": __name__}
    exec(listing, names)
    return names["MobileNet"]


@pytest.fixture
def build(mobilenet: type[PretrainedClassifier]) -> Callable[..., PretrainedClassifier]:
    def build(**arguments: Any) -> PretrainedClassifier:
        torch.manual_seed(0)
        return mobilenet(**{"weights": "none", "image_size": 32, "num_classes": 3, **arguments})

    return build


class Colours(MNISTDataModule):
    """24 + 8 colour pictures of 40×30 in three classes, the brightest channel."""

    def __init__(self) -> None:
        super().__init__(batch_size=8, val_size=8)

    def load(self) -> Digits:
        labels = torch.arange(32) % 3
        images = torch.randint(100, (32, 3, 40, 30), generator=torch.Generator().manual_seed(0))
        images[range(32), labels] += 150
        return Digits(*[Split(images.to(torch.uint8), labels)] * 2)


def changed(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    names = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    return {".".join(name.split(".")[:3]) if "features" in name else name.split(".")[0] for name in names}


@pytest.mark.parametrize("trainable", [0, 1, 3])
def test_frozen_layers_and_their_statistics_stay_and_the_others_learn(
    trainable: int, build: Callable, quiet: Callable
) -> None:
    model = build(trainable_layers=trainable)
    before = copy.deepcopy(model.state_dict())
    trainer = quiet(max_epochs=1)
    trainer.fit(model, Colours())
    blocks = range({0: 13, 1: 9, 3: 0}[trainable], 13)
    assert changed(model, before) == {"head", *(f"backbone.features.{block}" for block in blocks)}
    rates = [group["lr"] for group in trainer.optimizers[0].param_groups]
    assert rates == [0.001] + [0.0001] * (trainable > 0)


@pytest.mark.parametrize("callbacks", [[], [GradualUnfreezing([0, 1])]], ids=["frozen", "unfrozen gradually"])
def test_training_on_cached_and_standardised_features_gives_the_same_model(
    callbacks: list[Any], build: Callable, quiet: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = {"normalize_features": True, "trainable_layers": len(callbacks), "backbone_lr_factor": 0.5}
    models, results = [], []
    for cached in (True, False):
        models.append(build(**arguments, cache_features=cached))
        trainer = quiet(max_epochs=2, callbacks=[*callbacks, FeatureCache()])
        trainer.fit(models[-1], Colours())
        results += trainer.test(models[-1], Colours(), verbose=False)
    assert results[0] == pytest.approx(results[1], rel=1e-4)
    assert "Features kept in" in capsys.readouterr().out
    for name, value in models[0].state_dict().items():
        torch.testing.assert_close(value, models[1].state_dict()[name], atol=1e-4, rtol=1e-3, msg=name)


def test_weights_come_from_torchvisions_file_and_from_a_checkpoint(
    build: Callable, quiet: Callable, folder: Path
) -> None:
    torch.save(mobilenet_v3_small().state_dict(), "weights.pth")
    model = build(weights="weights.pth", image_size=None)
    trainer = quiet(max_epochs=1, limit_train_batches=1)
    trainer.fit(model, Colours())
    trainer.save_checkpoint("own.ckpt")
    other = build(weights="own.ckpt", num_classes=5)
    other.load_pretrained()
    assert all(map(torch.equal, other.backbone.state_dict().values(), model.backbone.state_dict().values()))
    again = type(model).load_from_checkpoint("own.ckpt", weights_only=True).eval()
    images = Colours().load().test.images
    with torch.no_grad():
        assert torch.equal(again(images), model.eval()(images))
        assert model.prepare(images).shape == (32, 3, 40, 30)
