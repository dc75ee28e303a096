"""RunLogger: metrics.csv beside TensorBoard's tags and hyperparameters."""

import re
from pathlib import Path

import pytest
from running import Fit, accuracy, events, points
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from mnist_lightning.runs.logger import RunLogger, read_metrics

# ---- metrics.csv


def test_metrics_of_a_resumed_run_follow_those_before_its_checkpoint(tmp_path: Path) -> None:
    first = RunLogger(tmp_path)
    for step in range(5):
        first.log_metrics({"train/loss": 10.0 + step, "epoch": 0}, step)
    first.log_metrics({"val/acc": 0.5, "epoch": 0}, 4)  # the same row
    resumed = RunLogger(tmp_path, resumed_after=2)
    resumed.log_metrics({"train/loss": 20.0, "epoch": 0}, 3)
    resumed.finalize("success")
    evaluated = RunLogger(tmp_path, evaluated_at=4)
    evaluated.log_metrics({"test/acc": 0.25, "epoch": 0}, 0)
    losses = [10.0, 11.0, 12.0, 20.0]
    rows = [{"step": step, "epoch": 0, "train/loss": loss} for step, loss in enumerate(losses)]
    assert read_metrics(tmp_path / "metrics.csv") == [*rows, {"step": 4, "test/acc": 0.25}]


OTHERS = ("step,epoch\nnan,2\n", "step,epoch\n1.5,2\n", "step,epoch\n" + 140_000 * "1",
          "a,b\n1,2\n", "step,epoch\n1,x\n", "step,epoch\n1,2,3\n", "step,epoch\n,2\n", "step,loss\n1,2\n", "", "\x00")


@pytest.mark.parametrize("content", OTHERS, ids=lambda content: repr(content[:30]))
def test_metrics_of_somebody_else_are_left_alone(content: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text(content)
    logger = RunLogger(tmp_path, resumed_after=2)
    logger.log_metrics({"test/acc": 0.5}, 3)
    logger.finalize("success")
    assert (tmp_path / "metrics.csv").read_text() == content


def test_logger_takes_what_tensorboards_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logger = RunLogger(tmp_path)
    logger.log_hyperparams({"a": 1}, metrics={"hp/x": 0})
    logger.log_metrics({"parts": {"a": 1.0}, "x": 2.0}, 3)
    assert logger.rows == [{"step": 0.0, "hp/x": 0.0}, {"step": 3.0, "x": 2.0}]
    logger.log_hyperparams({"b": 1})
    logger.log_hyperparams({"b": 1, "c": 2})
    assert capsys.readouterr().out == "TensorBoard: hyperparameters can be given once; not shown: c\n"


# ---- TensorBoard


def test_tensorboard_gets_the_tags_of_the_design_and_the_numbers_that_were_printed(
    convnet: Path, convnet_fit: Fit
) -> None:
    tags = set(events(convnet).Tags()["scalars"])
    assert tags >= {"train/loss", "train/acc", "val/loss", "val/acc", "test/loss", "test/acc", "lr-SGD"}
    assert not {tag for tag in tags if "hp_metric" in tag}
    for tag in ("train/loss", "train/acc", "val/loss", "val/acc"):
        assert [f"{value:.4f}" for value in points(convnet, tag)] == re.findall(rf"{tag} (\S+)", convnet_fit.out)
    assert [f"{100 * value:.2f}" for value in points(convnet, "test/acc")] == [accuracy(convnet_fit.out)]
    assert 0.0 not in [value for tag in tags if "/" in tag for value in points(convnet, tag)]


def test_tensorboard_joins_hyperparameters_to_val_and_test_accuracy(convnet: Path) -> None:
    contents = events(convnet).PluginTagToContent("hparams")
    data = {tag: HParamsPluginData.FromString(content) for tag, content in contents.items()}
    experiment = data["_hparams_/experiment"].experiment
    assert {info.name.tag for info in experiment.metric_infos} == {"val/acc", "test/acc"}
    shown = data["_hparams_/session_start_info"].session_start_info.hparams
    assert shown["batch_size"].number_value == 64
    assert shown["source"].string_value == "digits"
    assert shown["optimizer/lr"].number_value == 0.01
