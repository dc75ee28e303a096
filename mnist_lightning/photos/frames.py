"""frames(): what could be the cell of a form, a box or a ruled line around a digit, not a stroke of it.

A 0 is a ring and a 1 is a line: nothing is a frame on its own account. Each find is to be erased on trial, and says of
the digit that then remains whether it goes with it.

H, W = height, width of the picture in pixels; h, w = those of the part with strokes, reduced.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Mask = NDArray[np.bool_]

TOP, RIGHT, BOTTOM, LEFT = range(4)
REDUCED = 128  # pixels of the longer side on which lines are looked for
SLOPE = 0.25  # of a line, at most: a picture held crookedly by 14 degrees
LONGER = 1.15  # a frame's lines are longer than the digit by this factor at least
SMALLEST = 0.2  # of the frame's size: anything less inside is a speck
NEIGHBOURS = np.ones((3, 3))


@dataclass(frozen=True, eq=False)
class Rings:
    """Closed strokes of any form with room inside: one, or the cells of a table."""

    pixels: Mask  # (H, W)
    inside: Mask  # (H, W)

    def goes_with(self, digit: Mask, count: int) -> bool:
        """Whether the digit is inside and large enough; in a table of cells there are many, smaller ones."""
        return bool(self.inside[digit].mean() > 0.9) and size(digit) * count > SMALLEST * size(self.pixels)


@dataclass(frozen=True, eq=False)
class Line:
    """A nearly straight line along one side of all strokes."""

    pixels: Mask  # (H, W)
    side: int
    start: int
    stop: int
    cover: float  # the share of its length that has ink

    def passes(self, digit: Mask, margin: float) -> bool:
        """Whether the line goes on beyond the digit at both ends, by this share of its length."""
        where = np.nonzero(digit.any(1 - self.axis))[0]
        margin *= self.length
        return bool(self.start + margin <= where[0] and where[-1] <= self.stop - margin)

    @property
    def axis(self) -> int:
        """Along which it runs: 0 = down, 1 = across."""
        return 1 - self.side % 2

    @property
    def length(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, eq=False)
class Lines:
    """Some of the lines along the four sides."""

    lines: tuple[Line, ...]
    labels: NDArray[np.int32]  # (H, W): strokes that are connected have the same
    pixels: Mask  # (H, W)

    def goes_with(self, digit: Mask, count: int) -> bool:
        """Whether the lines are longer than the digit and go on beyond it, and aren't strokes of it."""
        extent = size(digit)
        if not all(LONGER * extent < line.length < extent * count / SMALLEST for line in self.lines):
            return False
        near = widened(widened(digit)) & np.isin(self.labels, np.unique(self.labels[digit]))
        touched = [line for line in self.lines if (near & line.pixels).any()]
        if not all(line.passes(digit, 0.1 if line in touched else 0.02) for line in self.lines):
            return False
        if len(self.lines) == 4:
            return True
        across = [line for line in self.lines if line.axis == 1]
        if not touched:
            return len(self.lines) > 1 or bool(across) or self.lines[0].length > 1.5 * extent  # a 1 beside a digit
        if len(touched) > 1 or any(line.cover < 0.8 for line in touched):
            return False
        # A 7 has its bar on top, and a 4 its line on the right.
        return len(self.lines) == 3 or touched[0].side == BOTTOM and 1.3 * extent < touched[0].length < 2.5 * extent


def frames(strokes: Mask) -> Iterator[Rings | Lines]:
    """What could be a frame, the likeliest first."""
    labels, _ = ndimage.label(strokes, NEIGHBOURS)
    boxes = ndimage.find_objects(labels)
    sizes = [max(side.stop - side.start for side in box) for box in boxes]
    rings, inside = np.zeros_like(strokes), np.zeros_like(strokes)
    for label, (box, length) in enumerate(zip(boxes, sizes, strict=True), 1):
        if length < 0.5 * max(sizes):
            continue
        ring = labels[box] == label
        hole = ndimage.binary_fill_holes(ring) & ~ring
        holds = strokes[box][hole].any() or length == max(sizes)  # or something faint
        if holds and hole.sum() > 0.2 * ring.sum():
            rings[box] |= ring
            inside[box] |= hole
    if rings.any():
        yield Rings(widened(rings), inside)
    lines = [line for side in range(4) if (line := line_along(strokes, side)) is not None]
    for count in range(len(lines), 0, -1):
        for some in combinations(lines, count):
            yield Lines(some, labels, erased(strokes, some))


def line_along(strokes: Mask, side: int) -> Line | None:
    """The straightest line in the third of the strokes' box next to a side (TOP, RIGHT, BOTTOM or LEFT)."""
    turned = np.rot90(strokes, side)
    rows, columns = np.nonzero(turned)
    top, left = rows.min(), columns.min()
    part = turned[top : rows.max() + 1, left : columns.max() + 1]
    step = -(-max(part.shape) // REDUCED)
    height, width = (-(-length // step) for length in part.shape)
    padded = np.pad(part, ((0, height * step - part.shape[0]), (0, width * step - part.shape[1])))
    small = np.asarray(padded.reshape(height, step, width, step).any((1, 3)))  # (h, w): thin lines stay whole

    x = np.arange(width)
    best, found = 0, None
    steepest = round(SLOPE * width)
    for rise in range(-steepest, steepest + 1):
        shift = np.rint(rise * (x / max(width - 1, 1) - 0.5)).astype(int)
        y = np.arange(height)[:, None] + shift
        straight = small[y.clip(0, height - 1), x] & (y >= 0) & (y < height)
        counts = straight.sum(1)
        row = int(counts[: height // 3 + 1].argmax())
        if counts[row] > best:
            best, found = counts[row], (straight, counts, row, shift)
    if found is None:
        return None
    straight, counts, row, shift = found
    first = last = row
    while first > 0 and counts[first - 1] > 0.4 * best:
        first -= 1
    while last < height - 1 and counts[last + 1] > 0.4 * best:
        last += 1
    inked = np.nonzero(straight[first : last + 1].any(0))[0]
    start, stop = inked[0], inked[-1] + 1
    cover = best / (stop - start)
    if stop - start < 0.5 * width or cover < 0.6 or last - first + 1 > 0.15 * (stop - start) + 1:
        return None
    band = np.zeros_like(small)
    for row in range(max(first - 1, 0), last + 2):
        y = row + shift[start:stop]
        kept = (y >= 0) & (y < height)
        band[y[kept], x[start:stop][kept]] = True
    large = np.zeros_like(turned)
    band = band.repeat(step, 0).repeat(step, 1)[: part.shape[0], : part.shape[1]]
    large[top : top + part.shape[0], left : left + part.shape[1]] = band
    pixels = np.rot90(large, -side)
    along = np.nonzero((pixels & strokes).any(side % 2))[0]
    return Line(pixels, side, int(along[0]), int(along[-1]) + 1, float(cover))


def widened(mask: Mask) -> Mask:
    """With the soft edges of what was drawn."""
    return ndimage.binary_dilation(mask, NEIGHBOURS, iterations=max(1, min(mask.shape) // 100))


def erased(strokes: Mask, lines: tuple[Line, ...]) -> Mask:
    """The lines' pixels, and what remains along them: corners, and bits of lines that aren't quite straight."""
    pixels = widened(np.logical_or.reduce([line.pixels for line in lines]))
    along = round(0.06 * min(line.length for line in lines))
    away = ~ndimage.maximum_filter(pixels, 2 * along + 1)
    labels, count = ndimage.label(strokes & ~pixels, NEIGHBOURS)
    bits = np.asarray(ndimage.maximum(away, labels, np.arange(count + 1))) == 0
    bits[0] = False
    return pixels | widened(bits[labels])


def size(mask: Mask) -> int:
    return max(int(np.ptp(positions)) + 1 for positions in np.nonzero(mask))
