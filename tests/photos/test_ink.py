"""A picture of a digit becomes what MNIST would have made of it, whatever the picture is like."""

import numpy as np
import pytest
from PIL import Image, ImageOps
from scipy import ndimage
from sklearn.neighbors import KNeighborsClassifier

from benchmarks.pages import page
from mnist_lightning.photos.ink import NoInk, ink
from mnist_lightning.sources import load_digits


@pytest.fixture(scope="module")
def seven() -> Image.Image:
    """A black 7 on white, 200×300."""
    paper = np.full((300, 200), 255, np.uint8)
    paper[60:80, 50:150] = 0
    for row in range(80, 250):
        at = 140 - (row - 80) // 3
        paper[row, at : at + 20] = 0
    return Image.fromarray(paper)


def alike(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a.ravel().astype(float), b.ravel().astype(float))[0, 1])


def test_ink_fits_the_box_of_20_and_is_centred_by_mass(seven: Image.Image) -> None:
    image = ink(seven).image
    assert image.shape == (28, 28) and image.dtype == np.uint8
    rows, columns = np.nonzero(image > 20)
    assert max(np.ptp(rows), np.ptp(columns)) + 1 == pytest.approx(20, abs=1)
    assert ndimage.center_of_mass(image) == pytest.approx((14, 14), abs=0.51)  # as MNIST's: 13.50 to 14.50
    assert image[0, 0] == 0 and image.max() > 240  # 0 = paper, 255 = ink


@pytest.mark.parametrize("change", [
    ImageOps.invert,
    lambda picture: picture.convert("RGB"),
    lambda picture: picture.convert("1"),
    lambda picture: picture.convert("P"),
    lambda picture: picture.convert("I"),
    lambda picture: picture.convert("F"),
    lambda picture: ImageOps.colorize(picture, "darkblue", "lightyellow"),
    lambda picture: ImageOps.expand(picture, (0, 400, 700, 0), 255),
    lambda picture: picture.resize((2000, 3000), Image.Resampling.BICUBIC),
    lambda picture: picture.resize((40, 60), Image.Resampling.BOX),
], ids=[
    "light on dark", "RGB", "bilevel", "palette", "I", "F", "blue on yellow", "in a corner", "large", "small",
])  # fmt: skip
def test_how_the_picture_is_stored_makes_no_difference(change: object, seven: Image.Image) -> None:
    assert callable(change)
    assert alike(ink(change(seven)).image, ink(seven).image) > 0.95


def test_transparent_drawing_is_read_whatever_lies_under_it(seven: Image.Image) -> None:
    for colour in (0, 255):
        drawing = Image.new("LA", seven.size, (colour, 0))
        drawing.putalpha(ImageOps.invert(seven))
        assert alike(ink(drawing).image, ink(seven).image) > 0.95


def test_camera_held_sideways_is_set_upright(seven: Image.Image) -> None:
    turned = seven.transpose(Image.Transpose.ROTATE_90)
    turned.getexif()[0x0112] = 6  # EXIF: rotate by 270 degrees counter-clockwise to see it right
    assert alike(ink(turned).image, ink(seven).image) > 0.95


@pytest.mark.parametrize("width", [3, 8, 40])
def test_strokes_come_to_mnists_width(width: int) -> None:
    paper = np.full((300, 300), 255, np.uint8)
    paper[40:260, 150 - width // 2 : 150 + width - width // 2] = 0
    stroke = (ink(Image.fromarray(paper)).image / 255).sum(axis=1)
    assert 1.5 < np.median(stroke[stroke > 0]) < 5


def test_two_digits_are_counted_and_the_larger_is_taken(seven: Image.Image) -> None:
    both = Image.new("L", (500, 300), 255)
    both.paste(seven, (0, 0))
    both.paste(seven.resize((160, 240)), (260, 30))
    found = ink(both)
    assert found.digits == 2
    assert alike(found.image, ink(seven).image) > 0.95


@pytest.mark.parametrize("empty", [
    Image.new("L", (300, 200), 255),
    Image.new("RGBA", (300, 200)),
    Image.fromarray(np.random.default_rng(0).normal(200, 5, (200, 300)).clip(0, 255).astype(np.uint8)),
], ids=["white", "transparent", "noise"])  # fmt: skip
def test_empty_paper_is_said(empty: Image.Image) -> None:
    with pytest.raises(NoInk):
        ink(empty)


def test_digits_on_pages_are_read_as_the_plain_ones() -> None:
    """Of any size, place, slant, stroke, colours, shading and noise; a nearest neighbour reads them."""
    train, test = load_digits()

    def plain(image: np.ndarray) -> np.ndarray:
        return ink(Image.fromarray(image)).image

    known = np.stack([plain(image) for image in train.images[:700, 0].numpy()]).reshape(700, -1)
    reader = KNeighborsClassifier(1, metric="cosine").fit(known, train.labels[:700])
    rng = np.random.default_rng(0)
    digits = test.images[:120, 0].numpy()
    pages = np.stack([ink(page(digit, rng)).image for digit in digits]).reshape(len(digits), -1)
    right = reader.predict(pages) == test.labels[:120].numpy()
    reference = reader.predict(np.stack([plain(digit) for digit in digits]).reshape(len(digits), -1))
    assert (reference == test.labels[:120].numpy()).mean() > 0.9
    assert right.mean() > (reference == test.labels[:120].numpy()).mean() - 0.05
