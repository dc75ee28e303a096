"""A picture of a digit becomes what MNIST would have made of it, whatever the picture is like."""

from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageOps
from scipy import ndimage
from sklearn.neighbors import KNeighborsClassifier

from benchmarks.pages import FRAMES, in_frame, page, redraw
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


def alike(a: Image.Image, b: Image.Image) -> bool:
    return float(np.corrcoef(*(ink(picture).image.ravel().astype(float) for picture in (a, b)))[0, 1]) > 0.95


def test_strokes_fit_the_box_of_20_and_are_centred_by_mass(seven: Image.Image) -> None:
    image = ink(seven).image
    assert image.shape == (28, 28) and image.dtype == np.uint8
    rows, columns = np.nonzero(image > 20)
    assert max(np.ptp(rows), np.ptp(columns)) + 1 == pytest.approx(20, abs=1)
    assert ndimage.center_of_mass(image) == pytest.approx((14, 14), abs=0.51)  # as MNIST's: 13.50 to 14.50
    assert image[0, 0] == 0 and image.max() > 240  # 0 = background, 255 = strokes


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
def test_how_the_picture_is_stored_makes_no_difference(
    change: Callable[[Image.Image], Image.Image], seven: Image.Image
) -> None:
    assert alike(change(seven), seven)


@pytest.mark.parametrize("colour", [0, 255])
def test_transparent_drawing_is_found_whatever_colour_is_hidden(colour: int, seven: Image.Image) -> None:
    drawing = Image.new("LA", seven.size, (colour, 0))
    drawing.putalpha(ImageOps.invert(seven))
    assert alike(drawing, seven)


def test_camera_held_sideways_is_set_upright(seven: Image.Image) -> None:
    turned = seven.transpose(Image.Transpose.ROTATE_90)
    turned.getexif()[0x0112] = 6  # EXIF: rotate by 270 degrees counter-clockwise to see it right
    assert alike(turned, seven)


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
    assert ink(both).digits == 2 and alike(both, seven)


@pytest.mark.parametrize("empty", [
    Image.new("L", (300, 200), 255),
    Image.new("RGBA", (300, 200)),
    Image.fromarray(np.random.default_rng(0).normal(200, 5, (200, 300)).clip(0, 255).astype(np.uint8)),
], ids=["white", "transparent", "noise"])  # fmt: skip
def test_picture_without_strokes_is_refused(empty: Image.Image) -> None:
    with pytest.raises(NoInk, match="no digit"):
        ink(empty)


def test_digits_on_pages_are_classified_as_the_plain_ones() -> None:
    """Of any size, place, slant, stroke, colours, shading and noise; by a nearest neighbour."""
    train, test = load_digits()
    rng = np.random.default_rng(0)
    digits, labels = test.images[:50, 0].numpy(), test.labels[:50].numpy()

    def found(pictures: list[Image.Image]) -> np.ndarray:
        return np.stack([ink(picture).image for picture in pictures]).reshape(len(pictures), -1)

    known = found([Image.fromarray(image) for image in train.images[:300, 0].numpy()])
    classifier = KNeighborsClassifier(1, metric="cosine").fit(known, train.labels[:300])
    plain = classifier.score(found([Image.fromarray(digit) for digit in digits]), labels)
    assert plain > 0.9
    assert classifier.score(found([page(digit, rng) for digit in digits]), labels) > plain - 0.05


def drawn(digit: np.ndarray, share: float = 0.6) -> Image.Image:
    """A digit, dark on white, in the middle of 160×160."""
    strokes = redraw(digit, round(160 * share), 2.5, 0)
    paper = Image.new("L", (160, 160), 255)
    height, width = strokes.shape
    paper.paste(0, ((160 - width) // 2, (160 - height) // 2), Image.fromarray((255 * strokes).astype("u1")))
    return paper


def differs(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(float) - b).mean())


@pytest.mark.parametrize("frame", FRAMES)
def test_digit_in_a_frame_is_found_as_without_it(frame: str) -> None:
    """Of any width, colour and tilt; another digit differs by 50."""
    rng = np.random.default_rng(0)
    digits = [drawn(digit) for digit in load_digits().test.images[:20, 0].numpy()]
    apart = [differs(ink(in_frame(digit, frame, rng)).image, ink(digit).image) for digit in digits]
    assert sum(difference < 8 for difference in apart) >= 19


@pytest.mark.parametrize("margin", [0, 1, 40])
def test_strokes_along_the_edge_are_no_frame(margin: int) -> None:
    apart = []
    for digit in load_digits().test.images[:40, 0].numpy():
        tight = Image.fromarray((255 * (1 - np.pad(redraw(digit, 120, 2.5, 0), margin))).astype("u1"))
        apart.append(differs(ink(tight).image, ink(ImageOps.expand(tight, 60, 255)).image))
    assert sum(difference < 8 for difference in apart) >= 33  # cut so close, some 8s leave no background


def test_long_base_of_a_two_is_no_line_under_it() -> None:
    """A ruled line goes on beyond the digit at both ends; this begins where the 2 does."""
    picture = Image.new("L", (300, 240), 255)
    draw = ImageDraw.Draw(picture)
    draw.line([(60, 60), (120, 60), (120, 120), (62, 180)], 0, 8, joint="curve")
    draw.line([(60, 180), (240, 180)], 0, 8)
    rows, columns = np.nonzero(ink(picture).image > 40)
    assert np.ptp(columns) > np.ptp(rows) + 3


def test_ring_with_nothing_inside_is_a_zero(seven: Image.Image) -> None:
    ring = Image.new("L", (300, 300), 255)
    ImageDraw.Draw(ring).ellipse((60, 20, 240, 280), outline=0, width=12)
    ImageDraw.Draw(ring).ellipse((140, 140, 150, 150), fill=0)  # a speck
    columns = np.nonzero(ink(ring).image.max(axis=0) > 128)[0]
    assert np.ptp(columns) > 10 and ink(ring).image[14, 14] < 128


def test_digits_in_a_table_of_cells_are_counted() -> None:
    table = Image.new("L", (480, 320), 255)
    for i, digit in enumerate(load_digits().test.images[:6, 0].numpy()):
        cell = ImageOps.expand(drawn(digit).crop((2, 2, 158, 158)), 2, 0)
        table.paste(cell, (160 * (i % 3), 160 * (i // 3)))
    assert ink(table).digits == 6
