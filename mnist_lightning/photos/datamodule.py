"""Photos: pictures of one's own handwriting for `predict`; ink.py brings them into MNIST's form.

    python -m mnist_lightning predict --ckpt_path best --data Photos --data.path FILE_OR_FOLDER

F = pictures that could be read.
"""

import csv
import io
import math
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningDataModule
from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

NUM_CLASSES = 10
from mnist_lightning.errors import UserError
from mnist_lightning.files import write_whole
from mnist_lightning.photos.ink import NoInk, ink

UNSURE = 0.5  # a confidence below this is remarked on
ENLARGED, CAPTION, GAP = 112, 32, 8  # pixels of the contact sheet: a picture's side, the text below, the space between
OURS = "mnist_lightning: what the network saw"  # in a contact sheet's Software field


class Photo(NamedTuple):
    name: str  # below the folder that was given
    image: Tensor | None  # uint8 (1, 28, 28), 0 = paper, 255 = ink; None where there is none
    remark: str  # why there is none, or a doubt; "" otherwise


class Photos(LightningDataModule):
    """Pictures of handwritten digits, one digit each: any format that Pillow reads, any size, dark on light or light on
    dark, coloured, transparent, drawn or photographed. For `predict`: they have no labels.

    Args:
        path: a picture, or a folder of pictures, with its subfolders.
        save_seen: a .png to write: each picture as the network sees it, and the digit that it was read as.

    Raises:
        UserError: there is nothing at path, save_seen is no place for a picture, or another command than predict.
    """

    def __init__(self, path: str, save_seen: str | None = None) -> None:
        super().__init__()
        self.path = Path(path).expanduser()
        self.save_seen = None if save_seen is None else Path(save_seen).expanduser()
        self.photos: list[Photo] = []

    @staticmethod
    def check(command: str) -> None:
        if command != "predict":
            remedy = "use Photos with predict; leave out --data to have MNIST."
            raise UserError(f"images with labels to {command}", "Photos, which have none", remedy)

    def setup(self, stage: str) -> None:
        self.check(stage)
        if self.trainer is not None and self.trainer.world_size > 1:
            remedy = "add --trainer.devices 1; all its cores read the photos."
            raise UserError("one process for photos", str(self.trainer.world_size), remedy)
        files = self._files()
        names = [str(file.relative_to(self.path)) if self.path.is_dir() else file.name for file in files]
        # On a terminal only, and not beside a Trainer that is told to show no bar.
        quiet = None if self.trainer is None or self.trainer.progress_bar_callback else True
        with warnings.catch_warnings(), ThreadPoolExecutor(os.cpu_count()) as pool:
            warnings.simplefilter("ignore")  # Pillow's doubts about metadata
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            self.photos = list(tqdm(pool.map(read, files, names), "Photos", len(files), unit=" photos", disable=quiet))

    def predict_dataloader(self) -> DataLoader | list[object]:
        images = [photo.image for photo in self.photos if photo.image is not None]
        if not images:
            return []
        labels = torch.full((len(images),), -1)  # nobody knows
        return DataLoader(TensorDataset(torch.stack(images), labels), batch_size=250)

    def tell(self, probabilities: Tensor, path: Path) -> bool:
        """Prints a table, writes it as CSV and the pictures to save_seen; returns whether every picture was read.

        Args:
            probabilities: (F, 10), in the order of the batches.
            path: the CSV file.
        """
        rows: list[tuple[Photo, Any, Any, Any, str]] = []
        left = iter(probabilities.tolist())
        for photo in self.photos:
            p = next(left, None) if photo.image is not None else None
            best, second = sorted(range(NUM_CLASSES), key=p.__getitem__)[:-3:-1] if p else (None, None)
            remark = photo.remark
            if p is None:
                remark = remark or "left out by --trainer.limit_predict_batches"
            elif p[best] < UNSURE:
                remark = f"{remark}; unsure" if remark else "unsure"
            rows.append((photo, best, second, p, remark))
        width = max(len("file"), *(len(photo.name) for photo in self.photos))
        print(f"{'file':<{width}}  digit  confidence  second guess")
        for photo, best, second, p, remark in rows:
            said = f"{best:>5}  {100 * p[best]:>8.1f} %  {second} ({100 * p[second]:.1f} %)" if p else "    -"
            print(f"{photo.name:<{width}}  {said}" + (f"  {remark}" if remark else ""))
        text = io.StringIO()
        table = csv.writer(text)
        table.writerow(["file", "predicted", "second", "remark", *(f"p{digit}" for digit in range(NUM_CLASSES))])
        for photo, best, second, p, remark in rows:
            table.writerow([photo.name, best, second, remark, *(f"{value:.6f}" for value in p or ())])
        with write_whole(path) as file:
            file.write(text.getvalue().encode())
        if self.save_seen is not None:
            seen = [(photo, f"{best}  {100 * p[best]:.0f} %") for photo, best, _, p, _ in rows if p]
            note = PngInfo()
            note.add_text("Software", OURS)
            with write_whole(self.save_seen) as file:
                contact_sheet(seen).save(file, "PNG", pnginfo=note)
        return all(p is not None for _, _, _, p, _ in rows)

    def _files(self) -> list[Path]:
        if not self.path.exists():
            raise UserError("a picture or a folder of them at --data.path", f"nothing: {self.path}", "mend the path.")
        self._check_save_seen()
        if not self.path.is_dir():
            return [self.path]
        sheet = self.save_seen and self.save_seen.resolve()
        files = sorted(
            file
            for file in self.path.rglob("*")
            if not file.is_dir()
            and not any(part.startswith(".") for part in file.relative_to(self.path).parts)
            and file.resolve() != sheet
        )
        if not files:
            raise UserError("pictures at --data.path", f"an empty folder: {self.path}", "mend the path.")
        return files

    def _check_save_seen(self) -> None:
        """So that it isn't somebody's photo that gets overwritten."""
        if self.save_seen is None:
            return
        if self.save_seen.suffix.lower() != ".png":
            raise UserError("a .png for --data.save_seen", str(self.save_seen), "for example seen.png.")
        if self.save_seen.exists():
            try:
                with Image.open(self.save_seen) as image:
                    ours = image.info.get("Software") == OURS
            except (OSError, ValueError):
                ours = False
            if not ours:
                got = f"{self.save_seen}, which is there and is something else"
                raise UserError("a new file for --data.save_seen, or an older contact sheet", got, "take another name.")


def read(file: Path, name: str) -> Photo:
    """The picture in a file in MNIST's form, or the reason why there is none."""
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
        return Photo(name, None, f"damaged: {error}".splitlines()[0])
    remark = f"seems to hold {found.digits} digits; the largest was read" if found.digits > 1 else ""
    return Photo(name, torch.from_numpy(found.image)[None], remark)


def contact_sheet(seen: list[tuple[Photo, str]]) -> Image.Image:
    """The pictures as the network sees them, enlarged, below each its name and what it was read as."""
    columns = max(1, min(8, len(seen)))
    side = ENLARGED + GAP
    size = columns * side + GAP, max(1, math.ceil(len(seen) / columns)) * (side + CAPTION) + GAP
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for i, ((name, image, _), answer) in enumerate(seen):
        x, y = GAP + i % columns * side, GAP + i // columns * (side + CAPTION)
        assert image is not None
        large = Image.fromarray(image[0].numpy()).resize((ENLARGED, ENLARGED), Image.Resampling.NEAREST)
        sheet.paste(large, (x, y))
        short = name if len(name) <= 16 else f"...{name[-14:]}"
        draw.text((x, y + ENLARGED), f"{short}\n{answer}".encode("latin-1", "replace").decode("latin-1"), "black", font)
    return sheet
