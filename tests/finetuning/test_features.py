"""The feature cache: exact or off, keyed by what determines the features, whole or made again."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from mnist_lightning import features
from mnist_lightning.data import MNISTDataModule
from mnist_lightning.finetuning.features import cache_folder, extract
from mnist_lightning.resnet import ResNet18
from mnist_lightning.sources import Digits, Split


class FewDigits(MNISTDataModule):
    """The first 96 training and 32 test images of scikit-learn's digits."""

    def __init__(self) -> None:
        super().__init__(source="digits", batch_size=16, val_size=15000)

    def _load(self) -> Digits:
        whole = super()._load()
        return Digits(*(Split(part.images[:n], part.labels[:n]) for part, n in zip(whole, (96, 32), strict=True)))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images went through the backbone, one entry a batch; not the one that shows a shape."""
    counts: list[int] = []
    original = ResNet18.prepare

    def counted(self: ResNet18, images: torch.Tensor) -> torch.Tensor:
        counts.extend([len(images)] if len(images) > 1 else [])
        return original(self, images)

    monkeypatch.setattr(ResNet18, "prepare", counted)
    return counts


def fitted(epochs: int = 2, test: bool = False, **arguments: Any) -> ResNet18:
    torch.manual_seed(0)
    model = ResNet18(weights="none", image_size=28, **arguments)
    data = FewDigits()
    trainer = Trainer(
        max_epochs=epochs,
        num_sanity_val_steps=0,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, data)
    if test:
        trainer.test(model, data, verbose=False)
        model.test_accuracy = float(trainer.callback_metrics["test/acc"])  # type: ignore[assignment]
    assert data.features is None  # another model that uses this datamodule must see images
    return model


def files() -> list[Path]:
    return sorted(cache_folder().glob("*.features"))


def test_head_equals_the_one_trained_without_cache(passes: list[int]) -> None:
    kept, plain = fitted(), fitted(cache_features=False)
    assert (kept.head.weight - plain.head.weight).abs().max() < 1e-5
    assert (kept.head.bias - plain.head.bias).abs().max() < 1e-5


def test_first_fit_passes_each_image_once_and_a_second_none(passes: list[int]) -> None:
    first = fitted(epochs=3, test=True)
    assert sum(passes) == 96 + 32  # training and validation images, then the test's
    second = fitted(epochs=3, test=True)
    assert sum(passes) == 96 + 32
    assert torch.equal(first.head.weight, second.head.weight)
    assert first.test_accuracy == second.test_accuracy


def test_final_test_on_features_gives_the_accuracy_on_images() -> None:
    assert fitted(test=True).test_accuracy == fitted(test=True, cache_features=False).test_accuracy


def test_turned_off_by_hand_keeps_nothing_and_says_so(passes: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    fitted(epochs=2, cache_features=False)
    assert "--model.cache_features is false" in capsys.readouterr().out
    assert sum(passes) == 2 * 96 and not files()


def test_unfrozen_layer_turns_it_off_and_says_so(passes: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model = ResNet18(weights="none", image_size=28)
    model.backbone.layer4.requires_grad_(True)
    silent = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    Trainer(max_epochs=1, accelerator="cpu", enable_model_summary=False, **silent).fit(model, FewDigits())
    assert "some of them are trained" in capsys.readouterr().out
    assert not files()


def test_place_and_size_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    fitted()
    out = capsys.readouterr().out
    assert f"Features kept in {cache_folder()}" in out and "delete that folder at any time" in out


@pytest.mark.parametrize("changed", ["weight", "statistic", "pixel", "image size", "precision", "layout"])
def test_name_changes_with_all_that_determines_the_features(changed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = ResNet18(weights="none", image_size=28)
    images = torch.randint(256, (4, 1, 28, 28), dtype=torch.uint8)
    before, precision = features._name(model, images, "32-true"), "32-true"
    assert features._name(model, images, precision) == before
    if changed == "weight":
        model.backbone.layer3[0].conv1.weight.data[0, 0, 0, 0] += 1e-3
    elif changed == "statistic":
        model.backbone.layer1[0].bn1.running_var[0] += 1e-3
    elif changed == "pixel":
        images[3, 0, 27, 27] ^= 1
    elif changed == "image size":
        model.image_size = 29
    elif changed == "precision":
        precision = "bf16-mixed"
    else:
        monkeypatch.setattr(features, "LAYOUT", features.LAYOUT + 1)
    assert features._name(model, images, precision) != before


@pytest.mark.parametrize("damage", ["truncated", "empty", "a bit flipped", "of another size"])
def test_damaged_file_is_noticed_and_made_again(damage: str, passes: list[int]) -> None:
    first = fitted()
    (path,) = files()
    whole = path.read_bytes()
    content = bytearray(whole)
    if damage == "a bit flipped":
        content[len(content) // 2] ^= 4
    path.write_bytes({"truncated": whole[:-100], "empty": b"", "of another size": whole + b"x"}.get(damage, content))
    second = fitted()
    assert sum(passes) == 2 * 96
    assert path.read_bytes() == whole
    assert torch.equal(first.head.weight, second.head.weight)


def test_file_that_fails_to_be_written_costs_only_the_next_fit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mnist_lightning.files.os.fsync", full)
    fitted()
    assert "Features are not kept for the next run" in capsys.readouterr().out
    assert not list(cache_folder().iterdir())


def test_longest_unused_files_go_beyond_the_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "SIZE_BOUND", 2500)
    kept = torch.zeros(1, 250)  # 1,000 bytes and a digest
    for age, name in enumerate(("oldest", "older", "newest")):
        features.write(tmp_path / f"{name}.features", kept)

        os.utime(tmp_path / f"{name}.features", (age, age))
    features.write(tmp_path / "now.features", kept)
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["newest", "now"]


@pytest.mark.parametrize("trainable_layers", [0, 2])
@pytest.mark.parametrize("onednn", [True, False])
def test_extract_equals_the_frozen_layers_batch_by_batch(
    onednn: bool, trainable_layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: onednn)
    torch.manual_seed(0)
    model = ResNet18(weights="none", image_size=64, trainable_layers=trainable_layers)
    model.load_pretrained()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = torch.randint(256, (37, 1, 28, 28), dtype=torch.uint8)
    with torch.no_grad():
        plain = torch.cat([model.frozen_features(image[None]) for image in images])
    torch.testing.assert_close(extract(model, images), plain, atol=1e-5, rtol=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())  # folding is in a copy
