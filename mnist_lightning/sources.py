"""Where the images come from: the official MNIST files, or the handwritten digits that scikit-learn ships.

Every source gives the same thing: `Digits(train, test)`, each a pair of uint8 images (N, 1, 28, 28), 0 = paper,
255 = ink, and int64 labels (N,).

MNIST: LeCun, Cortes, Burges, http://yann.lecun.com/exdb/mnist/: 60,000 + 10,000 images in four IDX files.
Digits: Alpaydin, Kaynak, https://doi.org/10.24432/C50P49: 1,797 images of 8×8, `sklearn.datasets.load_digits`.
"""

import gzip
import hashlib
import http.client
import math
import socket
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple
from urllib.error import HTTPError

import torch
from torch import Tensor

from mnist_lightning.errors import UserError

NETWORK_TIMEOUT = 10.0  # seconds to connect, and between two packets
DIGITS_TEST = 360  # the last fifth of the 1,797: mostly other writers than the first four fifths


class Split(NamedTuple):
    images: Tensor  # uint8 (N, 1, 28, 28)
    labels: Tensor  # int64 (N,)


class Digits(NamedTuple):
    train: Split
    test: Split


class IDXFile(NamedTuple):
    """One official file. The MD5 of the .gz is torchvision's; that of its content was computed from it."""

    name: str
    shape: tuple[int, ...]
    md5_gz: str
    md5: str

    @property
    def header(self) -> int:
        """Bytes before the data: a magic number, then one count a dimension, 4 bytes each."""
        return 4 + 4 * len(self.shape)

    @property
    def size(self) -> int:
        """Bytes of the unpacked file."""
        return self.header + math.prod(self.shape)


FILES = (
    IDXFile(
        "train-images-idx3-ubyte",
        (60000, 28, 28),
        "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "6bbc9ace898e44ae57da46a324031adb",
    ),
    IDXFile(
        "train-labels-idx1-ubyte", (60000,), "d53e105ee54ea40749a09fcbcd1e9432", "a25bea736e30d166cdddb491f175f624"
    ),
    IDXFile(
        "t10k-images-idx3-ubyte",
        (10000, 28, 28),
        "9fb629c4189551a2d022fa330f9573f3",
        "2646ac647ad5339dbf082846283269ea",
    ),
    IDXFile("t10k-labels-idx1-ubyte", (10000,), "ec29112dd5afa0611ce80d1b7f02629c", "27ae3e4e09519cfbb04c329615203637"),
)


def load_mnist(data_dir: str, mirrors: Sequence[str] | None = None) -> Digits:
    """Reads the four files from `data_dir`/MNIST/raw, unpacked or as .gz; downloads those that aren't there intact.

    A second process that comes at the same time waits for the first, then finds the files.

    Args:
        mirrors: base addresses to try, in order; None means torchvision's.

    Raises:
        UserError: the folder can't be used, or no mirror gave the right bytes.
    """
    raw_dir = Path(data_dir).expanduser() / "MNIST" / "raw"  # torchvision's layout, so that its users share one copy
    try:
        contents = [_read(raw_dir, file) or _download(raw_dir, file, mirrors) for file in FILES]
    except OSError as error:  # permissions, a read-only or full disk, a file where a folder should be
        raise UserError(
            f"a data folder to read and write: {data_dir}",
            f"{error.strerror}: {error.filename}",
            "choose another with --data.data_dir DIR, or mend its permissions.",
        ) from error
    arrays = [
        torch.frombuffer(content, dtype=torch.uint8, offset=file.header).view(file.shape)
        for content, file in zip(contents, FILES, strict=True)
    ]
    train_images, train_labels, test_images, test_labels = arrays
    return Digits(
        Split(train_images.unsqueeze(1), train_labels.long()), Split(test_images.unsqueeze(1), test_labels.long())
    )


def load_digits() -> Digits:
    """scikit-learn's 1,797 digits, scaled from 8×8 to the 20×20 box in which MNIST draws, on 28×28."""
    from sklearn.datasets import load_digits as sklearn_digits

    bunch = sklearn_digits()
    small = torch.from_numpy(bunch.images).float().unsqueeze(1) * (255 / 16)  # (N, 1, 8, 8), ink 0..16 -> 0..255
    box = torch.nn.functional.interpolate(small, size=20, mode="bicubic", align_corners=False)  # (N, 1, 20, 20)
    images = torch.nn.functional.pad(box, (4, 4, 4, 4)).round().clamp(0, 255).to(torch.uint8)  # (N, 1, 28, 28)
    labels = torch.from_numpy(bunch.target).long()
    cut = len(labels) - DIGITS_TEST
    return Digits(Split(images[:cut], labels[:cut]), Split(images[cut:], labels[cut:]))


def _download(raw_dir: Path, file: IDXFile, mirrors: Sequence[str] | None) -> bytearray:
    from filelock import FileLock
    from torchvision.datasets import MNIST
    from torchvision.datasets.utils import download_url

    name, failures = f"{file.name}.gz", []
    raw_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(raw_dir / ".download.lock"):
        if content := _read(raw_dir, file, quiet=True):  # another process was faster
            return content
        for mirror in mirrors or MNIST.mirrors:
            # Into a folder beside the target: torchvision writes in place, and a killed download leaves half a file.
            with TemporaryDirectory(dir=raw_dir, prefix=".download-") as staging, network_timeout():
                try:
                    download_url(f"{mirror.rstrip('/')}/{name}", staging, md5=file.md5_gz)
                except PermissionError:
                    raise
                except (OSError, RuntimeError, ValueError, http.client.HTTPException) as error:
                    if isinstance(error, HTTPError):
                        error.close()  # it is the answer, too; Python 3.13 warns of one left open
                    reason = " ".join(str(error).split())  # on one line: a host that isn't HTTP is quoted as it is
                    failures.append(f"{mirror} ({reason or type(error).__name__})")
                    continue
                (Path(staging) / name).replace(raw_dir / name)
            if content := _read(raw_dir, file):
                return content
            failures.append(f"{mirror} (its content isn't MNIST's)")
    raise UserError(
        f"an intact {name} in {raw_dir}, or a mirror to download it from",
        "; ".join(failures),
        f"put {', '.join(f'{file.name}.gz' for file in FILES)} there; or give --data.mirrors '[URL]'; or"
        " --data.source digits.",
    )


def _read(raw_dir: Path, file: IDXFile, quiet: bool = False) -> bytearray | None:
    """The bytes of one IDX file if it is there and intact, unpacked or packed; None otherwise."""
    for path, opener in ((raw_dir / file.name, open), (raw_dir / f"{file.name}.gz", gzip.open)):
        if not path.is_file():
            continue
        content = bytearray(file.size + 1)  # one more than right: a longer file, or a gzip bomb, stops there
        try:
            with opener(path, "rb") as stream:
                read = stream.readinto(content)
        except (EOFError, zlib.error, gzip.BadGzipFile):
            read = 0
        del content[read:]
        if hashlib.md5(content, usedforsecurity=False).hexdigest() == file.md5:
            return content
        if not quiet:
            print(f"{path}: not MNIST's bytes (half written?); looking elsewhere.", file=sys.stderr)
    return None


@contextmanager
def network_timeout() -> Iterator[None]:
    """torchvision's urlopen has no timeout of its own: a host that swallows packets would hang the run."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(NETWORK_TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
