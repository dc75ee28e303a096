"""What a run says while it goes."""

import io
import logging
import re
import sys
from collections.abc import Callable
from logging.handlers import BufferingHandler
from typing import Any

import pytest
import torch
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.callbacks import TQDMProgressBar

from mnist_lightning.convnet import ConvNet
from mnist_lightning.data import MNISTDataModule
from mnist_lightning.runs.console import EpochLines, is_news, progress


def lines(quiet: Callable, capsys: pytest.CaptureFixture[str], **settings: Any) -> list[str]:
    """What is printed at the end of each epoch of three batches."""
    trainer = quiet(limit_train_batches=3, callbacks=[EpochLines()], **settings)
    trainer.fit(ConvNet(), MNISTDataModule(source="digits"))
    return [re.sub(r" \d\.\d{4}(?=  |$)", "", line) for line in capsys.readouterr().out.splitlines()]


def test_line_of_an_epoch_says_what_was_measured_in_it(quiet: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = lines(quiet, capsys, max_epochs=2, check_val_every_n_epoch=2, num_sanity_val_steps=1)
    assert first == "epoch 1/2  train/acc  train/loss"
    assert second == "epoch 2/2  train/acc  train/loss  val/acc  val/loss"


def test_line_of_a_fit_without_a_number_of_epochs_names_none(
    quiet: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lines(quiet, capsys, max_steps=3, limit_val_batches=0) == ["epoch 1  train/acc  train/loss"]


@pytest.mark.parametrize(("wanted", "terminal", "bar"), [
    (None, True, True), (None, False, False), (True, False, True), (False, True, False)
])  # fmt: skip
def test_bar_is_for_terminals_and_for_who_asks(
    wanted: bool | None, terminal: bool, bar: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: terminal)
    monkeypatch.setattr(sys, "stderr", stream)
    assert isinstance(progress(wanted), TQDMProgressBar if bar else EpochLines)


def test_hint_to_round_in_matrix_products_is_no_news(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Lightning gives it on a GPU; here torch only says that it has one."""
    gpu = {"is_available": True, "get_device_capability": (9, 0), "get_device_name": "H200", "set_device": None}
    for name, answer in gpu.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    handler, logger = BufferingHandler(9), logging.getLogger("lightning.pytorch")
    logger.addHandler(handler)
    try:
        CUDAAccelerator().setup_device(torch.device("cuda", 63))  # the hint is given once for a device
    finally:
        logger.removeHandler(handler)
    (record,) = handler.buffer
    assert "set_float32_matmul_precision" in record.getMessage() and not is_news(record)
