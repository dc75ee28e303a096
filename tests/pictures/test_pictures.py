"""What a run of the command line shows: TensorBoard's pictures, read over its HTTP API; metrics.csv; report.png."""

import csv
import io
import json
import os
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mnist_lightning.commands.cli import CLI, run
from mnist_lightning.runs.checkpoints import read_checkpoint
from mnist_lightning.runs.logger import RunLogger

DIGITS = ["--data.source", "digits", "--trainer.max_epochs", "2", "--trainer.log_every_n_steps", "5"]
PARTS = [f"pictures/{part}/{name}" for part in ("val", "test")
         for name in ("confusion matrix", "accuracy by class", "mistakes")]  # fmt: skip
MODELS = {
    "ConvNet": ([], ["0 conv1", "1 conv2"]),
    "ResNet18": (
        ["--model", "ResNet18", "--model.weights", "none", "--model.image_size", "28"],
        ["0 stem", "1 layer1", "2 layer2", "3 layer3", "4 layer4"],
    ),
}


@pytest.fixture(scope="module", params=MODELS)
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A finished run's folder, and its feature maps' names."""
    root = tmp_path_factory.mktemp("root")
    args, maps = MODELS[request.param]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(root / "cache"))
        assert run(["fit", *args, *DIGITS, "--trainer.default_root_dir", str(root)]) == 0
    return next((root / "lightning_logs").glob("*/version_0")), maps


@pytest.fixture
def tensorboard(finished: tuple[Path, list[str]]) -> Iterator[str]:
    """The address of a TensorBoard of that run."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(finished[0]), "--port", "0"]
    environment = {**os.environ, "PYTHONWARNINGS": ""}
    with subprocess.Popen(
        [*command, "--load_fast=false"], stderr=subprocess.PIPE, text=True, env=environment
    ) as server:
        lines = iter(server.stderr or ())
        line = next(line for line in lines if "http://" in line)  # it says so once it listens
        url = next(word for word in line.split() if word.startswith("http://")).rstrip("/")
        deadline = time.monotonic() + 60  # seconds
        while "." not in ask(f"{url}/data/plugin/graphs/info") and time.monotonic() < deadline:
            pass  # it reads the events on the side
        yield url
        server.terminate()


def ask(url: str, **query: str) -> Any:
    with urllib.request.urlopen(f"{url}?{urllib.parse.urlencode(query)}" if query else url, timeout=30) as answer:
        content = answer.read()
    return json.loads(content) if "json" in answer.headers["Content-Type"] else content


def test_tensorboard_serves_every_tag(finished: tuple[Path, list[str]], tensorboard: str) -> None:
    _, maps = finished
    images = ask(f"{tensorboard}/data/plugin/images/tags")["."]
    once = ["pictures/first batch", "pictures/conv1"]
    wanted = [*once, *(f"pictures/feature maps/{name}" for name in maps), *PARTS]
    assert sorted(images) == sorted(wanted)
    for tag in wanted:
        samples = ask(f"{tensorboard}/data/plugin/images/images", run=".", tag=tag, sample="0")
        picture = ask(f"{tensorboard}/data/plugin/images/individualImage?{samples[-1]['query']}")
        assert Image.open(io.BytesIO(picture)).width >= 400
    scalars = ask(f"{tensorboard}/data/plugin/scalars/tags")["."]
    assert {"train/loss", "train/acc", "val/loss", "val/acc", "test/loss", "test/acc", "lr-SGD"} <= set(scalars)
    assert ask(f"{tensorboard}/data/plugin/graphs/info")["."]["run_graph"]
    projector = ask(f"{tensorboard}/data/plugin/projector/info", run=".")["embeddings"]
    assert [entry["sprite"]["singleImageDim"] for entry in projector] == [[28, 28]]
    assert projector[0]["tensorShape"][0] == 360  # of the digits' test images; of MNIST's 1,000


def test_report_and_metrics_are_there_for_people_without_tensorboard(finished: tuple[Path, list[str]]) -> None:
    folder, _ = finished
    with Image.open(folder / "report.png") as picture:
        assert picture.width > 800 and np.asarray(picture).std() > 10
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    steps = [int(row["step"]) for row in rows]
    assert steps == sorted(set(steps))
    for name in ("train/loss", "train/acc", "val/loss", "val/acc", "test/loss", "test/acc", "lr-SGD"):
        assert any(row[name] for row in rows), name
    assert sum(bool(row["val/acc"]) for row in rows) == 2  # once an epoch


def test_pictures_change_nothing_in_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = [*MODELS["ResNet18"][0], "--model.trainable_layers", "1"]
    few = ["--data.source", "digits", "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "3"]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    states = []
    for extra in ([], ["--trainer.logger", "false"]):
        root = tmp_path / f"root{len(states)}"
        assert run(["fit", *args, *few, *extra, "--trainer.default_root_dir", str(root)]) == 0
        states.append(read_checkpoint(next(root.rglob("last.ckpt")))["state_dict"])
    assert not list((tmp_path / "root1").rglob("report.png"))
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_resumed_run_goes_on_with_the_rows_of_metrics_csv(tmp_path: Path) -> None:
    first = RunLogger(tmp_path)
    for step in (0, 4, 8):
        first.log_metrics({"train/loss": 1.0}, step)
    first.log_metrics({"val/acc": 0.5}, 9)
    resumed = RunLogger(tmp_path, resumed_at=6)  # the checkpoint was saved after six steps
    resumed.log_metrics({"train/loss": 2.0}, 8)
    resumed.log_metrics({"val/acc": 0.6}, 9)
    assert [(row["step"], row.get("train/loss"), row.get("val/acc")) for row in RunLogger(tmp_path).rows] == [
        (0, 1.0, None), (4, 1.0, None), (8, 2.0, None), (9, None, 0.6)
    ]  # fmt: skip


def test_other_loggers_get_no_pictures(tmp_path: Path) -> None:
    few = [*DIGITS, "--trainer.limit_train_batches", "2", "--trainer.default_root_dir", str(tmp_path)]
    other = ["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", str(tmp_path / "other")]
    assert run(["fit", *few, *other]) == 0
    assert not list(tmp_path.rglob("events*")) and not list(tmp_path.rglob("report.png"))


def test_test_of_a_checkpoint_draws_into_its_run(finished: tuple[Path, list[str]]) -> None:
    folder, _ = finished
    before = set(folder.glob("events*"))
    cli = CLI(["test", "--ckpt_path", str(folder / "checkpoints" / "last.ckpt")])
    assert set(folder.glob("events*")) > before
    answers = cli.pictures.answers["test"]
    accuracy = float(answers.counts.diagonal().sum() / answers.counts.sum())
    assert accuracy == pytest.approx(float(cli.trainer.callback_metrics["test/acc"]))
