"""load_model(path).classify(picture): what `predict` says, of whatever holds a picture, from Python."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from running import write_pictures

from mnist_lightning import ConvNet, ImageFolder, ResNet18, load_model
from mnist_lightning.errors import UserError
from mnist_lightning.photos.ink import ink


def test_names_come_with_probabilities_the_likeliest_first(pictures: Path) -> None:
    model = load_model(pictures / "checkpoints" / "best.ckpt")
    red, blue = (Image.new("RGB", (50, 40), colour) for colour in ((200, 40, 40), (40, 40, 200)))
    answers = model.classify([red, blue])
    assert [list(answer) for answer in answers] == [["ants", "bees"], ["bees", "ants"]]
    assert all(sum(answer.values()) == pytest.approx(1) for answer in answers)
    model.train_layers(5)
    model.train()  # as a fit leaves it
    assert model.classify(red) == pytest.approx(answers[0]) and model.training
    assert model.classify([]) == []


def test_path_image_and_array_are_the_same_and_stay_as_they_are(pictures: Path) -> None:
    model = load_model(pictures / "checkpoints" / "best.ckpt")
    turned = Path("photos/ants/01.jpg")
    with Image.open(turned) as image:
        before = image.size, image.getexif()[0x0112]
        answers = model.classify([turned, str(turned), image])
        assert (image.size, image.getexif()[0x0112]) == before and before[1] > 1
    assert answers[1:] == answers[:1] * 2
    with Image.open("photos/ants/00.jpg") as colour:
        for picture in (colour, colour.convert("L")):
            assert model.classify(np.asarray(picture)) == model.classify(picture)


def test_digit_is_found_as_photos_finds_it(convnet: Path) -> None:
    photo = Image.new("L", (90, 60), 255)
    ImageDraw.Draw(photo).line((50, 8, 44, 50), 0, 5)
    model = load_model(convnet / "checkpoints" / "best.ckpt")
    answer = model.classify(photo)
    with torch.no_grad():
        (p,) = model(torch.from_numpy(ink(photo).image)[None, None]).softmax(1).tolist()
    assert answer == pytest.approx({str(digit): p[digit] for digit in range(10)}, abs=1e-6)


def test_checkpoint_of_a_fit_from_python_knows_its_pictures(folder: Path, quiet: Callable) -> None:
    write_pictures(Path("photos"))
    trainer = quiet(max_epochs=1, limit_train_batches=1, limit_val_batches=0)
    trainer.fit(ResNet18("none", num_classes=2, cache_features=False), ImageFolder("photos", size=32))
    trainer.save_checkpoint("a.ckpt")
    model = load_model("a.ckpt")
    seen: list[torch.Size] = []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape))
    assert model.classify("photos/ants/00.jpg").keys() == {"ants", "bees"} and seen == [(1, 3, 32, 32)]


@pytest.mark.parametrize(("picture", "got"), [
    ("nowhere.png", "nowhere.png: no file, or a link to none"),
    (3, "this int: neither a path, nor a PIL image, nor an array"),
    (np.zeros((4, 4)), "this ndarray: float64 (4, 4), not uint8 (H, W) or (H, W, 3)"),
    (np.zeros((1, 28, 28), np.uint8), "this ndarray: uint8 (1, 28, 28), not uint8"),
    (Image.new("L", (60, 60), 255), "this Image: no digit: "),
])  # fmt: skip
def test_what_is_no_picture_is_refused(picture: Any, got: str, convnet: Path) -> None:
    model = load_model(convnet / "checkpoints" / "best.ckpt")
    with pytest.raises(UserError) as refused:
        model.classify([picture])
    assert str(refused.value).startswith(f"expected a picture\ngot {got}")


def test_model_whose_pictures_are_unknown_is_refused(convnet: Path) -> None:
    path = convnet / "checkpoints" / "best.ckpt"
    content = torch.load(path, weights_only=True)
    torch.save({key: content[key] for key in ("state_dict", "class_path", "pytorch-lightning_version")}, "own.ckpt")
    for model in (ConvNet(), load_model("own.ckpt")):  # which may have been trained on anything
        with pytest.raises(UserError, match="expected a model from load_model, .*\ngot another ConvNet"):
            model.classify("a.png")
    torch.save({**content, "example_input": {"shape": [3, 8, 6], "dtype": "uint8"}}, path)
    with pytest.raises(UserError, match=r"got one of uint8 \(B, 3, 8, 6\)"):
        load_model(path).classify("a.png")
