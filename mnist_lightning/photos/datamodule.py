"""Photos: pictures of one's own handwriting for `predict`; ink.py gives them the form of MNIST's images.

    python -m mnist_lightning predict --ckpt_path best --data Photos --data.path FILE_OR_FOLDER
"""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from mnist_lightning.errors import UserError
from mnist_lightning.photos.answers import Answered, write_and_print
from mnist_lightning.photos.contact_sheet import check_place
from mnist_lightning.photos.ink import ink
from mnist_lightning.photos.reading import NoPicture, files_under, no_doubts, opened, shown_name


class Photos(LightningDataModule):
    """Pictures of handwritten digits, one digit each: any format that Pillow reads, any size, dark on light or light on
    dark, coloured, transparent, drawn or photographed. For `predict`: they have no labels.

    Args:
        path: a picture, or a folder of pictures, with its subfolders.
        save_seen: a .png to write: each picture as the network sees it, and what it was classified as.

    Raises:
        UserError: there is nothing at path, save_seen is no place for a picture, or another command than predict.
    """

    table_name = "photos.csv"

    def __init__(self, path: str, save_seen: str | None = None) -> None:
        super().__init__()
        if not path:
            raise UserError("a picture or a folder of them at --data.path", "no path", "name one; . is this folder.")
        self.path = Path(path).expanduser()
        self.save_seen = None if save_seen is None else Path(save_seen).expanduser()
        self.photos: list[Answered] = []

    def setup(self, stage: str) -> None:
        if self.trainer is not None and self.trainer.world_size > 1:
            remedy = "add --trainer.devices 1; all its cores read the photos."
            raise UserError("one process for photos", str(self.trainer.world_size), remedy)
        if self.save_seen is not None:
            check_place(self.save_seen)
        files, unreadable = self._files()
        # A bar on a terminal only, and not where the Trainer is told to show none.
        quiet = None if self.trainer is None or self.trainer.progress_bar_callback else True
        with no_doubts(), ThreadPoolExecutor(os.cpu_count()) as pool:
            read = pool.map(self._read, files)
            self.photos = list(tqdm(read, "Photos", len(files), unit=" photos", disable=quiet))
        self.photos += [
            Answered(shown_name(folder, self.path), None, "a folder that can't be read") for folder in unreadable
        ]

    def predict_dataloader(self) -> DataLoader | list[object]:
        images = [photo.image for photo in self.photos if photo.image is not None]
        if not images:
            return []
        return DataLoader(TensorDataset(torch.stack(images)), batch_size=250)

    def tell(self, probabilities: Tensor, path: Path, names: list[str]) -> bool:
        return write_and_print(self.photos, probabilities, path, names, self.save_seen)

    def _files(self) -> tuple[list[Path], list[Path]]:
        """The files at `path`, and the folders below it that can't be read. What is hidden is left out."""
        if not self.path.exists():
            expected = "a picture or a folder of them at --data.path"
            raise UserError(expected, f"nothing: {self.path}", "correct the path.")
        if not self.path.is_dir():
            return [self.path], []
        files, unreadable = files_under(self.path, self.save_seen)
        if not files and not unreadable:
            raise UserError("pictures at --data.path", f"an empty folder: {self.path}", "correct the path.")
        return files, unreadable

    def _read(self, file: Path) -> Answered:
        """The picture in a file in MNIST's form, or the reason why there is none."""
        name = shown_name(file, self.path)
        try:
            with opened(file) as picture:
                found = ink(picture)
        except NoPicture as reason:
            return Answered(name, None, str(reason))
        remark = f"seems to hold {found.digits} digits; the largest was taken" if found.digits > 1 else ""
        return Answered(name, torch.from_numpy(found.image)[None], remark)
