"""Synthetic pages: a 28×28 digit as somebody might have drawn, photographed and saved it."""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage

FRAMES = ("box", "gaps", "edge", "circle", "corner", "rails", "posts", "underline")
FINE = 10  # pixels of the redrawn digit for one of the 28


def page(digit: NDArray[np.uint8], rng: np.random.Generator, side: int | None = None) -> Image.Image:
    """The digit (28, 28) at a random size and place, of random stroke, slant, colours, shading and noise.

    Args:
        side: pixels of the page's longer side; None draws one from 40 to 1600, evenly by its logarithm.
    """
    longer = side or int(np.exp(rng.uniform(np.log(40), np.log(1600))))
    shorter = int(longer * rng.uniform(0.6, 1))
    height, width = (longer, shorter) if rng.random() < 0.5 else (shorter, longer)
    # At least MNIST's 20 pixels, on pages that have room for them.
    size = min(max(int(min(height, width) * rng.uniform(0.15, 0.85)), 20), int(0.85 * min(height, width)))
    drawn = redraw(digit, size, rng.uniform(1.0, 4.5), rng.uniform(-10, 10))
    top = rng.integers(0, max(1, height - drawn.shape[0] + 1))
    left = rng.integers(0, max(1, width - drawn.shape[1] + 1))
    ink = np.zeros((height, width))
    drawn = drawn[: height - top, : width - left]
    ink[top : top + drawn.shape[0], left : left + drawn.shape[1]] = drawn
    return photograph(ink, rng)


def in_frame(drawn: Image.Image, frame: str, rng: np.random.Generator) -> Image.Image:
    """A square picture of a digit, dark on white, with a printed frame: of any width, colour and tilt.

    Args:
        frame: box, gaps, edge (of the picture), circle, corner, rails, posts or underline.
    """
    side, fine = drawn.width, 4
    margin = 0 if frame == "edge" else rng.uniform(0.03, 0.06) * side * fine
    width = round(rng.choice([0.01, 0.02, 0.04]) * side * fine)
    low, high = margin + width / 2, side * fine - margin - width / 2
    sides = {"top": (low, low, high, low), "bottom": (low, high, high, high)}
    sides |= {"left": (low, low, low, high), "right": (high, low, high, high)}
    some = {"corner": ["bottom", "left"], "rails": ["top", "bottom"], "posts": ["left", "right"]}
    some |= {"underline": ["bottom"], "circle": []}
    ink = Image.new("L", (side * fine, side * fine))
    draw = ImageDraw.Draw(ink)
    for name in some.get(frame, sides):
        draw.line(sides[name], 255, width)
    if frame == "circle":
        draw.ellipse((low, low, high, high), outline=255, width=width)
    if frame == "gaps":
        for at in rng.uniform(0.2, 0.7, 2) * side * fine:
            draw.rectangle((at, 0, at + 0.1 * side * fine, side * fine / 8), fill=0)
            draw.rectangle((0, at, side * fine / 8, at + 0.1 * side * fine), fill=0)
    tilt = 0 if frame == "edge" else rng.uniform(-3, 3)
    ink = ink.rotate(tilt, Image.Resampling.BICUBIC).resize(drawn.size, Image.Resampling.BOX)
    colour = [(0, 0, 0), (120, 120, 120), (200, 30, 30), (40, 60, 200), (150, 190, 230)][rng.integers(5)]
    picture = drawn.convert("RGB")
    picture.paste(colour, mask=ink)
    return picture


def redraw(digit: NDArray[np.uint8], size: int, stroke: float, angle: float) -> NDArray[np.float64]:
    """The digit's ink, 0 to 1, in its bounding box of `size` pixels a side, turned by `angle` degrees.

    Args:
        stroke: its width, in pixels of MNIST's box of 20.
    """
    large = Image.fromarray(digit).resize((28 * FINE, 28 * FINE), Image.Resampling.BICUBIC)
    soft = ndimage.gaussian_filter(np.asarray(large.rotate(angle, Image.Resampling.BICUBIC), float) / 255, FINE / 4)
    inside = np.pad(soft, 3 * FINE) > 0.45
    distance = ndimage.distance_transform_edt(inside)
    width = 4 * distance[inside].mean() / FINE
    if stroke < width:  # along the middle of the old stroke: eroding it would tear it where it is thin
        middle = inside & (distance > 0.93 * ndimage.grey_dilation(distance, (5, 5))) & (distance > FINE / 3)
        inside = ndimage.distance_transform_edt(~middle) < stroke / 2 * FINE
    else:
        inside = distance - ndimage.distance_transform_edt(~inside) > -(stroke - width) / 2 * FINE
    rows, columns = np.nonzero(inside)
    box = inside[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    scale = size / max(box.shape)
    shape = max(1, round(box.shape[1] * scale)), max(1, round(box.shape[0] * scale))
    bilevel = Image.fromarray((box * 255).astype(np.uint8))
    return np.clip(np.asarray(bilevel.resize(shape, Image.Resampling.BICUBIC), float) / 255, 0, 1)


def photograph(ink: NDArray[np.float64], rng: np.random.Generator) -> Image.Image:
    """Ink (H, W) on paper of another colour, in uneven light, with noise, sometimes as JPEG."""
    while True:
        paper, pen = rng.uniform(0, 1, (2, 3)) * 0.25 + rng.choice([0, 0.75], (2, 1))
        if abs(paper.mean() - pen.mean()) > 0.3:
            break
    pen = paper + (pen - paper) * rng.uniform(0.5, 1)
    picture = paper + ink[..., None] * (pen - paper)
    picture *= shading(ink.shape, rng)[..., None]
    picture += rng.normal(0, rng.uniform(0, 0.06), picture.shape)
    image = Image.fromarray((np.clip(picture, 0, 1) * 255).round().astype(np.uint8))
    if rng.random() < 0.3:
        image = image.convert("L")
    if rng.random() < 0.5:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=int(rng.integers(50, 96)))
        image = Image.open(file)
    return image


def shading(shape: tuple[int, ...], rng: np.random.Generator) -> NDArray[np.float64]:
    """Light (H, W), at most 1: a slope, darker corners, and the soft edge of a shadow."""
    y, x = np.meshgrid(*(np.linspace(-1, 1, length) for length in shape), indexing="ij")
    angle = rng.uniform(0, 2 * np.pi)
    along = x * np.cos(angle) + y * np.sin(angle)
    light = 1 - rng.uniform(0, 0.2) * (1 + along) - rng.uniform(0, 0.1) * (x**2 + y**2)
    if rng.random() < 0.4:
        angle = rng.uniform(0, 2 * np.pi)
        across = x * np.cos(angle) + y * np.sin(angle) - rng.uniform(-0.8, 0.8)
        light *= 1 - rng.uniform(0, 0.4) / (1 + np.exp(-across / rng.uniform(0.01, 0.2)))
    return light
