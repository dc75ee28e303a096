"""predict: a row an image; for a folder of photos a table, of the models that can classify them."""

import csv
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw
from running import Fit, accuracy, command, refused, rows, run

from mnist_lightning import load_model
from mnist_lightning.sources import load_digits


def test_predictions_are_one_row_an_image_in_order(convnet: Path, convnet_fit: Fit) -> None:
    (convnet / "predictions.csv").write_text("old")
    assert command("predict", "--ckpt_path", "best") == f"Predictions    {convnet}/predictions.csv\n"
    with (convnet / "predictions.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["index", "label", "predicted", *(f"p{digit}" for digit in range(10))]
    assert [int(row[0]) for row in rows] == list(range(360))
    labels, predicted = torch.tensor([[int(row[1]), int(row[2])] for row in rows]).T
    images, expected = load_digits().test
    assert torch.equal(labels, expected)
    with torch.no_grad():
        probabilities = load_model(convnet / "checkpoints" / "best.ckpt")(images).softmax(1)
    found = torch.tensor([[float(value) for value in row[3:]] for row in rows])
    torch.testing.assert_close(found, probabilities, atol=1e-5, rtol=0)
    assert torch.equal(predicted, probabilities.argmax(1))
    assert f"{100 * (predicted == labels).double().mean():.2f}" == accuracy(convnet_fit.out)


@pytest.mark.filterwarnings("ignore")  # Lightning's, of a model without some of its steps
def test_photos_need_probabilities(folder: Path) -> None:
    plain = "--model foreign_project.models.Plain --model.pixels 784 --monitor val/loss --monitor_mode min"
    command("fit", "--data", "running.Few", "--pictures", "false", "--trainer.max_epochs", 1, *plain.split())
    photo = Image.new("L", (60, 60), 255)
    ImageDraw.Draw(photo).line((30, 8, 30, 50), 0, 5)
    photo.save("p.png")
    said = refused("predict", "--ckpt_path", "best", "--data", "Photos", "--data.path", "p.png")
    assert "{'probabilities': (B, C)} for Photos got Plain" in said


def test_pictures_get_the_names_of_their_classes_and_what_cannot_be_read_ends_in_1(
    pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("new").mkdir()
    Image.new("RGBA", (300, 200), (40, 40, 200)).save("new/blue.png")
    Path("new/broken.jpg").write_text("hello")
    assert run("predict --ckpt_path best --data ImageFolder --data.path new".split()) == 1
    blue, broken = rows(pictures / "predictions.csv")
    assert list(blue) == ["file", "predicted", "second", "remark", "pants", "pbees"]
    assert (blue["file"], blue["predicted"], blue["second"]) == ("blue.png", "bees", "ants")
    assert (broken["file"], broken["predicted"]) == ("broken.jpg", "") and "no picture" in broken["remark"]
    assert capsys.readouterr().out.splitlines()[1].split()[:2] == ["blue.png", "bees"]
    answer = load_model(pictures / "checkpoints" / "best.ckpt").classify("new/blue.png")
    assert answer == pytest.approx({name: float(blue[f"p{name}"]) for name in ("ants", "bees")}, abs=1e-6)
