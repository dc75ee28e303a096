"""FeatureCache: exact or off, named after all that determines the features, whole or computed again."""

import copy
import functools
import io
import os
import re
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import Mock

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Subset, TensorDataset

from mnist_lightning.data import MNISTDataModule
from mnist_lightning.errors import UserError
from mnist_lightning.finetuning import features
from mnist_lightning.finetuning.features import FeatureCache, file_of, keep, read
from mnist_lightning.resnet import ResNet18

TRAIN, VAL, TEST = 40, 5, 360  # images


def digits(**settings: Any) -> MNISTDataModule:
    return MNISTDataModule(source="digits", batch_size=16, train_size=TRAIN, val_size=200, **settings)


@functools.cache  # to draw 11 million weights takes longer than to copy them
def built(**arguments: Any) -> ResNet18:
    torch.manual_seed(0)
    return ResNet18("none", image_size=28, **arguments)


def resnet(**arguments: Any) -> ResNet18:
    return copy.deepcopy(built(**arguments))


class Fit(NamedTuple):
    model: ResNet18
    trainer: Trainer
    passes: list[int]  # how many images went through the backbone, one entry a batch; not the one that shows a shape
    said: str


def fit(
    quiet: Callable, *callbacks: Callback, model: ResNet18 | None = None, data: Any = None, **settings: Any
) -> Fit:
    passes: list[int] = []
    model = model or resnet()
    model.backbone.conv1.register_forward_hook(
        lambda conv1, args, output: passes.extend([len(output)] if len(output) > 1 else [])
    )
    trainer = quiet(**{"max_epochs": 1, "callbacks": [*callbacks, FeatureCache()], **settings})
    with redirect_stdout(io.StringIO()) as said:
        trainer.fit(model, data or digits())
    return Fit(model, trainer, passes, said.getvalue())


def some() -> list[Tensor]:
    """Images and labels."""
    return [part[:TRAIN] for part in digits().load().train]


def files() -> list[Path]:
    """Of kept features."""
    return list(Path(os.environ["XDG_CACHE_HOME"]).rglob("*.features"))


def assert_close(found: ResNet18, expected: ResNet18) -> None:
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], value, atol=1e-5, rtol=1e-4, msg=name)


# ---- Exact


@pytest.mark.parametrize("settings", [{"max_epochs": 3}, {"max_epochs": 2, "precision": "bf16-mixed"}])
def test_fit_and_test_equal_those_without_the_cache_and_a_second_fit_reads_the_features(
    settings: dict[str, Any], quiet: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "PIXELS_A_BATCH", 16 * 28 * 28)
    fits = {}
    for name in ("plain", "first", "second"):
        fits[name] = fit(quiet, model=resnet(cache_features=name != "plain"), **settings)
        fits[name].trainer.test(fits[name].model, digits(), verbose=False)
    expected = {name: pytest.approx(float(value)) for name, value in fits["plain"].trainer.callback_metrics.items()}
    for name in ("first", "second"):
        assert_close(fits[name].model, fits["plain"].model)
        assert {key: float(value) for key, value in fits[name].trainer.callback_metrics.items()} == expected
    assert torch.equal(fits["second"].model.head.weight, fits["first"].model.head.weight)
    assert sum(fits["plain"].passes) == settings["max_epochs"] * (TRAIN + VAL) + TEST
    assert (sum(fits["first"].passes), sum(fits["second"].passes)) == (TRAIN + VAL + TEST, 0)
    size = r"\(0 MB\); delete that folder at any time\."
    assert re.search(rf"^Features kept in \S+/mnist_lightning {size}$", fits["first"].said, re.M)
    assert re.search(rf"^Features of {TRAIN} images read from \S+/mnist_lightning\.$", fits["second"].said, re.M)


class Fails(Callback):
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        images, _ = next(iter(trainer.train_dataloader))
        assert not (isinstance(images, Tensor) and images.dtype == torch.uint8)  # they are features
        raise RuntimeError("stopped by a test")


def test_datamodule_gives_images_again_after_a_fit_and_after_a_failed_one(quiet: Callable) -> None:
    data, model, trainer = digits(), resnet(), quiet(max_epochs=1, callbacks=FeatureCache())
    trainer.fit(model, data)
    (by_loader,) = trainer.test(model, data.test_dataloader(), verbose=False)
    (by_datamodule,) = trainer.test(model, data, verbose=False)
    assert by_loader == pytest.approx(by_datamodule, rel=1e-5)
    with pytest.raises(RuntimeError, match="stopped by a test"):
        quiet(max_epochs=1, callbacks=[FeatureCache(), Fails()]).fit(resnet(), data)
    assert all(isinstance(images, Tensor) for images, _ in [*data.train_dataloader(), *data.val_dataloader()])


# ---- Or off


class FewerTests(MNISTDataModule):
    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.test_set = Subset(self.test_set, range(20))  # type: ignore[assignment]


OFF: dict[str, dict[str, Any]] = {  # the reason, and the model's, the Trainer's and the data's settings
    "--model.cache_features is false": {"model": {"cache_features": False}},
    "no layer is frozen": {"model": {"trainable_layers": 5}},
    "the model is in torch.bfloat16": {"trainer": {"precision": "bf16-true"}},
    "the model is in torch.float64": {"trainer": {"precision": "64-true"}},
    "--data.augment changes the images at each step": {"data": lambda: digits(augment=1)},
    "the images aren't in memory as Images": {"data": lambda: FewerTests(source="digits", train_size=TRAIN)},
    "the images don't come from an ImagesDataModule": {"data": lambda: DataLoader(TensorDataset(*some()), 16)},
    "they would take 0.0 GB": {},
    "there is no home directory to keep them in: set XDG_CACHE_HOME": {},
}


@pytest.mark.filterwarnings("ignore:You defined a .validation_step. but have no")
@pytest.mark.parametrize("reason", OFF)
def test_cache_turns_itself_off_says_why_and_the_fit_goes_on(
    reason: str, quiet: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "GB" in reason:
        monkeypatch.setattr(features, "LARGEST", 4 * 512 * TRAIN - 1)
    if "home" in reason:
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "expanduser", Mock(side_effect=RuntimeError("Could not determine home directory.")))
    given = {"model": {}, "trainer": {}, "data": digits, **OFF[reason]}
    done = fit(quiet, model=resnet(**given["model"]), data=given["data"](), **given["trainer"], max_epochs=2)
    (line,) = (line for line in done.said.splitlines() if "Features" in line)
    assert line.startswith("Features of the frozen layers are not cached: ") and reason in line
    assert sum(done.passes) >= 2 * TRAIN and done.trainer.global_step >= 6
    assert "home" in reason or not files()


# ---- Kept on disk


def test_name_changes_with_all_that_determines_the_features(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = resnet(), torch.zeros(4, 1, 28, 28, dtype=torch.uint8)
    model.load_pretrained()
    names = [file_of(model, images, "32-true"), file_of(model, images, "bf16-mixed")]
    assert file_of(model, images, "32-true") == names[0]
    last_weight, statistic = model.backbone.layer4[1].conv2.weight.data, model.backbone.layer1[0].bn1.running_var
    for value in (last_weight, statistic, images):
        value[(-1,) * value.ndim] += 1
        names.append(file_of(model, images, "32-true"))
    model.image_size = 29
    names.append(file_of(model, images, "32-true"))
    model.train_layers(1)
    names.append(file_of(model, images, "32-true"))
    monkeypatch.setattr(features, "FORMAT", features.FORMAT + 1)
    names.append(file_of(model, images, "32-true"))
    assert len(set(names)) == 8


def test_damaged_file_is_noticed_and_computed_again(quiet: Callable) -> None:
    first = fit(quiet)
    path = max(files(), key=lambda path: path.stat().st_size)  # the training images' features
    whole = path.read_bytes()
    shape = (TRAIN, 512)
    values = read(path, shape)
    assert values is not None and read(path, (TRAIN + 1, 512)) is None and read(path, (TRAIN, 64)) is None
    middle = len(whole) // 2
    damaged = [whole[:-100], b"", whole[:middle] + bytes([whole[middle] ^ 4]) + whole[middle + 1 :]]
    others = {"features": 0 * values, "sha256": torch.load(path)["sha256"]}, {"weights": 1}, values
    for something_else in others:
        torch.save(something_else, path)
        damaged.append(path.read_bytes())
    for content in damaged:
        path.write_bytes(content)
        assert read(path, shape) is None
    second = fit(quiet)
    assert sum(second.passes) == TRAIN
    assert path.read_bytes() == whole
    assert torch.equal(first.model.head.weight, second.model.head.weight)


def test_file_that_fails_to_be_written_costs_only_the_next_fit(
    quiet: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.fsync", Mock(side_effect=OSError(28, "No space left on device")))
    done = fit(quiet)
    assert done.trainer.global_step == 3
    assert "Features are not kept for the next run: [Errno 28] No space left on device." in done.said
    assert not files()


def test_longest_unused_files_go_beyond_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.zeros(1, 250)
    for age, name in enumerate(("oldest", "older", "newest")):
        keep(tmp_path / f"{name}.features", values)
        os.utime(tmp_path / f"{name}.features", (age, age))
    monkeypatch.setattr(features, "SIZE_LIMIT", 2.5 * (tmp_path / "newest.features").stat().st_size)
    keep(tmp_path / "now.features", values)
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["newest", "now"]


# ---- Beside a user's own finetuning


class Unfreezes(BaseFinetuning):
    """Freezes the backbone as Lightning does, and lets go of it at the start of the second epoch."""

    def freeze_before_training(self, pl_module: LightningModule) -> None:
        self.freeze(pl_module.backbone, train_bn=False)

    def finetune_function(self, pl_module: LightningModule, epoch: int, optimizer: Optimizer) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.backbone, optimizer, lr=0.01)


def test_backbone_that_the_user_unfreezes_at_an_epochs_start_really_learns(quiet: Callable) -> None:
    trained = [fit(quiet, Unfreezes(), model=resnet(cache_features=cached), max_epochs=2) for cached in (True, False)]
    assert sum(trained[0].passes) == 2 * (TRAIN + VAL)  # for the cache, then in the second epoch
    assert "Features of the frozen layers are not cached: no layer is frozen." in trained[0].said
    untrained = resnet().backbone.layer4[1].conv2.weight
    assert not torch.equal(trained[0].model.backbone.layer4[1].conv2.weight, untrained)
    assert_close(*(done.model for done in trained))


class UnfreezesInMidEpoch(Callback):
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        pl_module.train_layers(1)


@pytest.mark.parametrize("callbacks", [[UnfreezesInMidEpoch(), FeatureCache()], [FeatureCache(), Unfreezes()]])
def test_layer_that_is_unfrozen_after_the_features_were_chosen_is_refused(
    callbacks: list[Callback], quiet: Callable
) -> None:
    with pytest.raises(UserError, match="expected layers that are unfrozen between epochs\ngot layer [15] of the"):
        fit(quiet, max_epochs=2, callbacks=callbacks)
