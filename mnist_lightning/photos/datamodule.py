"""Photos: pictures of one's own handwriting for `predict`; ink.py gives them the form of MNIST's images.

    python -m mnist_lightning predict --ckpt_path best --data Photos --data.path FILE_OR_FOLDER

F = pictures in which a digit was found.
"""

import csv
import os
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from lightning.pytorch import LightningDataModule
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from mnist_lightning.errors import UserError
from mnist_lightning.files import write_whole
from mnist_lightning.photos.contact_sheet import check_place, contact_sheet, save
from mnist_lightning.photos.ink import NoInk, ink

UNSURE = 0.5  # a confidence below this gets a remark


class Photo(NamedTuple):
    name: str  # relative to the folder that was given
    image: Tensor | None  # uint8 (1, 28, 28), 0 = background, 255 = strokes; None where no digit was found
    remark: str  # the reason for that, or a doubt; "" otherwise


class Photos(LightningDataModule):
    """Pictures of handwritten digits, one digit each: any format that Pillow reads, any size, dark on light or light on
    dark, coloured, transparent, drawn or photographed. For `predict`: they have no labels.

    Args:
        path: a picture, or a folder of pictures, with its subfolders.
        save_seen: a .png to write: each picture as the network sees it, and what it was classified as.

    Raises:
        UserError: there is nothing at path, save_seen is no place for a picture, or another command than predict.
    """

    def __init__(self, path: str, save_seen: str | None = None) -> None:
        super().__init__()
        self.path = Path(path).expanduser()
        self.save_seen = None if save_seen is None else Path(save_seen).expanduser()
        self.photos: list[Photo] = []

    def setup(self, stage: str) -> None:
        if self.trainer is not None and self.trainer.world_size > 1:
            remedy = "add --trainer.devices 1; all its cores read the photos."
            raise UserError("one process for photos", str(self.trainer.world_size), remedy)
        if self.save_seen is not None:
            check_place(self.save_seen)
        files, unreadable = self._files()
        # A bar on a terminal only, and not where the Trainer is told to show none.
        quiet = None if self.trainer is None or self.trainer.progress_bar_callback else True
        with warnings.catch_warnings(), ThreadPoolExecutor(os.cpu_count()) as pool:
            warnings.simplefilter("ignore")  # Pillow's doubts about metadata
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            read = pool.map(self._read, files)
            self.photos = list(tqdm(read, "Photos", len(files), unit=" photos", disable=quiet))
        self.photos += [Photo(self._name(folder), None, "a folder that can't be read") for folder in unreadable]

    def predict_dataloader(self) -> DataLoader | list[object]:
        images = [photo.image for photo in self.photos if photo.image is not None]
        if not images:
            return []
        labels = torch.full((len(images),), -1)  # nobody knows
        return DataLoader(TensorDataset(torch.stack(images), labels), batch_size=250)

    def tell(self, probabilities: Tensor, path: Path, names: list[str]) -> bool:
        """Writes a CSV file, and the pictures to save_seen, and prints a table; returns whether every picture was
        classified.

        Args:
            probabilities: (F, C), in the order of the batches.
            path: the CSV file.
            names: of the C classes.
        """
        table = [["file", "predicted", "second", "remark", *(f"p{name}" for name in names)]]
        printed: list[tuple[str, ...]] = [("file", "classified as", "confidence", "second guess", "")]
        images, captions = [], []
        left = iter(probabilities.tolist())
        for name, image, remark in self.photos:
            p = next(left, None) if image is not None else None
            if image is None or p is None:
                remark = remark or "left out by --trainer.limit_predict_batches"
                table.append([name, "", "", remark])
                printed.append((name, "-", "", "", remark))
                continue
            best, second = sorted(range(len(p)), key=p.__getitem__, reverse=True)[:2]
            if p[best] < UNSURE:
                remark = f"{remark}; unsure" if remark else "unsure"
            table.append([name, names[best], names[second], remark, *(f"{value:.6f}" for value in p)])
            runner_up = f"{names[second]} ({100 * p[second]:.1f} %)"
            printed.append((name, names[best], f"{100 * p[best]:.1f} %", runner_up, remark))
            images.append(image)
            captions.append((name, f"{names[best]}  {100 * p[best]:.0f} %"))
        # Written first: the table may go to a pipe that closes early.
        with write_whole(path, text=True) as file:
            csv.writer(file).writerows(table)
        if self.save_seen is not None:
            with write_whole(self.save_seen) as file:
                save(contact_sheet(images, captions), file)
        print_table(printed)
        return len(images) == len(self.photos)

    def _files(self) -> tuple[list[Path], list[Path]]:
        """The files at `path`, and the folders below it that can't be read. What is hidden is left out."""
        if not self.path.exists():
            expected = "a picture or a folder of them at --data.path"
            raise UserError(expected, f"nothing: {self.path}", "correct the path.")
        if not self.path.is_dir():
            return [self.path], []
        files: list[Path] = []
        unreadable: list[Path] = []
        entered: set[str] = set()  # a linked folder may be a folder around it

        def keep(error: OSError) -> None:
            unreadable.append(Path(error.filename))

        for folder, folders, names in os.walk(self.path, onerror=keep, followlinks=True):
            real = os.path.realpath(folder)
            if real in entered:
                folders.clear()
                continue
            entered.add(real)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            files += [Path(folder, name) for name in names if not name.startswith(".")]
        if self.save_seen is not None:
            sheet = os.path.realpath(self.save_seen)
            files = [file for file in files if os.path.realpath(file) != sheet]
        if not files and not unreadable:
            raise UserError("pictures at --data.path", f"an empty folder: {self.path}", "correct the path.")
        return sorted(files), sorted(unreadable)

    def _name(self, file: Path) -> str:
        name = file.name if file == self.path else str(file.relative_to(self.path))
        return os.fsencode(name).decode("utf-8", "backslashreplace")  # a file's name is bytes, of any encoding

    def _read(self, file: Path) -> Photo:
        """The picture in a file in MNIST's form, or the reason why there is none."""
        name = self._name(file)
        if not file.is_file():  # opening a pipe would wait
            return Photo(name, None, "no file, or a link to none")
        try:
            with Image.open(file) as picture:
                found = ink(picture)
        except NoInk as error:
            return Photo(name, None, str(error))
        except UnidentifiedImageError:
            return Photo(name, None, "no picture that Pillow reads: save it as PNG or JPEG")
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            return Photo(name, None, f"too large: more than {Image.MAX_IMAGE_PIXELS:,} pixels")
        except Exception as error:  # Pillow's decoders answer damaged bytes with a dozen kinds of exception
            return Photo(name, None, f"can't be read: {error}".splitlines()[0])
        remark = f"seems to hold {found.digits} digits; the largest was taken" if found.digits > 1 else ""
        return Photo(name, torch.from_numpy(found.image)[None], remark)


def print_table(rows: list[tuple[str, ...]]) -> None:
    """Prints rows in columns. What the console can't show becomes a "?"."""
    encoding = sys.stdout.encoding or "utf-8"

    def shown(text: str) -> str:
        printable = "".join(letter if letter.isprintable() else "?" for letter in text)
        return printable.encode(encoding, "replace").decode(encoding)

    rows = [tuple(map(shown, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
