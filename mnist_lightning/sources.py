"""Where images and weights come from: MNIST's files, the digits that scikit-learn ships, ResNet18's ImageNet weights.

MNIST: LeCun, Cortes, Burges, http://yann.lecun.com/exdb/mnist/: 60,000 + 10,000 images in four IDX files.
Digits: Alpaydin, Kaynak, https://doi.org/10.24432/C50P49: 1,797 images of 8×8, `sklearn.datasets.load_digits`.
"""

import gzip
import hashlib
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mnist_lightning.files import download

DIGITS_TEST = 360  # the last fifth of the 1,797: mostly other writers than the first four fifths
MIRRORS = ("https://ossci-datasets.s3.amazonaws.com/mnist/", "http://yann.lecun.com/exdb/mnist/")  # torchvision's
IMAGENET_URL = "https://download.pytorch.org/models/resnet18-f37072fd.pth"  # torchvision's IMAGENET1K_V1
IMAGENET_SHA256 = "f37072fd47e89c5e827621c5baffa7500819f7896bbacec160b1a16c560e07ec"


class Split(NamedTuple):
    images: Tensor  # uint8 (N, 1, 28, 28), 0 = background, 255 = strokes
    labels: Tensor  # int64 (N,)


class Digits(NamedTuple):
    train: Split
    test: Split


# MNIST's four files: the MD5 of the .gz, which torchvision checks, too, and that of its content, computed here.
FILES = {
    "train-images-idx3-ubyte": ("f68b3c2dcbeaaa9fbdd348bbdeb94873", "6bbc9ace898e44ae57da46a324031adb"),
    "train-labels-idx1-ubyte": ("d53e105ee54ea40749a09fcbcd1e9432", "a25bea736e30d166cdddb491f175f624"),
    "t10k-images-idx3-ubyte": ("9fb629c4189551a2d022fa330f9573f3", "2646ac647ad5339dbf082846283269ea"),
    "t10k-labels-idx1-ubyte": ("ec29112dd5afa0611ce80d1b7f02629c", "27ae3e4e09519cfbb04c329615203637"),
}


def load_mnist(data_dir: str, mirrors: Sequence[str] | None = None) -> Digits:
    """Reads the four files from `data_dir`/MNIST/raw, unpacked or .gz; downloads those that are missing or damaged from
    one of the mirrors, base addresses, by default torchvision's.

    Raises:
        UserError: no mirror has the right files, or the folder can't be written.
    """
    raw_dir = Path(data_dir).expanduser() / "MNIST" / "raw"  # where torchvision keeps them, too
    arrays = [_load_idx(raw_dir, name, mirrors) for name in FILES]
    return Digits(Split(*arrays[:2]), Split(*arrays[2:]))


def load_digits() -> Digits:
    """scikit-learn's 1,797 digits, scaled from 8×8 to the 20×20 box in which MNIST draws, on 28×28."""
    from sklearn.datasets import load_digits as sklearn_digits

    bunch = sklearn_digits()
    small = torch.from_numpy(bunch.images).float().unsqueeze(1) * (255 / 16)  # (N, 1, 8, 8), ink 0..16 -> 0..255
    box = F.interpolate(small, size=20, mode="bicubic", align_corners=False)  # (N, 1, 20, 20)
    images = F.pad(box, (4, 4, 4, 4)).round().clamp(0, 255).to(torch.uint8)  # (N, 1, 28, 28)
    labels = torch.from_numpy(bunch.target).long()
    cut = len(labels) - DIGITS_TEST
    return Digits(Split(images[:cut], labels[:cut]), Split(images[cut:], labels[cut:]))


def imagenet_weights() -> Path:
    """The file of ResNet18's ImageNet weights, in the folder where torchvision keeps it, too; downloaded if need be.

    Raises:
        UserError: it can't be had.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(IMAGENET_URL).name
    remedy = f"put the file from {IMAGENET_URL} there; or give --model.weights PATH, or --model.weights none."
    download([IMAGENET_URL], path, f"sha256:{IMAGENET_SHA256}", remedy)
    return path


def _load_idx(raw_dir: Path, name: str, mirrors: Sequence[str] | None) -> Tensor:
    packed = raw_dir / f"{name}.gz"
    for path in (raw_dir / name, packed):
        try:
            if path.is_file():
                return _read_idx(path)
        except (EOFError, zlib.error, OSError, ValueError) as error:
            print(f"{path}: damaged, or can't be read ({error}); looking elsewhere.", file=sys.stderr)
    urls = [f"{mirror.rstrip('/')}/{packed.name}" for mirror in mirrors or MIRRORS]
    names = ", ".join(f"{name}.gz" for name in FILES)
    remedy = f"put {names} there; or give --data.data_dir DIR, --data.mirrors '[URL]', or --data.source digits."
    download(urls, packed, f"md5:{FILES[name][0]}", remedy)
    return _read_idx(packed)


def _read_idx(path: Path) -> Tensor:
    """Images (N, 1, 28, 28) or labels (N,) of an IDX file, unpacked or .gz; ValueError if they aren't MNIST's."""
    with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as stream:
        content = bytearray(stream.read())
    name = path.name.removesuffix(".gz")
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != FILES[name][1]:
        raise ValueError("its MD5 isn't MNIST's")
    if "labels" in name:
        return torch.frombuffer(content, dtype=torch.uint8, offset=8).long()
    return torch.frombuffer(content, dtype=torch.uint8, offset=16).view(-1, 1, 28, 28)
