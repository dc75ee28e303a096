"""ImageFolder: pictures of one's own, a folder for each class, split, brought to one size and handed out in batches.

    python -m mnist_lightning fit --model ResNet18 --data ImageFolder --data.path FOLDER

N = pictures, B = batch size, S = pixels a side. A batch is (images, labels): uint8 (B, 3, S, S), RGB, and int64 (B,);
for predict, whose pictures need no folders of classes, the images alone. Layouts are in layout.py, reading in
reading.py.
"""

import itertools
import math
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jsonargparse.typing import ClosedUnitInterval, PositiveInt
from torch import Tensor

from mnist_lightning.data import balanced
from mnist_lightning.errors import UserError
from mnist_lightning.loader import Batch, Batched, Images, ImagesDataModule
from mnist_lightning.photos.answers import Answered, write_and_print
from mnist_lightning.photos.contact_sheet import SIDE, check_place
from mnist_lightning.photos.layout import Picture, class_name, class_names, part_folders, rank, read_layout, some
from mnist_lightning.photos.reading import Found, find_pictures, read_squares, shown_name

IN_MEMORY = 2 * 10**9  # bytes of pictures; of more, each batch is read from disk when it is needed
MOST_SEEN = 1000  # pictures on a contact sheet
PARTS = {"fit": ("train", "val", "test"), "validate": ("val",), "test": ("test",), "predict": ("predict",)}
SHARE = 0.15  # of each class, for validation and for the test
VERBS = {"train": "train on", "val": "validate", "test": "test"}


class ImageFolder(ImagesDataModule):
    """Pictures by class: path/CLASS/*.jpg, each class split into training, validation and test pictures; or
    path/train/CLASS/*.jpg with path/val, path/test or both. With train and val alone, val's are the test pictures. Any
    format that Pillow reads, any size. To predict, path may also be a folder without classes, or one picture.

    The test pictures are never trained on and never used to choose by.

    Args:
        path: the folder.
        size: pixels a side: the short side is brought to 256/224 of it, and the square in the middle cut out.
        batch_size: training pictures a step, on each process.
        val_size: share of each class that is kept for validation, where there is no folder for that. 0 trains on all
            and keeps the last epoch.
        test_size: share of each class that is kept for the test, where there is no folder for that. 1 tests a model
            on all pictures of another folder.
        split_seed: chooses which pictures those are. Independent of --seed_everything.
        train_size: train on only so many of the training pictures, the same number of each class; the default is all.
        augment: crop each training picture at random to 8 to 100 % of its area, and mirror every other, anew each
            time. On the device, in training only.
        save_seen: predict: a .png to write: each picture as the network sees it, and what it was classified as.

    Attributes:
        class_names: sorted, as torchvision has them, known before any picture is read; in a run of a checkpoint they
            are the checkpoint's. Empty where there are no folders of classes.
        left_out: pictures that can't be read, and why.

    Raises:
        UserError: an argument is out of range, or the pictures can't be had as they are laid out.
    """

    table_name = "predictions.csv"
    predict_set: Batched
    eval_batch_size = 64  # a ResNet18 at 224 pixels a side then needs 1 GB

    def __init__(
        self,
        path: str,
        size: PositiveInt = 224,
        batch_size: PositiveInt = 16,  # people have a few hundred pictures: an epoch has to have steps enough
        val_size: ClosedUnitInterval = SHARE,
        test_size: ClosedUnitInterval = SHARE,
        split_seed: int = 0,
        train_size: PositiveInt | None = None,
        augment: bool = False,
        save_seen: str | None = None,
    ) -> None:
        super().__init__(batch_size)
        path = str(path)  # from Python maybe a Path, which a checkpoint can't hold
        self.save_hyperparameters()
        if not path:
            raise UserError("a folder of pictures at --data.path", "an empty path", "for example --data.path photos/")
        if not (0 <= val_size < 1 and 0 < test_size <= 1):
            got = f"val_size {val_size}, test_size {test_size}"
            raise UserError("shares of the pictures, below 1", got, "leave them out to have 0.15 of each class.")
        self.path = Path(path).expanduser()
        self.size, self.val_size, self.test_size = size, val_size, test_size
        self.split_seed, self.train_size, self.augment = split_seed, train_size, augment
        self.save_seen = None if save_seen is None else Path(save_seen).expanduser()
        self.class_names = class_names(self.path)
        self.to_predict: list[Path] = []
        self.pictures: dict[str, list[Picture]] = {}  # of the parts that have been read: train, val, test and predict
        self.images: dict[str, Tensor | None] = {}  # of each part (N, 3, S, S); None where they stay on disk
        self.left_out: dict[Path, str] = {}

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if not self.path.exists():
            raise UserError("pictures at --data.path", f"nothing: {self.path}", "correct the path.")
        if stage != "predict" and self.save_seen is not None:
            raise UserError("--data.save_seen with predict", f"with {stage}", "leave it out.")
        if stage == "predict" and self._share()[0] > 1:
            remedy = "add --trainer.devices 1; all its cores read the pictures."
            raise UserError("one process to predict pictures", str(self._share()[0]), remedy)
        if any(part not in self.pictures for part in PARTS[stage]):
            self._read(self._to_predict() if stage == "predict" else self._by_part(PARTS[stage]))
        self._make_sets()

    def predict_dataloader(self) -> Any:
        return self._eval_dataloader(self.predict_set) if len(self.predict_set) else []

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if self.augment and self.trainer is not None and self.trainer.training:
            images, labels = batch
            return crops_and_mirrors(images), labels
        return batch

    def state_dict(self) -> dict[str, Any]:
        state = {**super().state_dict(), "class_names": self.class_names}
        return state | ({"trained_on": self._trained_on} if "train" in self.pictures else {})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over the classes of a checkpoint: their order is that of the model's answers.

        Raises:
            UserError: there are pictures of other classes; or a fit would go on with other pictures.
        """
        super().load_state_dict(state_dict)
        self.use_classes(state_dict["class_names"])
        if "train" in self.pictures and state_dict.get("trained_on", self._trained_on) != self._trained_on:
            got, remedy = f"others in {self.path}", "put back what was there, or start a new run, without --ckpt_path."
            raise UserError("the pictures of the run that goes on", got, remedy)

    def use_classes(self, known: list[str]) -> None:
        """From now on labels are positions in `known`, the classes of a model.

        Raises:
            UserError: there are pictures of other classes.
        """
        labelled = [picture for part, pictures in self.pictures.items() if part != "predict" for picture in pictures]
        if others := sorted({picture.class_name for picture in labelled} - set(known)):
            expected = f"the classes of the checkpoint: {some(known)}"
            raise UserError(expected, f"others: {some(others)}", "rename these folders, or train a new model.")
        self.class_names = known
        self._make_sets()

    def tell(self, probabilities: Tensor, path: Path, names: list[str]) -> bool:
        readable = [picture.file for picture in self.pictures["predict"] if picture.file not in self.left_out]
        images = self.images["predict"]
        if images is None and self.save_seen is not None:
            images, _ = read_squares(readable, SIDE)
        # Without a contact sheet it is enough to know which ones were read.
        seen = dict(zip(readable, itertools.repeat(torch.empty(0)) if images is None else images, strict=False))
        pictures = []
        for file in self.to_predict:
            folders = file.relative_to(self.path).parts[:-1]
            label = next((folder for folder in map(class_name, folders) if folder in names), "")
            name, remark = shown_name(file, self.path), self.left_out.get(file, "")
            pictures.append(Answered(name, seen.get(file), remark, label))
        return write_and_print(pictures, probabilities, path, names, self.save_seen)

    def leave_out(self, reasons: dict[Path, str]) -> None:
        """Says which pictures can't be read; of each once, though it may be tried in every epoch."""
        new = {file: reason for file, reason in reasons.items() if file not in self.left_out}
        self.left_out |= new
        if new:
            print(f"Left out: {len(new):,} of the pictures, which can't be read", file=sys.stderr)
            for file, reason in new.items():
                print(f"  {shown_name(file, self.path)}: {reason}", file=sys.stderr)

    @cached_property
    def _trained_on(self) -> str:
        """A checksum of the names and sizes of the pictures for training and validation; their folder may be moved."""
        digest = sha256()
        for file, _ in self.pictures["train"] + self.pictures["val"]:
            size = file.stat().st_size if file.exists() else 0
            digest.update(rank(file.relative_to(self.path), self.split_seed) + size.to_bytes(8, "big"))
        return digest.hexdigest()

    def _by_part(self, needed: Sequence[str]) -> dict[str, list[Picture]]:
        layout = read_layout(self.path, self.val_size, self.test_size, self.split_seed)
        train = layout.parts["train"]
        if "train" in needed and not train:
            raise UserError("pictures to train on", "none: --data.test_size 1 is for test", "leave it out.")
        if self.train_size is not None and self.train_size < len(layout.class_names):
            expected = f"a train_size of {len(layout.class_names)} and more, a picture of each class"
            raise UserError(expected, str(self.train_size), "give a larger one, or leave it out.")
        if self.train_size is not None and "train" in needed:
            labels = torch.tensor([layout.class_names.index(picture.class_name) for picture in train])
            kept = balanced(torch.arange(len(train)), labels, self.train_size)
            layout.parts["train"] = [train[i] for i in kept.tolist()]
        self._say_passed_over(layout.found)
        self._say_shares_without_use()
        return {part: layout.parts[part] for part in needed if part not in self.pictures}

    def _to_predict(self) -> dict[str, list[Picture]]:
        if self.save_seen is not None:
            check_place(self.save_seen)
        found = find_pictures(self.path, self.save_seen)
        if self.save_seen is not None and len(found.pictures) > MOST_SEEN:
            remedy = "leave it out, or give a smaller folder."
            raise UserError(f"up to {MOST_SEEN} pictures for --data.save_seen", f"{len(found.pictures):,}", remedy)
        if not found.pictures:
            raise UserError("pictures at --data.path", f"none in {self.path}", "correct the path.")
        self._say_passed_over(found)
        self.to_predict = found.pictures + found.unreadable
        return {"predict": [Picture(file, "") for file in found.pictures]}

    def _read(self, parts: dict[str, list[Picture]]) -> None:
        """Reads pictures into memory, or leaves them on disk if they are too many."""
        files = [picture.file for pictures in parts.values() for picture in pictures]
        if 3 * self.size**2 * len(files) > IN_MEMORY:
            self.pictures |= parts
            self.images |= dict.fromkeys(parts)
            return
        first = self._share()[1] == 0  # of several processes, which all read
        # A bar on a terminal only, and not where the Trainer is told to show none.
        bar = first and (self.trainer is None or self.trainer.progress_bar_callback is not None)
        images, reasons = read_squares(files, self.size, quiet=None if bar else True)
        unreadable = {files[i]: reason for i, reason in reasons.items()}
        if first:
            self.leave_out(unreadable)
        for part, pictures in parts.items():
            self.pictures[part] = [picture for picture in pictures if picture.file not in unreadable]
            self.images[part], images = images.tensor_split([len(self.pictures[part])])
            if part != "predict":
                check_readable(part, pictures, self.pictures[part])
        if first and "train" in parts:
            self._say_what_is_there_twice()

    def _make_sets(self) -> None:
        """The data sets of the parts that have been read, labelled in the order of `class_names`."""
        label = {name: i for i, name in enumerate(self.class_names)}
        for part, pictures in self.pictures.items():
            images, files = self.images[part], [picture.file for picture in pictures]
            labels = None
            if part != "predict":
                labels = torch.tensor([label[picture.class_name] for picture in pictures], dtype=torch.int64)
            if images is None:
                data: Batched = OnDisk(files, labels, self.size, self.leave_out)
            else:
                data = Unlabelled(images) if labels is None else Images(images, labels)
            setattr(self, f"{part}_set", data)

    def _say_what_is_there_twice(self) -> None:
        """A copy of a training picture among the others makes a model look better than it is."""
        files: dict[str, dict[bytes, Path]] = {}
        for part, images in self.images.items():
            digests = [] if images is None else [sha256(image.numpy().data).digest() for image in images]
            files[part] = {digest: picture.file for digest, picture in zip(digests, self.pictures[part], strict=False)}
        others = [pair for part in ("val", "test") for pair in files[part].items()]
        twice = [(file, files["train"][digest]) for digest, file in others if digest in files["train"]]
        if twice:
            print(f"Twice: {len(twice):,} validation and test pictures are training pictures as well", file=sys.stderr)
            for pair in twice:
                print("  {} is {}".format(*(shown_name(file, self.path) for file in pair)), file=sys.stderr)

    def _say_shares_without_use(self) -> None:
        folders = part_folders(self.path)
        shares = {"val_size": (self.val_size, len(folders) == 3), "test_size": (self.test_size, bool(folders))}
        for name, (share, is_of_no_use) in shares.items():
            if is_of_no_use and share != SHARE and self._share()[1] == 0:
                print(f"Not used: --data.{name} {share}: {self.path} has a folder for that", file=sys.stderr)

    def _say_passed_over(self, found: Found) -> None:
        if self._share()[1] > 0:
            return
        self.leave_out(dict.fromkeys(found.unreadable, "a folder that can't be read"))
        if found.passed_over:
            kinds = Counter(file.suffix.lower() or "no suffix" for file in found.passed_over).most_common()
            shown = ", ".join(f"{count:,} {kind}" for kind, count in kinds)
            total = f"{len(found.passed_over):,}"
            print(f"Passed over: {total} files that are no pictures, or of no class ({shown})", file=sys.stderr)


class OnDisk(Batched):
    """Pictures (N, 3, S, S) that are read when a batch of them is needed, and labels (N,) if there are any. One that
    can't be read is missing in its batch.

    Args:
        leave_out: is told which ones those are, and why.
    """

    def __init__(
        self, files: list[Path], labels: Tensor | None, size: int, leave_out: Callable[[dict[Path, str]], None]
    ) -> None:
        self.files, self.labels, self.size, self.leave_out = files, labels, size, leave_out

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, positions: list[int]) -> Batch | Tensor:
        images, reasons = read_squares([self.files[position] for position in positions], self.size)
        self.leave_out({self.files[positions[i]]: reason for i, reason in reasons.items()})
        if self.labels is None:
            return images
        if not len(images):  # a loss of nothing would be NaN
            remedy = "move those that can't be read away, and start a new run."
            raise UserError("a picture that can be read in each batch", f"none of {len(positions)}, see above", remedy)
        return images, self.labels[[position for i, position in enumerate(positions) if i not in reasons]]


class Unlabelled(Batched):
    """Pictures (N, 3, S, S) in memory, alone."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, positions: list[int]) -> Tensor:
        return self.images[positions]


def check_readable(part: str, listed: list[Picture], readable: list[Picture]) -> None:
    """Raises UserError if a class has nothing left to train on, or a part nothing at all."""
    lost = {picture.class_name for picture in listed} - {picture.class_name for picture in readable}
    if lost and (part == "train" or not readable):
        expected = f"pictures that can be read for each class to {VERBS[part]}"
        raise UserError(expected, f"none of {some(sorted(lost))}", "save them as JPEG or PNG.")


def crops_and_mirrors(images: Tensor) -> Tensor:
    """Each of uint8 images (B, 3, H, W) cropped at random to 8 to 100 % of its area and 3/4 to 4/3 of its shape,
    brought back to H×W, and mirrored half of the time.

    What torchvision's RandomResizedCrop and RandomHorizontalFlip draw once for a batch is drawn for each picture.
    """
    area, shape, x, y, side = torch.rand(5, len(images), device=images.device)
    area, shape = 0.08 + 0.92 * area, (math.log(4 / 3) * (2 * shape - 1)).exp()
    width, height = (area * shape).sqrt().clamp(max=1), (area / shape).sqrt().clamp(max=1)
    # grid_sample's unit is half an image; -1 and 1 are its edges.
    left_right, up_down, none = (1 - width) * (2 * x - 1), (1 - height) * (2 * y - 1), torch.zeros_like(x)
    mirror = torch.where(side < 0.5, -1.0, 1.0)
    rows = [torch.stack([width * mirror, none, left_right], dim=1), torch.stack([none, height, up_down], dim=1)]
    grid = F.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)  # (B, H, W, 2)
    cropped = F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)
    return cropped.round().to(images.dtype)
