"""A folder of PNGs, one subfolder a class: letters in colour, each drawn at a place and in a size of its own."""

import random
import string
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

SIDE = 40  # pixels


def write_letters(folder: Path, classes: int = 26, train: int = 8, test: int = 2) -> Path:
    """Writes `train` + `test` images of each of the first `classes` letters; returns the folder."""
    draw = random.Random(0)
    for letter in string.ascii_uppercase[:classes]:
        for number in range(train + test):
            path = folder / ("train" if number < train else "test") / letter / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            paper = Image.new("RGB", (SIDE, SIDE), "white")
            font = ImageFont.load_default(size=draw.randint(24, 30))
            colour = (draw.randint(0, 120), draw.randint(0, 120), draw.randint(0, 120))
            place = (SIDE / 2 + draw.randint(-3, 3), SIDE / 2 + draw.randint(-3, 3))
            ImageDraw.Draw(paper).text(place, letter, colour, font, anchor="mm")
            paper.save(path)
    return folder
