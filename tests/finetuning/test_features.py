"""FeatureCache: exact or off, named after all that determines the features, whole or computed again."""

import copy
import functools
import io
import os
import re
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

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
from mnist_lightning.finetuning.features import FeatureCache, cache_folder, extract, file_of, keep, read
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


def fit(quiet: Callable, *callbacks: Callback, model: ResNet18 | None = None, **settings: Any) -> Fit:
    passes: list[int] = []
    model = model or resnet()
    model.backbone.conv1.register_forward_hook(
        lambda conv1, args, output: passes.extend([len(output)] if len(output) > 1 else [])
    )
    trainer = quiet(**{"max_epochs": 1, "callbacks": [*callbacks, FeatureCache()], **settings})
    with redirect_stdout(io.StringIO()) as said:
        trainer.fit(model, digits())
    return Fit(model, trainer, passes, said.getvalue())


def files() -> list[Path]:
    folder = cache_folder()
    return sorted(folder.glob("*.features")) if folder else []


def assert_close(found: ResNet18, expected: ResNet18) -> None:
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], value, atol=1e-5, rtol=1e-4, msg=name)


# ---- Exact


@pytest.fixture(scope="module")
def fits(quiet: Callable, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Fit]]:
    """Three epochs and a test: without the cache, with it, and with what that has kept."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        fits = {}
        for name in ("plain", "first", "second"):
            fits[name] = fit(quiet, model=resnet(cache_features=name != "plain"), max_epochs=3)
            fits[name].trainer.test(fits[name].model, digits(), verbose=False)
    yield fits


def test_head_equals_the_one_trained_without_the_cache(fits: dict[str, Fit]) -> None:
    assert_close(fits["first"].model, fits["plain"].model)
    assert torch.equal(fits["second"].model.head.weight, fits["first"].model.head.weight)


def test_metrics_equal_those_without_the_cache(fits: dict[str, Fit]) -> None:
    expected = {name: pytest.approx(float(value)) for name, value in fits["plain"].trainer.callback_metrics.items()}
    for name in ("first", "second"):
        assert {key: float(value) for key, value in fits[name].trainer.callback_metrics.items()} == expected


def test_first_fit_passes_each_image_once_a_second_none_and_both_say_where_from(fits: dict[str, Fit]) -> None:
    assert sum(fits["plain"].passes) == 3 * (TRAIN + VAL) + TEST
    assert sum(fits["first"].passes) == TRAIN + VAL + TEST
    assert sum(fits["second"].passes) == 0
    size = r"\(0 MB\); delete that folder at any time\."
    assert re.search(rf"^Features kept in \S+/mnist_lightning {size}$", fits["first"].said, re.M)
    assert re.search(rf"^Features of {TRAIN} images read from \S+/mnist_lightning\.$", fits["second"].said, re.M)


def test_mixed_precision_is_exact_too(quiet: Callable) -> None:
    cached = fit(quiet, precision="bf16-mixed", max_epochs=2)
    plain = fit(quiet, model=resnet(cache_features=False), precision="bf16-mixed", max_epochs=2)
    assert sum(cached.passes) == TRAIN + VAL
    assert_close(cached.model, plain.model)


@pytest.mark.parametrize("trainable_layers", [0, 2])
def test_extract_equals_the_frozen_layers_image_by_image(trainable_layers: int) -> None:
    model = resnet(trainable_layers=trainable_layers)
    model.load_pretrained()
    model.image_size = 64
    before = copy.deepcopy(model.state_dict())
    images = torch.randint(256, (260, 1, 28, 28), dtype=torch.uint8)  # more than one batch
    found = extract(model, images)
    for number in (0, 100, 259):
        expected = model.prepare(images[number : number + 1])
        for layer in model.layers[: model.frozen]:
            expected = layer(expected)
        torch.testing.assert_close(found[number : number + 1], expected.detach(), atol=1e-5, rtol=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_datamodule_gives_images_again_after_a_fit_and_after_a_failed_one(quiet: Callable) -> None:
    class Fails(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            assert trainer.train_dataloader.dataset.stand_in is not None
            raise RuntimeError("stopped by a test")

    data = digits()
    quiet(max_epochs=1, callbacks=FeatureCache()).fit(resnet(), data)
    assert all(isinstance(images, Tensor) for images, _ in [*data.train_dataloader(), *data.val_dataloader()])
    with pytest.raises(RuntimeError, match="stopped by a test"):
        quiet(max_epochs=1, callbacks=[FeatureCache(), Fails()]).fit(resnet(), data)
    assert all(isinstance(images, Tensor) for images, _ in [*data.train_dataloader(), *data.val_dataloader()])


def test_trainer_tests_a_dataloader_after_a_fit_on_features(quiet: Callable) -> None:
    done = fit(quiet)
    data = digits()
    data.setup("test")
    (by_loader,) = done.trainer.test(done.model, data.test_dataloader(), verbose=False)
    (by_datamodule,) = done.trainer.test(done.model, data, verbose=False)
    assert by_loader == pytest.approx(by_datamodule, rel=1e-5)


# ---- Or off


OFF = {
    "--model.cache_features is false": ({"cache_features": False}, {}),
    "no layer is frozen": ({"trainable_layers": 5}, {}),
    "the model is in torch.bfloat16": ({}, {"precision": "bf16-true"}),
    "the model is in torch.float64": ({}, {"precision": "64-true"}),
}


@pytest.mark.parametrize("reason", OFF)
def test_cache_turns_itself_off_says_why_and_the_fit_goes_on(reason: str, quiet: Callable) -> None:
    arguments, settings = OFF[reason]
    done = fit(quiet, model=resnet(**arguments), **settings, max_epochs=2)
    (line,) = (line for line in done.said.splitlines() if "Features" in line)
    assert line.startswith("Features of the frozen layers are not cached: ") and reason in line
    assert sum(done.passes) == 2 * (TRAIN + VAL)
    assert done.trainer.global_step == 6
    assert not files()


class FewerTests(MNISTDataModule):
    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.test_set = Subset(self.test_set, range(20))  # type: ignore[assignment]


def test_cache_is_off_for_augmented_images_for_other_data_and_for_more_than_fits_into_memory(
    quiet: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loader = DataLoader(TensorDataset(torch.zeros(2, 1, 28, 28, dtype=torch.uint8), torch.arange(2)))
    for data in ((digits(augment=1),), (loader, loader), (FewerTests(source="digits"),)):
        quiet(max_epochs=1, limit_train_batches=1, callbacks=[FeatureCache()]).fit(resnet(), *data)
    monkeypatch.setattr(features, "LARGEST", 4 * 512 * TRAIN - 1)
    out = capsys.readouterr().out + fit(quiet).said
    assert "not cached: --data.augment changes the images at each step" in out
    assert "not cached: the images don't come from MNISTDataModule" in out
    assert "not cached: the images aren't in memory as Images" in out
    assert "not cached: they would take 0.0 GB" in out
    assert not files()


# ---- Kept on disk


def test_name_changes_with_all_that_determines_the_features(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = resnet(), torch.zeros(4, 1, 28, 28, dtype=torch.uint8)
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
    assert read(path, TRAIN) is not None and read(path, TRAIN + 1) is None
    torch.save({"weights": 1}, path)
    something_else, middle = path.read_bytes(), len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 4]) + whole[middle + 1 :]
    for damaged in (whole[:-100], b"", something_else, flipped):
        path.write_bytes(damaged)
        assert read(path, TRAIN) is None
    second = fit(quiet)
    assert sum(second.passes) == TRAIN
    assert path.read_bytes() == whole
    assert torch.equal(first.model.head.weight, second.model.head.weight)


def test_file_that_fails_to_be_written_costs_only_the_next_fit(
    quiet: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mnist_lightning.files.os.fsync", full)
    done = fit(quiet)
    assert done.trainer.global_step == 3
    assert "Features are not kept for the next run: [Errno 28] No space left on device." in done.said
    assert not list(cache_folder().iterdir())


def test_user_without_a_home_directory_trains_and_is_told(quiet: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home(self: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "expanduser", no_home)
    done = fit(quiet, max_epochs=2)
    assert sum(done.passes) == TRAIN + VAL
    assert "not kept for the next run: there is no home directory; set XDG_CACHE_HOME." in done.said


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
