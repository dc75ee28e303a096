"""Which class a picture in a folder belongs to, and whether it is for training, validation or test.

    path/CLASS/*.jpg            each class is split
    path/train/CLASS/*.jpg      with path/val, path/test or both beside it, laid out alike

A picture's part follows from its name, its class and the seed alone: not from the order in which a file system lists
files, nor from which of them can be read; and where a picture is added, hardly any other changes its part.
"""

import hashlib
import itertools
import unicodedata
from bisect import bisect_right
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from mnist_lightning.errors import UserError
from mnist_lightning.photos.reading import Found, as_text, find_pictures, is_hidden

# Of the folders of the parts, in small or capital letters.
NAMES = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
SHOWN = "CLASS/*.jpg, or train/CLASS/*.jpg with val or test beside it"


class Picture(NamedTuple):
    file: Path
    class_name: str


class Layout(NamedTuple):
    class_names: list[str]  # sorted: a class's position is its label
    parts: dict[str, list[Picture]]  # train, val and test
    found: Found


def part_folders(path: Path) -> dict[str, Path]:
    """The folders of train, val and test; none where the folders in `path` are those of classes."""
    folders = class_folders(path).items()
    found = {part: folder for part, names in NAMES.items() for name, folder in folders if name.lower() in names}
    return found if "train" in found and len(found) > 1 else {}


def class_folders(path: Path) -> dict[str, Path]:
    """The folder of each class by its name, sorted; none where there is no folder `path`."""
    if not path.is_dir():
        return {}
    folders = (folder for folder in sorted(path.iterdir()) if folder.is_dir() and not is_hidden(folder.name))
    return {class_name(folder.name): folder for folder in folders}


def class_name(folder: str) -> str:
    """The class of a folder's name; the same whether its accents are stored composed or apart."""
    return unicodedata.normalize("NFC", as_text(folder))


def class_names(path: Path) -> list[str]:
    return list(class_folders(part_folders(path).get("train", path)))


def read_layout(path: Path, val_size: float, test_size: float, seed: int) -> Layout:
    """Lists the pictures of each part, in an order in which the classes are mixed. val_size and test_size are shares of
    each class, where `path` has no folder of that part; with train and val alone, val is the test set.

    Raises:
        UserError: there are no classes, only one, others in one part than in training, or too few pictures of one; or
            a part's folder is empty.
    """
    found, folders, names = find_pictures(path), part_folders(path), class_names(path)
    for folder in folders.values() or [path]:
        check_classes(folder, names)
    parts: dict[str, list[Picture]] = {part: [] for part in folders or ("train",)}
    for file in sorted(found.pictures, key=lambda file: rank(file.relative_to(path), seed)):
        for part, folder in folders.items() or [("train", path)]:
            if file.is_relative_to(folder) and file.parent != folder:
                parts[part].append(Picture(file, class_name(file.relative_to(folder).parts[0])))
    if empty := [str(folder) for part, folder in folders.items() if not parts[part]]:
        raise UserError("pictures in each part's folder", f"none in {some(empty)}", "add some, or move it away.")
    if "test" not in parts and "val" in parts:
        parts["test"] = parts.pop("val")
    shares = {part: share for part, share in (("test", test_size), ("val", val_size)) if part not in parts}
    strays = set(found.pictures) - {picture.file for pictures in parts.values() for picture in pictures}
    found = found._replace(passed_over=sorted(strays.union(found.passed_over)))
    return Layout(names, parts | split_by_class(parts["train"], names, shares), found)


def check_classes(folder: Path, names: list[str]) -> None:
    """Raises UserError unless the folders in `folder` are at least two classes of those named, as `names` must be."""
    here = list(class_folders(folder))
    if not here:
        remedy = "make a folder for each class; pictures of unknown classes are for predict."
        raise UserError(f"folders of classes in {folder}: {SHOWN}", "none", remedy)
    if len(names) < 2:
        inner = list(class_folders(class_folders(folder)[here[0]]))
        remedy = f"give --data.path {folder / here[0]}" if len(inner) > 1 else "make a folder for each class."
        raise UserError(f"two classes or more in {folder}: {SHOWN}", f"one: {here[0]}", remedy)
    if others := [name for name in here if name not in names]:
        expected = f"in {folder} the classes of training: {some(names)}"
        raise UserError(expected, f"others: {some(others)}", "rename these folders, or move them away.")


def some(names: list[str]) -> str:
    """The first ten, and how many more."""
    more = [f"and {len(names) - 10} more"] if len(names) > 10 else []
    return ", ".join(names[:10] + more)


def rank(name: Path, seed: int) -> bytes:
    """A pseudorandom number for a file's name; the same whether its accents are stored composed or apart."""
    text = f"{seed}/{unicodedata.normalize('NFC', name.as_posix())}"
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()


def split_by_class(pictures: list[Picture], names: list[str], shares: dict[str, float]) -> dict[str, list[Picture]]:
    """The first pictures of each class for the parts in `shares`, at least one each unless a share is 0; the rest for
    "train". A share of 1 for the test leaves none for the others.

    Raises:
        UserError: the shares, or a class with few pictures, leave none to train on.
    """
    if shares.get("test") == 1:
        return {"test": pictures, "val": [], "train": []}
    if sum(shares.values()) >= 1:
        raise UserError("val_size and test_size below 1 together", f"{sum(shares.values()):g}", "give smaller ones.")
    total = Counter(picture.class_name for picture in pictures)
    ends: dict[str, list[int]] = {}
    for name in names:
        counts = [max(1, round(share * total[name])) if share else 0 for share in shares.values()]
        ends[name] = list(itertools.accumulate(counts))
        if sum(counts) >= total[name]:
            expected = f"more than {sum(counts)} pictures of each class"
            raise UserError(expected, f"{total[name]} of {name}", "add pictures of it, or move its folder away.")
    parts: dict[str, list[Picture]] = {part: [] for part in (*shares, "train")}
    turn: Counter[str] = Counter()
    for picture in pictures:
        part = bisect_right(ends[picture.class_name], turn[picture.class_name])
        parts[[*parts][part]].append(picture)
        turn[picture.class_name] += 1
    return parts
