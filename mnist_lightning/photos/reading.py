"""Pictures on a person's disk: which files there are, opened safely, brought to one form.

S = pixels a side. Pillow also has readers that start another program (EPS: Ghostscript) or that read no pixels; here
they are left out, whatever a file is called.
"""

import functools
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from mnist_lightning.runs.folder import LOGS

NO_RASTERS = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
MAX_PIXELS = 150_000_000  # of a picture: 12,000×9,000 is 108 million; some 600 MB while it is read
MARGIN = 256 / 224  # the short side of the picture, as a multiple of the square's: what ImageNet's models are tested on


class NoPicture(ValueError):
    """A file that gives no picture; the message says why."""


@functools.cache
def formats() -> list[str]:
    """The formats that are read, the likely ones first."""
    Image.init()
    return [name for name in Image.ID if name not in NO_RASTERS]


@functools.cache
def suffixes() -> frozenset[str]:
    """How the names of pictures end, in lower case: .jpg, .png, ...; also .heic, which Pillow can't read: such pictures
    are to be named as unreadable, not passed over."""
    known = set(formats())
    read = {suffix.lower() for suffix, name in Image.registered_extensions().items() if name in known}
    return frozenset(read | {".heic", ".heif"})


class Found(NamedTuple):
    """What there is at a path, sorted; what is hidden is left out."""

    pictures: list[Path]
    passed_over: list[Path]  # files whose names don't end as a picture's
    unreadable: list[Path]  # folders


def find_pictures(path: Path, sheet: Path | None = None) -> Found:
    """The pictures in a folder and its subfolders, but for the one at `sheet`; or one picture, whatever its name."""
    if not path.is_dir():
        return Found([path], [], [])
    files, unreadable = files_under(path, sheet)
    pictures = [file for file in files if file.suffix.lower() in suffixes()]
    return Found(pictures, sorted(set(files) - set(pictures)), unreadable)


def files_under(folder: Path, sheet: Path | None = None) -> tuple[list[Path], list[Path]]:
    """The files in a folder and its subfolders, linked ones too, and the folders that can't be read; both sorted.
    What is hidden is left out, and a contact sheet at `sheet`; each folder is entered once."""
    files: list[Path] = []
    unreadable: list[Path] = []
    entered: set[str] = set()  # a linked folder may be a folder around it

    def keep(error: OSError) -> None:
        unreadable.append(Path(error.filename))

    for inner, folders, names in os.walk(folder, onerror=keep, followlinks=True):
        real = os.path.realpath(inner)
        if real in entered:
            folders.clear()
            continue
        entered.add(real)
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        files += [Path(inner, name) for name in names if not is_hidden(name)]
    if sheet is not None:
        files = [file for file in files if os.path.realpath(file) != os.path.realpath(sheet)]
    return sorted(files), sorted(unreadable)


def is_hidden(name: str) -> bool:
    """Of a file or folder; also what macOS adds to its archives, and the runs of `fit --data.path .`."""
    return name.startswith(".") or name in ("__MACOSX", LOGS)


def as_text(name: str) -> str:
    """The name of a file, which is bytes, of any encoding."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def shown_name(file: Path, path: Path) -> str:
    """A file's name relative to the path that was given, as text."""
    return as_text(file.name if file == path else str(file.relative_to(path)))


@contextmanager
def opened(file: Path) -> Iterator[Image.Image]:
    """A picture, its pixels not yet read. Several threads may read at once, within `no_doubts`.

    Raises:
        NoPicture: the file can't be opened, or what is done with the picture in the block fails.
    """
    if not file.is_file():  # opening a pipe would wait
        raise NoPicture("no file, or a link to none")
    try:
        with Image.open(file, formats=formats()) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise NoPicture(f"too large: {picture.width}×{picture.height}, more than {MAX_PIXELS:,} pixels")
            yield picture
    except NoPicture:
        raise
    except UnidentifiedImageError as error:
        raise NoPicture("no picture that Pillow reads: save it as PNG or JPEG") from error
    except Image.DecompressionBombError as error:
        raise NoPicture(f"too large: more than {MAX_PIXELS:,} pixels") from error
    except Exception as error:  # Pillow's decoders answer damaged bytes with a dozen kinds of exception
        raise NoPicture(f"can't be read: {error}".splitlines()[0]) from error


@contextmanager
def no_doubts() -> Iterator[None]:
    """Silences Pillow's doubts about metadata and sizes. Warnings are the process's: not to be entered by threads."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def square(picture: Image.Image, size: int) -> Tensor:
    """The middle of a picture, upright, in colour, on white: uint8 (3, S, S). The picture is changed.

    Its short side is brought to 256/224 of S, with antialiasing, and the square in the middle cut out, in one step.
    """
    side = 2 * math.ceil(size * MARGIN)
    picture.draft(None, (side, side))  # a JPEG is decoded at a half, quarter or eighth of its size, much faster
    ImageOps.exif_transpose(picture, in_place=True)
    picture = to_colour(picture)
    kept = min(picture.size) / MARGIN
    pixel = kept / size  # whole ones are left out at the top and the left: a half would blur
    left, top = (round((length - kept) / 2 / pixel) * pixel for length in picture.size)
    box = left, top, left + kept, top + kept
    picture = picture.resize((size, size), Image.Resampling.BILINEAR, box, reducing_gap=2.0)
    if picture.mode == "RGBA":
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


def to_colour(picture: Image.Image) -> Image.Image:
    """In mode RGB, or RGBA where it is transparent in places."""
    if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
        picture = to_8_bits(picture)
    return picture.convert("RGBA" if picture.has_transparency_data else "RGB")


def to_8_bits(picture: Image.Image) -> Image.Image:
    """Of greys in 16 or 32 bits. White is 255 or 65535; where nothing says what it is, it is the lightest grey."""
    values = np.nan_to_num(np.asarray(picture, np.float32), posinf=0, neginf=0)
    low, high = float(values.min()), float(values.max())
    if picture.mode != "F" and low >= 0 and high <= 65535:
        low, high = 0.0, 255.0 if picture.mode == "I" and high <= 255 else 65535.0
    return Image.fromarray(((values - low) * (255 / ((high - low) or 1))).round().astype(np.uint8))


def read_squares(files: Sequence[Path], size: int, quiet: bool | None = True) -> tuple[Tensor, dict[int, str]]:
    """`square` of each file's picture: uint8 (N, 3, S, S), and why some are missing there, by positions in `files`.

    By as many threads as there are cores: Pillow decodes and resizes without Python's lock, and processes were no
    faster.

    Args:
        quiet: no progress bar; None shows one on a terminal.
    """
    images = torch.empty(len(files), 3, size, size, dtype=torch.uint8)
    reasons: dict[int, str] = {}

    def attempt(file: Path) -> Tensor | str:
        try:
            with opened(file) as picture:
                return square(picture, size)
        except NoPicture as reason:
            return str(reason)

    formats()  # not by several threads at once
    with no_doubts(), ThreadPoolExecutor(os.cpu_count()) as pool:
        found = tqdm(pool.map(attempt, files), "Pictures", len(files), unit=" pictures", disable=quiet)
        try:
            for i, answer in enumerate(found):
                if isinstance(answer, Tensor):
                    images[i - len(reasons)] = answer
                else:
                    reasons[i] = answer
        finally:
            pool.shutdown(cancel_futures=True)  # Ctrl-C doesn't wait for the rest
    return images[: len(files) - len(reasons)], reasons
