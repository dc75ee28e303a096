"""What a run of the command line shows: TensorBoard's pictures, by its own reader; metrics.csv; report.png."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from google.protobuf import text_format
from PIL import Image
from running import command, last, rows
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig

from mnist_lightning.commands.cli import CLI

PARTS = [f"pictures/{part}/{name}" for part in ("val", "test")
         for name in ("confusion matrix", "accuracy by class", "mistakes")]  # fmt: skip
MAPS = {"convnet": ["0 conv1", "1 conv2"], "resnet": ["0 stem", "1 layer1", "2 layer2", "3 layer3", "4 layer4"]}
EPOCHS = {"convnet": 2, "resnet": 5}
SCALARS = ("train/loss", "train/acc", "val/loss", "val/acc", "test/loss", "test/acc", "lr-SGD")


@pytest.fixture(params=MAPS)
def finished(request: pytest.FixtureRequest) -> tuple[Path, str]:
    """A finished run's folder, and what it is a run of."""
    return request.getfixturevalue(request.param), request.param


def test_tensorboard_finds_every_tag(finished: tuple[Path, str]) -> None:
    folder, name = finished
    events = EventAccumulator(str(folder)).Reload()
    once = ["pictures/first batch", "pictures/conv1"]
    wanted = [*once, *(f"pictures/feature maps/{layer}" for layer in MAPS[name]), *PARTS]
    assert sorted(events.Tags()["images"]) == sorted(wanted)
    for tag in wanted:
        assert Image.open(io.BytesIO(events.Images(tag)[-1].encoded_image_string)).width >= 400
    assert set(SCALARS) <= set(events.Tags()["scalars"])
    assert events.Tags()["graph"]
    config = text_format.Parse((folder / "projector_config.pbtxt").read_text(), ProjectorConfig())
    (embedding,) = config.embeddings
    assert list(embedding.sprite.single_image_dim) == [28, 28]
    for path in (embedding.tensor_path, embedding.metadata_path):
        assert len((folder / path).read_text().splitlines()) == 360  # of the digits' test images; of MNIST's 1,000
    assert (folder / embedding.sprite.image_path).is_file()


def test_report_and_metrics_are_there_for_people_without_tensorboard(finished: tuple[Path, str]) -> None:
    folder, name = finished
    with Image.open(folder / "report.png") as picture:
        assert picture.width > 800 and np.asarray(picture).std() > 10
    written = rows(folder / "metrics.csv")
    steps = [int(row["step"]) for row in written]
    assert steps == sorted(set(steps))
    for scalar in SCALARS:
        assert any(row[scalar] for row in written), scalar
    assert sum(bool(row["val/acc"]) for row in written) == EPOCHS[name]  # once an epoch


def test_pictures_change_nothing_in_the_training_and_other_loggers_get_none(folder: Path) -> None:
    model = "--model ResNet18 --model.weights none --model.image_size 28 --model.trainable_layers 1"
    few = "--data.source digits --trainer.max_epochs 1 --trainer.limit_train_batches 3"
    other = "--trainer.logger CSVLogger --trainer.logger.save_dir other --trainer.default_root_dir other"
    command("fit", *model.split(), *few.split())
    command("fit", *model.split(), *few.split(), *other.split())
    run = Path("lightning_logs", "ResNet18-digits", "version_0")
    with_pictures, without = (last(root / run)["state_dict"] for root in (Path(), Path("other")))
    assert all(torch.equal(value, without[name]) for name, value in with_pictures.items())
    assert not [*Path("other").rglob("report.png"), *Path("other").rglob("events*")]


def test_test_of_a_checkpoint_draws_into_its_run(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    before = set(folder.glob("events*"))
    cli = CLI(["test", "--ckpt_path", str(folder / "checkpoints" / "last.ckpt")])
    assert set(folder.glob("events*")) > before
    answers = cli.command.pictures.answers["test"]
    accuracy = float(answers.counts.diagonal().sum() / answers.counts.sum())
    assert accuracy == pytest.approx(float(cli.trainer.callback_metrics["test/acc"]))
