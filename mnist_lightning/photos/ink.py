"""ink(): a picture of one handwritten digit, as MNIST would have it.

MNIST's recipe (LeCun et al., http://yann.lecun.com/exdb/mnist/): the ink is scaled to fit a box of 20×20, keeping its
aspect, and put on 28×28 with its centre of mass in the middle. What comes before that, finding the ink, is for pictures
that MNIST never saw: photos of paper with shadows, ruled lines and noise, drawings on a canvas, pencils and brushes.

H, W = height, width in pixels of the picture as it is worked on. `contrast` (H, W) is how far a pixel is from the paper
around it: 0 = paper, about 1 = as far as black from white.
"""

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from scipy import ndimage

SIDE, BOX = 28, 20  # pixels of MNIST's images, and of the box that the ink fits in
WORK_AREA = 1_200_000  # pixels to work on: a digit of a fortieth of the page still has more than MNIST's 20
FLAT = 0.9  # share of the variance that two grey levels explain, from which on the paper is one level
REACH = (
    0.3  # of the picture's shorter side: what is wider, and reaches the border, is a shadow or a table, not a stroke
)
FAINTEST = 0.06  # contrast of the faintest stroke
THINNEST, THICKEST = 2.1, 4.0  # stroke widths that are left as they are, in pixels of the box; MNIST's: 1.9 to 3.9

Grey = NDArray[np.float32]
Mask = NDArray[np.bool_]


class NoInk(ValueError):
    """The picture shows nothing that could be a digit; the message says why."""


class Ink(NamedTuple):
    image: NDArray[np.uint8]  # (28, 28), 0 = paper, 255 = ink
    digits: int  # how many digits the picture seems to hold; `image` shows the largest


def ink(image: Image.Image) -> Ink:
    """Finds the digit in a picture and brings it into MNIST's form.

    Args:
        image: any mode and size, dark on light or light on dark.

    Raises:
        NoInk: the paper is empty.
    """
    contrast, noise = find_contrast(pixels(image))
    strokes, digits = choose(find_strokes(contrast, noise))
    return Ink(centre(even_out(cut_out(contrast, strokes, noise))), digits)


def pixels(image: Image.Image) -> Grey:
    """The picture upright, opaque, in colour and of a bounded size: (H, W, 3) in [0, 1]."""
    side = math.isqrt(WORK_AREA)
    image.draft(None, (side, side))  # a JPEG decodes at a half, a quarter or an eighth in a fraction of the time
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.nan_to_num(np.asarray(image, np.float32))
        span = float(np.ptp(values)) or 1.0
        image = Image.fromarray(((values - values.min()) * (255 / span)).astype(np.uint8))
    transparent = image.has_transparency_data
    # RGBa: multiplied by alpha, or the hidden colour of transparent pixels would leak into the averages.
    image = image.convert("RGBA").convert("RGBa") if transparent else image.convert("RGB")
    image = image.reduce(max(1, round(math.sqrt(image.width * image.height / WORK_AREA))))
    page = np.asarray(image, np.float32) / np.float32(255)
    return on_paper(page) if transparent else page


def on_paper(values: Grey) -> Grey:
    """(H, W, 3) of a transparent picture's (H, W, 4), multiplied by alpha: a drawing gets paper of the other shade, a
    page with a few holes its own."""
    colours, alpha = values[..., :3], values[..., 3:]
    if alpha.max() == 0:
        raise NoInk("nothing on it: it is transparent all over")
    shown = colours[alpha[..., 0] > 0.5] / alpha[alpha[..., 0] > 0.5]
    shown = shown if len(shown) else colours.reshape(-1, 3) / alpha.max()
    one_colour = float(shown.std(axis=0).max()) < 0.1
    paper: Any = np.median(shown, axis=0)
    if one_colour or alpha.mean() < 0.5:
        paper[:] = float(shown.mean() < 0.5)
    return colours + (1 - alpha) * paper


def find_contrast(page: Grey) -> tuple[Grey, float]:
    """How far each pixel of (H, W, 3) is from the paper around it: (H, W), and its noise as a standard deviation."""
    grey = along_main_colours(page)
    noise = noise_of(grey)
    if min(grey.shape) >= 64 and noise > 0.01:
        grey = ndimage.gaussian_filter(grey, min(1.5, 25 * noise))
    contrast = on_flat_paper(grey)
    if contrast is not None:
        return contrast, noise_of(contrast)
    if ink_is_dark(grey):
        grey = 1 - grey
    reach = max(3, round(REACH * min(grey.shape)))
    # Opening takes away what is lighter than its surroundings and narrower than reach: strokes. Shadows stay, their
    # edges too; a blur or a median would smear those into strokes.
    margin = reach // 2 + 1  # a shadow goes on outside of the picture
    paper = ndimage.grey_opening(np.pad(grey, margin, "edge"), (reach, reach))[margin:-margin, margin:-margin]
    contrast = (grey - paper) / np.maximum(1 - paper, 0.2)  # in a shadow ink differs less from paper
    contrast -= np.median(contrast)  # the opening runs along the bottom of the noise
    noise = 1.4826 * float(np.median(np.abs(contrast)))
    return np.maximum(contrast, 0), noise


def along_main_colours(page: Grey) -> Grey:
    """(H, W) of (H, W, 3): grey along the axis on which the edges differ: yellow on white differs in blue alone."""
    steps = [np.diff(page, axis=axis).reshape(-1, 3) for axis in (0, 1)]
    axis = np.linalg.eigh(sum(step.T @ step for step in steps))[1][:, -1]
    axis = axis if axis.sum() >= 0 else -axis
    return ((page @ axis - np.minimum(axis, 0).sum()) / np.abs(axis).sum()).astype(np.float32)


def noise_of(grey: Grey) -> float:
    """Standard deviation of the noise (after Immerkær, https://doi.org/10.1006/cviu.1996.0060, with a median)."""
    if min(grey.shape) < SIDE:
        return 0.0  # of so few pixels most are edges
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


def on_flat_paper(grey: Grey) -> Grey | None:
    """The contrast (H, W) of a drawing: two levels, one of them in strokes. None for anything else."""
    threshold, explained = otsu(grey)
    light = grey > threshold
    tiny = min(grey.shape) < 16  # too few pixels for anything else
    if explained < (0 if tiny else FLAT) or light.all() or not light.any():
        return None
    edge = np.concatenate([light[0], light[-1], light[:, 0], light[:, -1]]).mean()
    light_paper = edge > 0.5 if abs(edge - 0.5) > 0.15 else light.mean() > 0.5
    strokes = ~light if light_paper else light
    rows, columns = np.nonzero(strokes)
    length = max(np.ptp(rows), np.ptp(columns)) + 1
    if not tiny and 2 * ndimage.distance_transform_edt(np.pad(strokes, 1)).max() > 0.45 * length:
        return None  # a sheet on a table
    paper = grey[~strokes]
    if not tiny and paper.std() > 0.03:
        return None
    level = np.median(paper)
    return np.maximum(level - grey if light_paper else grey - level, 0)


def ink_is_dark(grey: Grey) -> bool:
    """Whether the strokes are darker than the paper, which is what a median over a wide window sees."""
    factor = max(1, round(max(grey.shape) / 48))
    small = np.asarray(Image.fromarray(grey).reduce(factor))
    window = max(3, min(small.shape) // 2)
    rest = small - ndimage.median_filter(small, window, mode="nearest")
    return float((rest * np.abs(rest)).sum()) < 0


def find_strokes(contrast: Grey, noise: float) -> NDArray[np.int32]:
    """Connected pieces of ink, numbered from 1: int (H, W), 0 = paper."""
    floor = max(4 * noise, FAINTEST)
    candidates = contrast[contrast > floor]
    if candidates.size < 3:
        raise NoInk("empty paper: nothing on it stands out")
    threshold, _ = otsu(candidates)
    labels, count = ndimage.label(contrast > max(floor, threshold / 2), np.ones((3, 3)))
    # A stroke may fade, but not all along.
    peaks = ndimage.maximum(contrast, labels, np.arange(count + 1))
    keep = peaks > threshold
    keep[0] = False
    return np.where(keep, np.cumsum(keep), 0)[labels]


def choose(labels: NDArray[np.int32]) -> tuple[Mask, int]:
    """The pieces that make the largest digit, as a mask (H, W), and how many digits there seem to be."""
    labels = bridged(labels)
    height, width = labels.shape
    areas = np.bincount(labels.ravel())
    boxes = ndimage.find_objects(labels)
    pieces = []
    for label, (rows, columns) in enumerate(boxes, 1):
        at_edge = rows.start == 0 or columns.start == 0 or rows.stop == height or columns.stop == width
        pieces.append(Piece([label], rows.start, rows.stop, columns.start, columns.stop, int(areas[label]), at_edge))
    if not pieces:
        raise NoInk("empty paper: nothing on it stands out")
    speck = 0.02 * min(height, width)
    pieces = sorted((piece for piece in pieces if piece.size > speck), key=lambda piece: piece.weight, reverse=True)
    if not pieces:
        raise NoInk("empty paper: nothing on it is larger than a speck")
    pieces = [piece for piece in pieces if piece.size >= 0.12 * pieces[0].size][:60]
    digits: list[Piece] = []
    for piece in pieces:
        mine = [digit for digit in digits if digit.holds(piece)]
        for digit in mine:
            digits.remove(digit)
            piece = piece.joined(digit)
        digits.append(piece)
    digits.sort(key=lambda digit: digit.weight, reverse=True)
    best = digits[0]
    if best.size < 4:
        raise NoInk("empty paper: nothing on it is larger than a speck")
    count = sum(
        digit.height >= 0.5 * best.height and digit.area >= 0.1 * best.area and not digit.at_edge
        for digit in digits[1:]
    )
    return np.isin(labels, best.labels), 1 + count


def bridged(labels: NDArray[np.int32]) -> NDArray[np.int32]:
    """The same pieces, those with a gap of less than a sixteenth of the largest between them as one."""
    largest = max(
        (max(rows.stop - rows.start, columns.stop - columns.start) for rows, columns in ndimage.find_objects(labels)),
        default=0,
    )
    reach = max(1, round(largest / 16)) | 1
    wide = ndimage.maximum_filter(labels > 0, (reach, reach))
    return np.where(labels > 0, ndimage.label(wide, np.ones((3, 3)))[0], 0)


class Piece(NamedTuple):
    labels: list[int]
    top: int
    bottom: int
    left: int
    right: int
    area: int
    at_edge: bool

    @property
    def height(self) -> int:
        return self.bottom - self.top

    @property
    def width(self) -> int:
        return self.right - self.left

    @property
    def size(self) -> int:
        return max(self.height, self.width)

    @property
    def weight(self) -> float:
        return self.size * math.sqrt(self.area) * (0.02 if self.at_edge else 1)

    def joined(self, other: "Piece") -> "Piece":
        return Piece(
            self.labels + other.labels,
            min(self.top, other.top),
            max(self.bottom, other.bottom),
            min(self.left, other.left),
            max(self.right, other.right),
            self.area + other.area,
            self.at_edge and other.at_edge,
        )

    def holds(self, other: "Piece") -> bool:
        """Whether the two are of one digit: one above the other and close, or one too flat for a digit and close."""
        beside = max(self.left, other.left) - min(self.right, other.right)  # the gap; negative where they overlap
        above = max(self.top, other.top) - min(self.bottom, other.bottom)
        size = max(self.size, other.size)
        if self.at_edge != other.at_edge:
            return False
        if min(self.height, other.height) < 0.45 * size:
            return max(beside, above) < 0.3 * size
        return above < 0.2 * size and -beside > 0.3 * min(self.width, other.width)


def cut_out(contrast: Grey, strokes: Mask, noise: float) -> Grey:
    """The digit's own rectangle of the picture: (h, w) in [0, 1], the paper 0, most of the ink 1."""
    near = ndimage.binary_dilation(strokes, np.ones((3, 3)), iterations=max(1, min(strokes.shape) // 400))
    low = min(2 * noise, 0.25 * float(np.median(contrast[strokes])))
    high = float(np.percentile(contrast[strokes], 90))
    soft = np.where(near, np.clip((contrast - low) / (high - low), 0, 1), 0)
    return tight(soft.astype(np.float32))


def tight(soft: Grey) -> Grey:
    rows, columns = np.nonzero(soft > 0.02)
    return soft[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]


def even_out(soft: Grey) -> Grey:
    """Makes a pencil's strokes thicker and a broad brush's thinner, towards MNIST's."""
    fine = 8  # pixels of work for one of the box
    height, width = soft.shape
    scale = BOX * fine / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    large = np.asarray(Image.fromarray(soft).resize(size, Image.Resampling.BICUBIC))
    large = np.pad(large, 2 * fine)
    inside = large > 0.5
    distance = ndimage.distance_transform_edt(inside)
    if not inside.any():
        return soft
    stroke = 4 * float(distance[inside].mean()) / fine
    goal = min(max(stroke, THINNEST), THICKEST)
    if goal == stroke:
        return soft
    distance = distance - ndimage.distance_transform_edt(~inside)
    return tight(np.clip(distance + (goal - stroke) / 2 * fine + 0.5, 0, 1).astype(np.float32))


def centre(soft: Grey) -> NDArray[np.uint8]:
    """The ink (h, w) fitted into 20×20 and put on (28, 28) with its centre of mass in the middle."""
    height, width = soft.shape
    scale = BOX / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    small = np.asarray(
        Image.fromarray(soft).resize(size, Image.Resampling.BOX if scale < 0.5 else Image.Resampling.BICUBIC)
    )
    small = np.clip(small, 0, 1)
    y, x = ndimage.center_of_mass(small)
    top = min(max(round(SIDE / 2 - y), 0), SIDE - small.shape[0])
    left = min(max(round(SIDE / 2 - x), 0), SIDE - small.shape[1])
    image = np.zeros((SIDE, SIDE), np.uint8)
    image[top : top + small.shape[0], left : left + small.shape[1]] = np.rint(small * 255)
    return image
