"""What a run says while it goes."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch import Trainer

from mnist_lightning import console
from mnist_lightning.runs.console import Bar
from mnist_lightning.convnet import ConvNet
from mnist_lightning.data import MNISTDataModule


class Drawings(Bar):
    """Keeps at which batches it is drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[int] = []

    def get_metrics(self, trainer: Trainer, pl_module: Any) -> dict[str, Any]:
        self.batches.append(trainer.fit_loop.epoch_loop.batch_progress.current.ready)
        return super().get_metrics(trainer, pl_module)


@pytest.mark.parametrize("seconds, drawn", [(0.08, [1, 4, 7, 10]), (0.4, list(range(1, 11)))])
def test_bar_is_drawn_five_times_a_second_and_at_the_last_batch(
    seconds: float, drawn: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(1000 + seconds * step for step in range(1000))
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    bar = Drawings()
    trainer = Trainer(
        max_epochs=1, limit_train_batches=10, limit_val_batches=0, accelerator="cpu", logger=False, callbacks=bar,
        enable_checkpointing=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(ConvNet(), MNISTDataModule(source="digits"))
    assert bar.batches[: len(drawn)] == drawn
    assert set(bar.batches[len(drawn) :]) <= {10}  # the epoch's end draws it once more
