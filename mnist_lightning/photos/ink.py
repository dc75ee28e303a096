"""ink(): finds the handwritten digit in a picture and gives it the form that MNIST's images have.

The form (LeCun et al., http://yann.lecun.com/exdb/mnist/): the strokes are scaled to fit a box of 20×20, keeping their
aspect ratio, and placed on 28×28 with their centre of mass in the middle. Finding the strokes comes first: photos of
paper have shadows, ruled lines and noise, and people write with pencils, brushes or a mouse.

H, W = height, width of the picture in pixels, after it has been reduced. `contrast` (H, W) is how much a pixel differs
from the background around it: 0 = background, about 1 = as black differs from white.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from scipy import ndimage

from mnist_lightning.photos.frames import frames
from mnist_lightning.photos.reading import NoPicture

SIDE, BOX = 28, 20  # pixels of MNIST's images, and of the box that the strokes fit in
WORK_AREA = 1_200_000  # pixels of the reduced picture: a digit a fortieth of the page high still has more than 20
TWO_LEVELS = 0.9  # a drawing: two grey levels explain at least this share of the variance
WIDEST = 0.3  # of the picture's shorter side: anything wider is a shadow or a table, not a stroke
FAINTEST = 0.06  # contrast of the faintest stroke
THINNEST, THICKEST = 2.1, 4.0  # stroke widths left as they are, in pixels of the box; MNIST's are 1.9 to 3.9
NEIGHBOURS = np.ones((3, 3))  # pixels that touch at a corner belong to one stroke

Grey = NDArray[np.float32]
Mask = NDArray[np.bool_]


class NoInk(NoPicture):
    """The picture shows nothing that could be a digit; the message says why."""


class Ink(NamedTuple):
    image: NDArray[np.uint8]  # (28, 28), 0 = background, 255 = strokes
    digits: int  # how many digits the picture seems to hold; `image` shows the largest


def ink(image: Image.Image) -> Ink:
    """Finds the digit in a picture of any mode and size, dark on light or light on dark.

    Raises:
        NoInk: there are no strokes.
    """
    contrast, noise = find_contrast(pixels(image))
    contrast = without_frames(contrast, noise)
    strokes, digits = largest_digit(find_strokes(contrast, noise))
    return Ink(centre(adjust_thickness(cut_out(contrast, strokes, noise))), digits)


def pixels(image: Image.Image) -> Grey:
    """The picture upright, opaque, in colour and reduced: (H, W, 3) in [0, 1]."""
    side = math.isqrt(WORK_AREA)
    image.draft(None, (side, side))  # a JPEG is decoded at a half, a quarter or an eighth of its size, much faster
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.nan_to_num(np.asarray(image, np.float32))
        span = float(np.ptp(values)) or 1.0
        image = Image.fromarray(((values - values.min()) * (255 / span)).astype(np.uint8))
    transparent = image.has_transparency_data
    # RGBa is multiplied by alpha: otherwise the hidden colours of transparent pixels would enter the averages.
    image = image.convert("RGBA").convert("RGBa") if transparent else image.convert("RGB")
    image = image.reduce(max(1, round(math.sqrt(image.width * image.height / WORK_AREA))))
    values = np.asarray(image, np.float32) / np.float32(255)
    return fill_background(values) if transparent else values


def fill_background(values: Grey) -> Grey:
    """(H, W, 3) from (H, W, 4) multiplied by alpha. A drawing gets a background of the opposite shade; a page with a
    few holes gets its own colour."""
    colours, alpha = values[..., :3], values[..., 3:]
    if alpha.max() == 0:
        raise NoInk("no digit: the picture is transparent all over")
    opaque = alpha[..., 0] > 0.5
    shown = colours[opaque] / alpha[opaque] if opaque.any() else colours.reshape(-1, 3) / alpha.max()
    background: Any = np.median(shown, axis=0)
    if alpha.mean() < 0.5 or shown.std(axis=0).max() < 0.1:
        background[:] = float(shown.mean() < 0.5)
    return colours + (1 - alpha) * background


def find_contrast(picture: Grey) -> tuple[Grey, float]:
    """The contrast (H, W) of a picture (H, W, 3), and the standard deviation of its noise."""
    grey = inside_edge(to_grey(picture))
    noise = noise_of(grey)
    if min(grey.shape) >= 64 and noise > 0.01:
        grey = ndimage.gaussian_filter(grey, min(1.5, 25 * noise))
    drawn = contrast_of_drawing(grey)
    if drawn is not None:
        return drawn, noise_of(drawn)
    if strokes_are_dark(grey):
        grey = 1 - grey
    # A grey opening removes whatever is light and narrow: the strokes. It keeps shadows with their edges, which a blur
    # or a median would smear, so that they would look like strokes.
    window = max(3, round(WIDEST * min(grey.shape)))
    margin = window // 2 + 1  # a shadow continues outside the picture
    padded = np.pad(grey, margin, "edge")
    background = ndimage.grey_opening(padded, (window, window))[margin:-margin, margin:-margin]
    contrast = (grey - background) / np.maximum(1 - background, 0.2)  # in a shadow strokes differ less
    contrast -= np.median(contrast)  # the opening follows the lower side of the noise
    return np.maximum(contrast, 0), 1.4826 * float(np.median(np.abs(contrast)))


def to_grey(picture: Grey) -> Grey:
    """(H, W) from (H, W, 3), along the colour axis in which the edges differ most: yellow on white differs in blue."""
    steps = [np.diff(picture, axis=axis).reshape(-1, 3) for axis in (0, 1)]
    axis = np.linalg.eigh(sum(step.T @ step for step in steps))[1][:, -1]
    axis = axis if axis.sum() >= 0 else -axis
    return ((picture @ axis - np.minimum(axis, 0).sum()) / np.abs(axis).sum()).astype(np.float32)


def inside_edge(grey: Grey) -> Grey:
    """What a frame along all four edges of the picture surrounds; without such a frame, the picture."""
    depth = min(grey.shape) // 12
    if depth < 2 or max(grey.shape) > 2 * min(grey.shape):  # a narrow picture may be all stroke between two edges
        return grey
    widths, steps = [], []
    for side in range(4):  # top, right, bottom, left
        rows = np.rot90(grey, side)[: depth + 1]
        near_edge = (np.abs(rows - rows[0]) < np.abs(rows - rows[-1])).mean(1) > 0.5
        widths.append(int(near_edge.argmin()))
        steps.append(rows[-1] - rows[0])
    if max(min((sign * step > 0.1).mean() for step in steps) for sign in (-1, 1)) < 0.8:
        return grey
    top, right, bottom, left = widths
    return grey[top + 1 : -bottom - 1, left + 1 : -right - 1]


def noise_of(grey: Grey) -> float:
    """Standard deviation of the noise (after Immerkær, https://doi.org/10.1006/cviu.1996.0060, with a median)."""
    if min(grey.shape) < SIDE:
        return 0.0  # in so small a picture most pixels are edges
    mask = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], np.float32)
    return float(np.median(np.abs(ndimage.convolve(grey, mask)))) / (6 * 0.6745)


def otsu(values: Grey) -> tuple[float, float]:
    """Otsu's threshold (https://doi.org/10.1109/TSMC.1979.4310076) and the share of the variance that it explains."""
    counts, edges = np.histogram(values, 256)
    middles = (edges[:-1] + edges[1:]) / 2
    below = counts.cumsum()
    above = below[-1] - below
    sums = (counts * middles).cumsum()
    with np.errstate(divide="ignore", invalid="ignore"):
        between = np.nan_to_num(below * above * (sums / below - (sums[-1] - sums) / above) ** 2)
    best = int(between.argmax())
    total = float(values.var()) * below[-1] ** 2
    return float(edges[best + 1]), float(between[best]) / total if total else 0.0


def contrast_of_drawing(grey: Grey) -> Grey | None:
    """The contrast (H, W) where the picture has one even background with strokes on it, else None."""
    threshold, explained = otsu(grey)
    light = grey > threshold
    tiny = min(grey.shape) < 16  # too few pixels for shadows
    if light.all() or not light.any() or not (tiny or explained >= TWO_LEVELS):
        return None
    border = np.concatenate([light[0], light[-1], light[:, 0], light[:, -1]]).mean()
    light_background = border > 0.5 if abs(border - 0.5) > 0.15 else light.mean() > 0.5
    strokes = ~light if light_background else light
    background = grey[~strokes]
    if not tiny:
        length = max(np.ptp(positions) for positions in np.nonzero(strokes)) + 1
        thickness = 2 * ndimage.distance_transform_edt(np.pad(strokes, 1)).max()
        if thickness > 0.45 * length or background.std() > 0.03:  # a sheet on a table; a photo
            return None
    level = np.median(background)
    return np.maximum(level - grey if light_background else grey - level, 0)


def strokes_are_dark(grey: Grey) -> bool:
    """Whether the strokes are darker than the background, for which a median over a wide window stands."""
    small = np.asarray(Image.fromarray(grey).reduce(max(1, round(max(grey.shape) / 48))))
    difference = small - ndimage.median_filter(small, max(3, min(small.shape) // 2), mode="nearest")
    return float((difference * np.abs(difference)).sum()) < 0


def find_strokes(contrast: Grey, noise: float) -> NDArray[np.int32]:
    """Connected strokes, numbered from 1: int (H, W), 0 = background."""
    floor = max(4 * noise, FAINTEST)
    candidates = contrast[contrast > floor]
    if candidates.size < 3:
        raise NoInk("no digit: nothing stands out from the background")
    threshold, _ = otsu(candidates)
    labels, count = ndimage.label(contrast > max(floor, threshold / 2), NEIGHBOURS)
    strong = ndimage.maximum(contrast, labels, np.arange(1, count + 1)) > threshold  # a stroke may fade in parts only
    strokes = np.concatenate([[False], strong])[labels]
    boxes = [box for box, kept in zip(ndimage.find_objects(labels), strong, strict=True) if kept]
    largest = max(side.stop - side.start for box in boxes for side in box)
    # The pen may skip: gaps of less than a sixteenth of the largest stroke are bridged.
    bridged = ndimage.maximum_filter(strokes, round(largest / 16) | 1)
    return np.where(strokes, ndimage.label(bridged, NEIGHBOURS)[0], 0)


def without_frames(contrast: Grey, noise: float) -> Grey:
    """The contrast (H, W) without printed frames and ruled lines."""
    for _ in range(4):  # a box in a box, a cell among cells
        strokes = find_strokes(contrast, noise) > 0
        for frame in frames(strokes):
            rest = np.where(frame.pixels, 0, contrast)
            try:
                digit, count = largest_digit(find_strokes(rest, noise))
            except NoInk:
                continue
            faint = np.median(rest[digit]) < 0.2 * np.median(contrast[frame.pixels & strokes])
            if frame.goes_with(digit, count) and not faint:
                contrast = rest
                break
        else:
            break
    return contrast


@dataclass(eq=False)
class Piece:
    """One or more strokes and the box around them."""

    labels: list[int]
    start: NDArray[np.int64]  # top, left
    stop: NDArray[np.int64]  # bottom, right
    area: int
    at_edge: bool  # of the picture: cut off, or no stroke but the edge of a table

    def __post_init__(self) -> None:
        self.height, self.width = self.stop - self.start
        self.size = max(self.height, self.width)
        self.weight = self.size * math.sqrt(self.area) * (0.02 if self.at_edge else 1)

    def joined(self, other: "Piece") -> "Piece":
        start, stop = np.minimum(self.start, other.start), np.maximum(self.stop, other.stop)
        return Piece(
            self.labels + other.labels, start, stop, self.area + other.area, self.at_edge and other.at_edge
        )

    def belongs_to(self, other: "Piece") -> bool:
        """Whether both are parts of one digit: close, and one above the other or one too flat to be a digit."""
        if self.at_edge != other.at_edge:
            return False
        # The gaps between the boxes, negative where they overlap.
        down, across = np.maximum(self.start, other.start) - np.minimum(self.stop, other.stop)
        size = max(self.size, other.size)
        if min(self.height, other.height) < 0.45 * size:
            return max(across, down) < 0.3 * size
        return down < 0.2 * size and -across > 0.3 * min(self.width, other.width)


def largest_digit(labels: NDArray[np.int32]) -> tuple[Mask, int]:
    """The strokes of the largest digit, as a mask (H, W), and how many digits there seem to be."""
    areas = np.bincount(labels.ravel())
    pieces = []
    for label, box in enumerate(ndimage.find_objects(labels), 1):
        start, stop = np.array([(side.start, side.stop) for side in box]).T
        at_edge = bool((start == 0).any() or (stop == labels.shape).any())
        pieces.append(Piece([label], start, stop, int(areas[label]), at_edge))
    speck = 0.02 * min(labels.shape)
    pieces = sorted((piece for piece in pieces if piece.size > speck), key=lambda piece: piece.weight, reverse=True)
    digits: list[Piece] = []
    for piece in [piece for piece in pieces if piece.size >= 0.12 * pieces[0].size][:60]:
        for digit in [digit for digit in digits if piece.belongs_to(digit)]:
            digits.remove(digit)
            piece = piece.joined(digit)
        digits.append(piece)
    best = max(digits, key=lambda digit: digit.weight, default=None)
    if best is None or best.size < 4:
        raise NoInk("no digit: nothing is larger than a speck")
    others = [digit for digit in digits if digit is not best and not digit.at_edge]
    count = 1 + sum(digit.height >= 0.5 * best.height and digit.area >= 0.1 * best.area for digit in others)
    return np.isin(labels, best.labels), int(count)


def cut_out(contrast: Grey, strokes: Mask, noise: float) -> Grey:
    """The digit's own rectangle of the picture: (h, w) in [0, 1], the background 0, most of the strokes 1."""
    near = ndimage.binary_dilation(strokes, NEIGHBOURS, iterations=max(1, min(strokes.shape) // 400))
    low = min(2 * noise, 0.25 * float(np.median(contrast[strokes])))
    high = float(np.percentile(contrast[strokes], 90))
    return cropped(np.where(near, np.clip((contrast - low) / (high - low), 0, 1), 0))


def cropped(digit: NDArray[Any]) -> Grey:
    digit = digit.astype(np.float32)
    rows, columns = np.nonzero(digit > 0.02)
    return digit[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]


def scaled(digit: Grey, side: int, resampling: Image.Resampling) -> Grey:
    """(h, w) brought to `side` pixels on its longer side."""
    height, width = digit.shape
    scale = side / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(Image.fromarray(digit).resize(size, resampling))


def adjust_thickness(digit: Grey) -> Grey:
    """Makes a pencil's strokes thicker and a broad brush's thinner, towards MNIST's."""
    fine = 8  # pixels worked on for each pixel of the box
    inside = np.pad(scaled(digit, BOX * fine, Image.Resampling.BICUBIC), 2 * fine) > 0.5
    if not inside.any():
        return digit
    distance = ndimage.distance_transform_edt(inside)
    thickness = 4 * float(distance[inside].mean()) / fine
    goal = min(max(thickness, THINNEST), THICKEST)
    if goal == thickness:
        return digit
    distance -= ndimage.distance_transform_edt(~inside)
    return cropped(np.clip(distance + (goal - thickness) / 2 * fine + 0.5, 0, 1))


def centre(digit: Grey) -> NDArray[np.uint8]:
    """The digit (h, w) scaled to fit 20×20 and placed on (28, 28) with its centre of mass in the middle."""
    reduces = max(digit.shape) > 2 * BOX
    small = np.clip(scaled(digit, BOX, Image.Resampling.BOX if reduces else Image.Resampling.BICUBIC), 0, 1)
    y, x = ndimage.center_of_mass(small)
    height, width = small.shape
    top = min(max(round(SIDE / 2 - y), 0), SIDE - height)
    left = min(max(round(SIDE / 2 - x), 0), SIDE - width)
    image = np.zeros((SIDE, SIDE), np.uint8)
    image[top : top + height, left : left + width] = np.rint(small * 255)
    return image
