"""predictions.csv of the project's models and of somebody else's."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from mnist_lightning.runs.predictions import PredictionWriter

QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}


class Pets(LightningDataModule):
    """Nine vectors, with or without their labels, shuffled, in batches of four."""

    class_names = ("cat", "dog", "cow")

    def __init__(self, labelled: bool) -> None:
        super().__init__()
        self.vectors = torch.randn(9, 5, generator=torch.Generator().manual_seed(0))
        self.data = TensorDataset(self.vectors, *([torch.arange(9) % 3] if labelled else []))

    def predict_dataloader(self) -> DataLoader:
        return DataLoader(self.data, batch_size=4)


class Model(LightningModule):
    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.layer = nn.Linear(5, classes)

    def forward(self, batch: list[Tensor]) -> Tensor:  # Lightning's own predict_step hands on the whole batch
        return self.layer(batch[0])


class Labelled(Model):
    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        return {"probabilities": self(batch).softmax(1), "labels": batch[1]}


def predict(path: Path, model: LightningModule, data: Any, **settings: Any) -> tuple[bool, list[dict[str, str]]]:
    """Whether the file was written, and its rows."""
    writer = PredictionWriter(path / "predictions.csv")
    Trainer(callbacks=[writer], **{**QUIET, **settings}).predict(model, data)
    if not writer.path.exists():
        return writer.written, []
    with writer.path.open(newline="") as file:
        return writer.written, list(csv.DictReader(file))


def test_classes_are_called_by_their_names(tmp_path: Path) -> None:
    model, data = Labelled(), Pets(labelled=True)
    written, rows = predict(tmp_path, model, data)
    assert written and list(rows[0]) == ["index", "label", "predicted", "pcat", "pdog", "pcow"]
    assert [row["label"] for row in rows] == ["cat", "dog", "cow"] * 3
    predicted = model.layer(data.vectors).argmax(1).tolist()
    assert [row["predicted"] for row in rows] == [data.class_names[label] for label in predicted]


def test_checkpoints_names_come_first_and_start_no_formula(tmp_path: Path) -> None:
    writer = PredictionWriter(tmp_path / "predictions.csv", ["=1+1", "@b", "c"])
    Trainer(callbacks=[writer], **QUIET).predict(Labelled(), Pets(labelled=True))
    with writer.path.open(newline="") as file:
        assert [row["label"] for row in csv.DictReader(file)][:3] == ["'=1+1", "'@b", "c"]


def test_label_that_is_no_class_stays_a_number(tmp_path: Path) -> None:
    data = Pets(labelled=True)
    data.data.tensors[1][:2] = torch.tensor([-1, 7])
    assert [row["label"] for row in predict(tmp_path, Labelled(), data)[1]][:3] == ["-1", "7", "cow"]


def test_unlabelled_tensors_are_written_as_they_are(tmp_path: Path) -> None:
    model, data = Model(), Pets(labelled=False)
    written, rows = predict(tmp_path, model, data)
    assert written and list(rows[0]) == ["index", "predicted", "output cat", "output dog", "output cow"]
    found = torch.tensor([[float(value) for value in list(row.values())[2:]] for row in rows])
    torch.testing.assert_close(found, model.layer(data.vectors).detach(), atol=1e-5, rtol=0)


def test_rows_come_in_the_order_of_the_images_whatever_the_loader_does(tmp_path: Path) -> None:
    data = Pets(labelled=True)
    loader = DataLoader(data.data, batch_size=4, sampler=[8, 3, 5, 0, 1, 7, 2, 4, 6])
    rows = predict(tmp_path, Labelled(), loader)[1]
    assert [(row["index"], row["label"]) for row in rows] == [(str(i), str(i % 3)) for i in range(9)]


@pytest.mark.filterwarnings("ignore:Couldn't infer the batch indices")
def test_images_of_ready_made_batches_are_numbered(tmp_path: Path) -> None:
    batches: Any = [[torch.randn(4, 5)], [torch.randn(2, 5)]]
    rows = predict(tmp_path, Model(), DataLoader(batches, batch_size=None))[1]
    assert [row["index"] for row in rows] == ["0", "1", "2", "3", "4", "5"]


def test_no_batches_write_nothing(tmp_path: Path) -> None:
    (tmp_path / "predictions.csv").write_text("index\n")
    assert predict(tmp_path, Model(), Pets(labelled=True), limit_predict_batches=0) == (False, [])


@pytest.mark.parametrize("returned", [
    torch.zeros(4), torch.zeros(4, 1), torch.zeros(4, 3, 2), {"logits": torch.zeros(4, 3)}, ["a"], None
], ids=["classes", "regression", "maps", "dict", "list", "None"])  # fmt: skip
@pytest.mark.filterwarnings("ignore:predict returned None")
def test_other_answers_are_not_written_and_the_reason_is_said(
    returned: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Other(Model):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return returned

    assert predict(tmp_path, Other(), Pets(labelled=True)) == (False, [])
    reason = 'predict_step returns neither {"probabilities": a tensor (B, C)} nor a tensor (B, C)'
    assert capsys.readouterr().out == f"Predictions: no predictions.csv: {reason}\n"


def test_several_dataloaders_are_not_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Several(Model):
        def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
            return self(batch)

    loader = Pets(labelled=True).predict_dataloader()
    assert predict(tmp_path, Several(), [loader, loader]) == (False, [])
    assert "no predictions.csv: there are several dataloaders" in capsys.readouterr().out


def test_shares_of_two_processes_make_one_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Two:
        """What write_on_epoch_end sees of a Trainer on the first of two processes."""

        world_size, is_global_zero, datamodule = 2, True, Pets(labelled=False)

    def gather(shares: list[Any], mine: Any) -> None:
        shares[:] = [mine, ([1, 3], [(torch.tensor([[0.0, 1, 0], [1.0, 0, 0]]), None, "output ")])]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    writer = PredictionWriter(tmp_path / "predictions.csv")
    writer.write_on_epoch_end(Two(), Model(), [torch.eye(3)[[2, 0]]], [[[0, 2]]])  # type: ignore[arg-type]
    rows = [line.split(",")[:2] for line in writer.path.read_text().splitlines()]
    assert writer.written
    assert rows == [["index", "predicted"], ["0", "cow"], ["1", "dog"], ["2", "cat"], ["3", "cat"]]
