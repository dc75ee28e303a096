"""Pictures: what a run of the command line shows; a plain Trainer with other people's data, models and loggers."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from google.protobuf import text_format
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from running import command, events, last, rows
from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset

from mnist_lightning.convnet import ConvNet
from mnist_lightning.data import MNISTDataModule
from mnist_lightning.finetuning.features import FeatureCache
from mnist_lightning.pictures.callback import Pictures
from mnist_lightning.pictures.figures import thumbnails
from mnist_lightning.resnet import ResNet18

LETTERS = [chr(ord("a") + label) for label in range(26)]
ANSWERS = {"confusion matrix", "precision and recall", "mistakes"}


class Letters(LightningDataModule):
    """60 images of 26 classes, as ToTensor and Normalize give them: floats (3, 40, 40)."""

    class_names = LETTERS

    def __init__(self, size: tuple[int, ...] = (3, 40, 40)) -> None:
        super().__init__()
        images = torch.randn(60, *size, generator=torch.Generator().manual_seed(0))
        self.data = TensorDataset(images, torch.arange(60) % 26)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.data, batch_size=8)

    val_dataloader = test_dataloader = train_dataloader


class Plain(LightningModule):
    """Somebody's own model."""

    def __init__(self, layers: nn.Module | None = None) -> None:
        super().__init__()
        self.layers = layers or nn.Sequential(nn.Conv2d(3, 4, 5, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(324, 26))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)

    def training_step(self, batch: Any) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        return self(batch[0])

    test_step = validation_step

    def configure_optimizers(self) -> SGD:
        return SGD(self.parameters(), lr=0.01)


@pytest.fixture
def trainer(quiet: Callable, tmp_path: Path) -> Callable[..., Trainer]:
    """Makes a Trainer with these callbacks that logs into the test's folder."""

    def make(*callbacks: Any, **settings: Any) -> Trainer:
        loggers = [CSVLogger(tmp_path / "csv"), TensorBoardLogger(tmp_path, name="", version="run")]
        return quiet(**{"callbacks": list(callbacks), "logger": loggers, "max_epochs": 1, **settings})

    return make


def tags(folder: Path) -> set[str]:
    """What TensorBoard would show under pictures/."""
    return {tag.removeprefix("pictures/") for tag in events(folder / "run").Tags()["images"]}


# ---- Runs of the command line


MAPS = {"convnet": ["0 conv1", "1 conv2"], "resnet": ["0 stem", "1 layer1", "2 layer2", "3 layer3", "4 layer4"]}
SCALARS = ("train/loss", "train/acc", "val/loss", "val/acc", "test/loss", "test/acc", "lr-SGD")


@pytest.mark.parametrize(("name", "epochs"), [("convnet", 2), ("resnet", 5)])
def test_run_shows_every_tag_and_report_and_metrics_to_people_without_tensorboard(
    name: str, epochs: int, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(name)
    board = events(folder)
    drawn = ["first batch", "conv1", *(f"feature maps/{layer}" for layer in MAPS[name])]
    wanted = [f"pictures/{tag}" for tag in (*drawn, *(f"{part}/{tag}" for part in ("val", "test") for tag in ANSWERS))]
    assert sorted(board.Tags()["images"]) == sorted(wanted)
    for tag in wanted:
        assert Image.open(io.BytesIO(board.Images(tag)[-1].encoded_image_string)).width >= 400
    assert set(SCALARS) <= set(board.Tags()["scalars"]) and board.Tags()["graph"]
    config = text_format.Parse((folder / "projector_config.pbtxt").read_text(), ProjectorConfig())
    (embedding,) = config.embeddings
    assert list(embedding.sprite.single_image_dim) == [28, 28]
    for path in (embedding.tensor_path, embedding.metadata_path):
        assert len((folder / path).read_text().splitlines()) == 360  # of the digits' test images; of MNIST's 1,000
    assert (folder / embedding.sprite.image_path).is_file()
    with Image.open(folder / "report.png") as picture:
        assert picture.width > 800 and np.asarray(picture).std() > 10
    written = rows(folder / "metrics.csv")
    steps = [int(row["step"]) for row in written]
    assert steps == sorted(set(steps))
    assert all(any(row[scalar] for row in written) for scalar in SCALARS)
    assert sum(bool(row["val/acc"]) for row in written) == epochs  # once an epoch


def test_test_of_a_checkpoint_draws_into_its_run(convnet: Path) -> None:
    before = len(events(convnet).Images("pictures/test/mistakes"))
    command("test", "--ckpt_path", "last")
    assert len(events(convnet).Images("pictures/test/mistakes")) == before + 1


def test_pictures_change_nothing_in_the_training_and_other_loggers_get_none(folder: Path) -> None:
    model = "--model ResNet18 --model.weights none --model.image_size 28 --model.trainable_layers 1"
    few = "--data.source digits --trainer.max_epochs 1 --trainer.limit_train_batches 3 --trainer.limit_test_batches 1"
    other = "--trainer.logger CSVLogger --trainer.logger.save_dir other --trainer.default_root_dir other"
    command("fit", *model.split(), *few.split())
    command("fit", *model.split(), *few.split(), *other.split())
    run = Path("lightning_logs", "ResNet18-digits", "version_0")
    with_pictures, without = (last(root / run)["state_dict"] for root in (Path(), Path("other")))
    assert all(torch.equal(value, without[name]) for name, value in with_pictures.items())
    assert not [*Path("other").rglob("report.png"), *Path("other").rglob("events*")]


# ---- A plain Trainer


def test_letters_are_drawn_by_name_into_the_tensorboard_logger_of_a_list(
    trainer: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures, data, model = Pictures(), Letters(), Plain()
    runner = trainer(pictures)
    runner.fit(model, data)
    runner.test(model, data, verbose=False)
    wanted = {f"{part}/{name}" for part in ("val", "test") for name in ANSWERS}
    assert tags(tmp_path) == wanted | {"first batch", "conv1", "feature maps/0 layers.0"}
    assert pictures.answers["test"].names == LETTERS
    with torch.no_grad():
        right = int((model(data.data.tensors[0]).argmax(1) == data.data.tensors[1]).sum())
    assert pictures.answers["test"].counts.diagonal().sum() == right
    assert len(pictures.answers["test"].mistakes) == 25
    metadata = next(tmp_path.rglob("metadata.tsv")).read_text().split()
    assert metadata == [LETTERS[label % 26] for label in range(60)]
    with Image.open(next(tmp_path.rglob("sprite.png"))) as sprite:
        assert sprite.size == (8 * 40, 8 * 40)  # 60 images in a square
    assert capsys.readouterr().out == ""


def test_what_is_left_out_is_said_once(
    trainer: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Silent(Plain):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.log("test/loss", F.cross_entropy(self(batch[0]), batch[1]))

    pictures, data, model = Pictures(), Letters(size=(7,)), Silent(nn.Linear(7, 26))
    runner = trainer(pictures, max_epochs=2)
    runner.fit(model, data)
    runner.test(model, data, verbose=False)
    assert capsys.readouterr().out.splitlines() == [
        "Pictures: no conv1: the model has no Conv2d",
        "Pictures: no first batch: the batches hold no images of one or three channels",
        "Pictures: no mistakes: the batches hold no images of one or three channels",
        "Pictures: no confusion matrix: test_step returns no logits",
    ]
    assert tags(tmp_path) == {"val/confusion matrix", "val/precision and recall"}
    assert set(pictures.answers) == {"val"}


@pytest.mark.parametrize(("outputs", "labels", "reason"), [
    (torch.zeros(60, 1), torch.rand(60, 1), "the batches hold no class numbers"),
    ({"loss": torch.zeros(())}, torch.arange(60), "test_step returns no logits"),
    (torch.zeros(60, 3), torch.arange(60), "there are labels beyond the 3 classes of test_step"),
    (torch.zeros(60, 3), None, "the batches hold no class numbers"),
])  # fmt: skip
def test_step_that_answers_something_else_is_no_failure(
    outputs: Any, labels: Tensor | None, reason: str, trainer: Callable, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    class Other(Plain):
        def test_step(self, batch: Any, batch_idx: int) -> Any:
            return outputs

    tensors = [torch.rand(60, 3, 40, 40), *([] if labels is None else [labels])]
    pictures = Pictures()
    trainer(pictures).test(Other(), DataLoader(TensorDataset(*tensors), batch_size=60), verbose=False)
    assert capsys.readouterr().out == f"Pictures: no confusion matrix: {reason}\n"
    assert not pictures.answers and tags(tmp_path) == set()


def test_exception_while_drawing_ends_no_run(
    trainer: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Broken(ConvNet):
        def forward(self, images: Tensor) -> Tensor:
            if len(images) == 1:
                raise RuntimeError("my network\nis broken")
            return super().forward(images)

    pictures, data, model = Pictures(), MNISTDataModule(source="digits"), Broken()
    runner = trainer(pictures, limit_train_batches=2)
    runner.fit(model, data)
    assert runner.global_step == 2
    said = capsys.readouterr().out.splitlines()
    assert said == ["Pictures: no feature maps: my network", "Pictures: no graph: my network"]
    assert {"first batch", "conv1", "val/mistakes"} < tags(tmp_path)
    (tmp_path / "file").touch()
    assert not pictures.report(tmp_path / "file" / "report.png", [])
    assert "Pictures: no report.png: " in capsys.readouterr().out


def test_second_test_takes_the_place_of_the_first_in_silence(
    trainer: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, model = Letters(), Plain()
    trainer(Pictures(step=7)).test(model, data, verbose=False)
    data.data.tensors[1].fill_(3)
    for _ in range(2):
        trainer(Pictures(step=7)).test(model, data, verbose=False)
    assert capsys.readouterr().out == ""
    (metadata,) = tmp_path.rglob("metadata.tsv")
    assert set(metadata.read_text().split()) == {"d"}
    assert metadata.parts[-3] == "00007"


def test_model_is_left_without_hooks_after_a_test(trainer: Callable) -> None:
    class Failing(Plain):
        def test_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 2:
                raise ZeroDivisionError
            return super().test_step(batch, batch_idx)

    model, failing = Plain(), Failing()
    trainer(Pictures()).test(model, Letters(), verbose=False)
    with pytest.raises(ZeroDivisionError):
        trainer(Pictures()).test(failing, Letters(), verbose=False)
    assert not model.layers[-1]._forward_pre_hooks and not failing.layers[-1]._forward_pre_hooks


@pytest.mark.parametrize(("every", "drawn"), [(2, 0), (1, 60)])
def test_last_validation_of_a_fit_is_what_is_drawn_and_not_the_sanity_check(
    every: int, drawn: int, trainer: Callable
) -> None:
    pictures = Pictures()
    trainer(pictures, num_sanity_val_steps=2, max_epochs=1, check_val_every_n_epoch=every).fit(Plain(), Letters())
    assert sum(int(answers.counts.sum()) for answers in pictures.answers.values()) == drawn


def test_answers_are_there_without_tensorboard_and_without_names(trainer: Callable, tmp_path: Path) -> None:
    pictures, data, model = Pictures(), Letters(), Plain()
    data.class_names = []
    runner = trainer(pictures, logger=False)
    runner.fit(model, data)
    runner.test(model, data, verbose=False)
    assert pictures.answers["test"].counts.sum() == 60
    assert pictures.answers["test"].names == [str(label) for label in range(26)]
    assert not list(tmp_path.rglob("events*"))
    assert pictures.report(tmp_path / "report.png", []) and (tmp_path / "report.png").is_file()


def test_first_of_several_dataloaders_is_drawn(
    trainer: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Several(Plain):
        def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            return self(batch[0])

    pictures, data = Pictures(), Letters()
    loaders = [data.test_dataloader(), data.test_dataloader()]
    trainer(pictures).test(Several(), loaders, verbose=False)
    assert pictures.answers["test"].counts.sum() == 60
    line = "Pictures: no answers of test dataloader 1: only those of the first are drawn\n"
    assert capsys.readouterr().out == line


@pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start of training")
def test_mistakes_on_cached_features_show_the_images_that_they_were_made_of(trainer: Callable, tmp_path: Path) -> None:
    pictures, data = Pictures(), MNISTDataModule(source="digits", train_size=100)
    model = ResNet18(weights="none", image_size=28)
    runner = trainer(FeatureCache(), pictures)
    runner.fit(model, data)
    runner.test(model, data, verbose=False)
    for part, images in (("val", data.val_set), ("test", data.test_set)):
        of_label = {int(label): thumbnails(images.images[images.labels == label]) for label in range(10)}
        for mistake in pictures.answers[part].mistakes:
            assert any(torch.equal(mistake.image, image) for image in of_label[mistake.label])
    assert len(pictures.answers["test"].mistakes) == 25
    assert {"first batch", "feature maps/0 stem", "test/mistakes"} < tags(tmp_path)
