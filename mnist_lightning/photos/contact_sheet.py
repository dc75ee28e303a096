"""The contact sheet: every picture as the network sees it, enlarged, with a caption below."""

import math
from pathlib import Path
from typing import IO

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from mnist_lightning.errors import UserError

SIDE, CAPTION, GAP = 112, 32, 8  # pixels: a picture's side, the height of the caption, the space between pictures
COLUMNS, LONGEST = 8, 16  # pictures in a row; characters of a caption's line
OURS = "mnist_lightning: what the network saw"  # in the file's Software field, by which an older sheet is recognised


def check_place(path: Path) -> None:
    """Raises UserError where a contact sheet can't go: not a .png, or a file that is something else."""
    if path.suffix.lower() != ".png":
        raise UserError("a .png for --data.save_seen", str(path), "for example seen.png.")
    if not path.exists():
        return
    try:
        with Image.open(path) as image:
            ours = image.info.get("Software") == OURS
    except (OSError, ValueError, Image.DecompressionBombError):
        ours = False
    if not ours:
        got = f"{path}, which exists and is something else"
        raise UserError("a new file for --data.save_seen, or an older contact sheet", got, "take another name.")


def contact_sheet(images: list[Tensor], captions: list[tuple[str, str]]) -> Image.Image:
    """Draws square images, uint8 (1 or 3, S, S), with two lines of caption each."""
    columns = max(1, min(COLUMNS, len(images)))
    rows = max(1, math.ceil(len(images) / columns))
    sheet = Image.new("RGB", (columns * (SIDE + GAP) + GAP, rows * (SIDE + CAPTION + GAP) + GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for i, (image, lines) in enumerate(zip(images, captions, strict=True)):
        x, y = GAP + i % columns * (SIDE + GAP), GAP + i // columns * (SIDE + CAPTION + GAP)
        picture = Image.fromarray(image[0].numpy() if len(image) == 1 else image.permute(1, 2, 0).numpy())
        resampling = Image.Resampling.NEAREST if picture.width < SIDE else Image.Resampling.BOX
        sheet.paste(picture.resize((SIDE, SIDE), resampling), (x, y))
        short = [line if len(line) <= LONGEST else f"...{line[3 - LONGEST:]}" for line in lines]
        # The font has ASCII's letters; a "?" stands for others.
        draw.text((x, y + SIDE), "\n".join(short).encode("ascii", "replace").decode(), "black", font)
    return sheet


def save(sheet: Image.Image, file: IO[bytes]) -> None:
    note = PngInfo()
    note.add_text("Software", OURS)
    sheet.save(file, "PNG", pnginfo=note)
