"""The drawings: what they are made of is compared with an independent computation; that they can be drawn, with many
kinds of images and classes."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from sklearn.metrics import accuracy_score, confusion_matrix, precision_score, recall_score
from torch import Tensor, nn

from mnist_lightning.convnet import MEAN, STD, ConvNet
from mnist_lightning.pictures import figures
from mnist_lightning.pictures.figures import Answers, answers_of, evaluated, feature_maps, grid, stages, thumbnails
from mnist_lightning.resnet import ResNet18

ROWS = [{"step": 49.0, "train/loss": 1.0}, {"step": 50.0, "val/loss": 0.5, "val/f1": 0.4, "lr-SGD/pg1": 0.1}]


def guesses(classes: int, images: Tensor, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits that are right now and then, labels, and the images."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(images), classes, generator=generator)
    right = torch.rand(len(images), generator=generator) < 0.5
    others = torch.randint(classes, (len(images),), generator=generator)
    return logits, torch.where(right, logits.argmax(1), others), images


def answers(classes: int, images: Tensor) -> Answers:
    return answers_of([str(label) for label in range(classes)], *guesses(classes, images))


def test_answers_of_batches_are_those_of_the_whole() -> None:
    logits, labels, images = guesses(26, torch.rand(400, 3, 12, 9))
    names = [chr(ord("a") + label) for label in range(26)]
    batches = zip(logits.split(64), labels.split(64), images.split(64), strict=True)
    parts = figures.merged([answers_of(names, *batch) for batch in batches])
    assert parts.counts.tolist() == confusion_matrix(labels, logits.argmax(1), labels=range(26)).tolist()
    probabilities, predicted = logits.softmax(1).max(1)
    wrong = sorted((-float(p), i) for i, p in enumerate(probabilities) if predicted[i] != labels[i])[:25]
    for mistake, (_, i) in zip(parts.mistakes, wrong, strict=True):
        assert (mistake.label, mistake.predicted) == (int(labels[i]), int(predicted[i]))
        assert torch.equal(mistake.image, thumbnails(images[i, None])[0])


@pytest.mark.parametrize("images", [
    torch.randint(256, (6, 1, 28, 28), dtype=torch.uint8),
    5 * torch.randn(6, 3, 40, 40),
    torch.linspace(0, 7, 224).view(224, 1).expand(6, 3, 224, 100).half(),
    torch.rand(6, 1, 8, 32).double() > 0.5,
], ids=["uint8", "standardised", "large", "bool"])  # fmt: skip
def test_thumbnails_are_small_squares_with_all_greys(images: Tensor) -> None:
    small = thumbnails(images)
    channels, side = small.shape[1], small.shape[2]
    assert small.dtype == torch.uint8 and small.shape == (6, channels, side, side) and channels == images.shape[1]
    assert side == min(64, max(images.shape[2:]))
    assert int(small.min()) == 0 and int(small.max()) > 200


def test_small_square_image_is_its_own_thumbnail() -> None:
    image = torch.randint(256, (1, 1, 28, 28), dtype=torch.uint8)
    image[0, 0, 0, :2] = torch.tensor([0, 255])
    assert torch.equal(thumbnails(image), image)


@pytest.mark.parametrize(("classes", "size"), [
    (2, (3, 40, 30)), (10, (1, 28, 28)), (26, (1, 28, 28)), (200, (3, 40, 30))
])  # fmt: skip
def test_report_is_drawn_for_any_number_of_classes(classes: int, size: tuple[int, ...], tmp_path: Path) -> None:
    figures.report(tmp_path / "report.png", answers(classes, torch.rand(50, *size)), ROWS)
    with Image.open(tmp_path / "report.png") as picture:
        assert picture.width > 1000 and picture.height > 1000


def test_report_of_a_regression_holds_its_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []
    monkeypatch.setattr(figures, "draw_curves", lambda axes, rows, metric: drawn.append(metric))
    figures.report(tmp_path / "report.png", None, ROWS)
    assert drawn == ["loss", "f1"]  # there is no val/acc
    with Image.open(tmp_path / "report.png") as picture:
        assert picture.width > 1000 > picture.height


def test_curves_show_epochs_beside_single_batches() -> None:
    axes = figures.figure(4, 4).add_subplot()
    rows = [{"step": 9.0, "train/loss_step": 2.0}, {"step": 19.0, "train/loss_step": 1.0, "train/loss": 1.5}]
    figures.draw_curves(axes, [*rows, *ROWS], "loss")
    assert axes.get_title() == "Loss" and axes.get_xlabel() == "training steps"
    assert {line.get_label(): line.get_xydata().tolist() for line in axes.lines} == {
        "train, one batch": [[9, 2], [19, 1]], "train": [[19, 1.5], [49, 1]], "val": [[50, 0.5]]
    }  # fmt: skip


@pytest.mark.parametrize(("classes", "numbers", "ticks"), [(10, 100, 10), (15, 225, 15), (26, 0, 13)])
def test_confusion_matrix_of_many_classes_has_colours_alone(classes: int, numbers: int, ticks: int) -> None:
    axes = figures.figure(4, 4).add_subplot()
    figures.draw_confusion(axes, answers(classes, torch.rand(90, 1, 8, 8)))
    assert len(axes.texts) == numbers and len(axes.get_xticklabels()) == ticks
    assert axes.get_xlabel() == "classified as"


def test_precision_and_recall_of_each_class_are_sklearns() -> None:
    logits, labels, images = guesses(4, torch.rand(60, 1, 8, 8))
    axes = figures.figure(4, 4).add_subplot()
    figures.draw_classes(axes, answers_of(["a", "b", "c", "d"], logits, labels, images))
    predicted = logits.argmax(1)
    heights = [bar.get_height() / 100 for bar in axes.patches]
    measured = [score(labels, predicted, average=None) for score in (precision_score, recall_score)]
    assert heights == pytest.approx([*measured[0], *measured[1]])
    assert axes.get_title("left") == f"Accuracy {100 * accuracy_score(labels, predicted):.2f} %"


def test_class_without_images_has_no_bar() -> None:
    axes = figures.figure(4, 4).add_subplot()
    figures.draw_classes(axes, Answers(["cat", "dog", "cow"], torch.tensor([[3, 1, 0], [0, 0, 0], [0, 0, 2]]), []))
    assert [text.get_text() for text in axes.texts] == ["100", "0", "100", "75", "", "100"]


@pytest.mark.parametrize("wrong", [0, 1, 7, 40])
def test_mistakes_are_drawn_with_the_names_of_their_classes(wrong: int) -> None:
    logits = torch.linspace(9, 5, 100)[:, None] * torch.eye(10).repeat(10, 1)
    labels = logits.argmax(1)
    labels[:wrong] = (labels[:wrong] + 1) % 10
    names = ["shirt", "shoe", *"bcdefghi"]
    axes = figures.figure(5, 6).add_subplot()
    figures.draw_mistakes(axes, answers_of(names, logits, labels, torch.zeros(100, 1, 28, 28, dtype=torch.uint8)))
    assert len(axes.texts) == min(25, wrong)
    assert axes.get_title() == f"The most confident of {wrong} mistakes: label→classified as"
    assert wrong == 0 or axes.texts[0].get_text() == "shoe→\nshirt\n100 %"


def test_grid_is_wide_enough_to_be_seen() -> None:
    assert grid(torch.rand(3, 1, 28, 28)).shape[2] >= 480
    assert grid(torch.rand(64, 3, 64, 64)).shape == (3, 8 * 65 + 1, 8 * 65 + 1)


def test_feature_maps_are_what_the_layers_make() -> None:
    model, image = ConvNet(), torch.randint(0, 256, (1, 1, 28, 28), dtype=torch.uint8)
    maps = feature_maps(model, image)
    with torch.no_grad():
        torch.testing.assert_close(maps["conv1"], model.conv1((image / 255 - MEAN) / STD)[0])
    assert list(maps) == ["conv1", "conv2"]
    with torch.inference_mode():  # Lightning validates in it
        again = feature_maps(model, image)
    assert all(torch.equal(again[name], values) for name, values in maps.items())


def test_model_is_evaluated_and_goes_on_as_it_was() -> None:
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Sequential(nn.BatchNorm2d(1).eval(), nn.Dropout(0.5)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    images = torch.rand(2, 1, 8, 8)
    with evaluated(model):
        assert torch.equal(model(images), model(images))  # no dropout
    assert [module.training for module in model.modules()] == modes == [True, True, True, False, True]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_stages_are_the_first_five_convolutions_or_resnet18s_blocks() -> None:
    nested = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Sequential(*(nn.Conv2d(2, 2, 3) for _ in range(6))), nn.Flatten())
    assert list(stages(nested)) == ["0", "1.0", "1.1", "1.2", "1.3"]
    assert list(stages(ResNet18(weights="none"))) == ["stem", "layer1", "layer2", "layer3", "layer4"]
